"""`python -m train --pack PACK --out DIR`, and `import`, `export` of published files."""

import sys

from store.command import Command, program
from train.dictionaries.published import ExportSettings, ImportSettings, run_export, run_import
from train.settings import TrainSettings
from train.trainer import train

COMMANDS = {
    "train": Command(TrainSettings, train, "train dictionaries from a pack, each site read once (the default)"),
    "import": Command(ImportSettings, run_import, "turn a published .pt file into a dictionary folder"),
    "export": Command(ExportSettings, run_export, "write a dictionary as the .pt file that the published code loads"),
}

if __name__ == "__main__":
    sys.exit(program("train", COMMANDS, default="train"))
