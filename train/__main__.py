"""`python -m train --pack PACK --out DIR`, and `import`, `export` of published files."""

import sys

from store.command import Command, program

COMMANDS = {
    "train": Command(
        "train.settings:TrainSettings",
        "train.trainer:train",
        "train dictionaries from a pack, each site read once (the default)",
    ),
    "import": Command(
        "train.dictionaries.published:ImportSettings",
        "train.dictionaries.published:run_import",
        "turn a published .pt file into a dictionary folder",
    ),
    "export": Command(
        "train.dictionaries.published:ExportSettings",
        "train.dictionaries.published:run_export",
        "write a dictionary as the .pt file that the published code loads",
    ),
}

if __name__ == "__main__":
    sys.exit(program("train", COMMANDS, default="train"))
