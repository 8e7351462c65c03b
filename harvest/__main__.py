"""`python -m harvest FLAGS`: run FLUX over prompts and fill a store; `python -m harvest status STORE`: who does so, how far."""

import sys

from store.command import Command, program

COMMANDS = {
    "harvest": Command(
        "harvest.settings:HarvestSettings",
        "harvest:run",
        "Run FLUX over prompts and keep what its MLPs did in a store.",
    ),
    "status": Command(
        "harvest.workers.status:StatusSettings",
        "harvest.workers.status:run",
        "Say how far a store is, who fills it, how fast, and until when.",
    ),
}

if __name__ == "__main__":
    sys.exit(program("harvest", COMMANDS, default="harvest"))
