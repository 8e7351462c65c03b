"""`python -m store COMMAND STORE …`: look at a store, check and mend it, share it, pack it."""

import sys

from store.command import Command, program

COMMANDS = {
    "info": Command(
        "store.info:InfoSettings",
        "store.info:run",
        "Say what a store or a pack holds: model, prompts, sizes, statistics or rows of every site.",
    ),
    "verify": Command(
        "store.care.verify:VerifySettings",
        "store.care.verify:run",
        "Find every damaged, missing or foreign file of a store or a pack, and what it costs.",
    ),
    "repair": Command(
        "store.care.repair:RepairSettings",
        "store.care.repair:run",
        "Mend a damaged store: from a copy, or by un-committing what is lost.",
    ),
    "diff": Command("store.care.diff:DiffSettings", "store.care.diff:run", "Say in what two stores differ."),
    "rm": Command(
        "store.care.remove:RemoveSettings",
        "store.care.remove:run",
        "Un-commit parts of a store; harvest --resume makes them again.",
    ),
    "import": Command(
        "store.foreign.settings:ImportSettings",
        "store.foreign.importing:run",
        "Make a store of activations that somebody already has.",
    ),
    "pack": Command(
        "store.pack:PackSettings",
        "store.pack:run",
        "Shuffle one split of a store into shards that training reads in order.",
    ),
    "push": Command(
        "store.sharing.push:PushSettings",
        "store.sharing.push:run",
        "Copy a store, a part of it, a pack, dictionaries or scores to a URL.",
    ),
    "pull": Command("store.sharing.pull:PullSettings", "store.sharing.pull:run", "Copy them from a URL into a folder."),
}

if __name__ == "__main__":
    sys.exit(program("store", COMMANDS))
