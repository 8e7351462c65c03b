"""`python -m harvest FLAGS`: run FLUX over prompts and fill a store."""

import sys

from harvest import run
from harvest.settings import HarvestSettings
from store.command import Command, program

COMMANDS = {"harvest": Command(HarvestSettings, run, "Run FLUX over prompts and keep what its MLPs did in a store.")}

if __name__ == "__main__":
    sys.exit(program("harvest", COMMANDS, default="harvest"))
