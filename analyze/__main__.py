"""`python -m analyze COMMAND …`: what the features of a store's dictionaries stand for."""

import sys

from analyze import everything
from analyze.pictures import sheets
from analyze.pictures.settings import SheetSettings
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.scoring import features, scores
from analyze.scoring.settings import FeaturesSettings, ScoresSettings
from analyze.settings import AllSettings
from analyze.truth import judging as truth
from analyze.truth.settings import TruthSettings
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
