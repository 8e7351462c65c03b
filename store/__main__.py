"""`python -m store COMMAND STORE …`: look at a store, pack it."""

import sys

from store import info, pack
from store.command import Command, program

COMMANDS = {
    "info": Command(
        info.InfoSettings, info.run, "Say what a store holds: model, prompts, sizes, statistics of every site."
    ),
    "pack": Command(
        pack.PackSettings, pack.run, "Shuffle one split of a store into shards that training reads in order."
    ),
}

if __name__ == "__main__":
    sys.exit(program("store", COMMANDS))
