"""`python -m analyze COMMAND …`: what the features of a store's dictionaries stand for."""

import sys

from analyze import everything, features, report, scores, sheets, truth
from analyze.settings import AllSettings, FeaturesSettings, ReportSettings, ScoresSettings, SheetSettings, TruthSettings
from store.command import Command, program

COMMANDS = {
    "scores": Command(ScoresSettings, scores.run, "score matrices and feature statistics of every dictionary and step"),
    "features": Command(FeaturesSettings, features.run, "rank the features of each site and step"),
    "truth": Command(
        TruthSettings, truth.run, "the feature that stands for each attribute, scored (stores of builtin:shapes)"
    ),
    "sheet": Command(SheetSettings, sheets.run, "contact sheets: top images with the heat of a feature over them"),
    "report": Command(ReportSettings, report.run, "an HTML report that opens from disk"),
    "all": Command(AllSettings, everything.run, "scores, truth where it is known, report"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    return program("analyze", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
