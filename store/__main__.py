"""`python -m store COMMAND STORE …`: look at a store, check and mend it, share it, pack it."""

import sys

from store import info, pack
from store.care import diff, remove, repair, verify
from store.command import Command, program
from store.foreign import importing
from store.foreign.settings import ImportSettings
from store.sharing import pull, push

COMMANDS = {
    "info": Command(
        info.InfoSettings,
        info.run,
        "Say what a store or a pack holds: model, prompts, sizes, statistics or rows of every site.",
    ),
    "verify": Command(
        verify.VerifySettings,
        verify.run,
        "Find every damaged, missing or foreign file of a store or a pack, and what it costs.",
    ),
    "repair": Command(
        repair.RepairSettings, repair.run, "Mend a damaged store: from a copy, or by un-committing what is lost."
    ),
    "diff": Command(diff.DiffSettings, diff.run, "Say in what two stores differ."),
    "rm": Command(remove.RemoveSettings, remove.run, "Un-commit parts of a store; harvest --resume makes them again."),
    "import": Command(ImportSettings, importing.run, "Make a store of activations that somebody already has."),
    "pack": Command(
        pack.PackSettings, pack.run, "Shuffle one split of a store into shards that training reads in order."
    ),
    "push": Command(
        push.PushSettings, push.run, "Copy a store, a part of it, a pack, dictionaries or scores to a URL."
    ),
    "pull": Command(pull.PullSettings, pull.run, "Copy them from a URL into a folder."),
}

if __name__ == "__main__":
    sys.exit(program("store", COMMANDS))
