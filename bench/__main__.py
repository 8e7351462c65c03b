"""`python -m bench`: measure; `python -m bench compare OLD.json NEW.json`; `python -m bench show RUN.json`."""

import sys

from store.command import Command, program

COMMANDS = {
    "run": Command(
        "bench.running:BenchSettings",
        "bench.running:run",
        "Measure Granary beside its peers and beside what this machine could do at best; one table.",
    ),
    "compare": Command(
        "bench.comparing:CompareSettings",
        "bench.comparing:compare",
        "Say what became faster or slower between two runs.",
    ),
    "show": Command("bench.comparing:ShowSettings", "bench.comparing:show", "Print the table of a run again."),
}

if __name__ == "__main__":
    sys.exit(program("bench", COMMANDS, default="run"))
