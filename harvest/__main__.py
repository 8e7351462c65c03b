"""`python -m harvest FLAGS`: run FLUX over prompts and fill a store."""

import sys

from store.command import Command, program

COMMANDS = {
    "harvest": Command(
        "harvest.settings:HarvestSettings",
        "harvest:run",
        "Run FLUX over prompts and keep what its MLPs did in a store.",
    )
}

if __name__ == "__main__":
    sys.exit(program("harvest", COMMANDS, default="harvest"))
