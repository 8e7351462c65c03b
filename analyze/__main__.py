"""`python -m analyze COMMAND …`: what the features of a store's dictionaries stand for."""

import sys

from analyze import everything
from analyze.compare import comparing, mapping
from analyze.compare.settings import CompareSettings, DirectionsSettings
from analyze.features import coherence, ranking
from analyze.features.settings import CoherenceSettings, FeaturesSettings
from analyze.labels import command as labels
from analyze.labels.settings import LabelSettings
from analyze.pictures import sheets
from analyze.pictures.settings import SheetSettings
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.scan import discovery
from analyze.scan.settings import ScanSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import AllSettings
from analyze.truth import judging as truth
from analyze.truth.settings import TruthSettings
from store.command import Command, program

COMMANDS = {
    "scores": Command(ScoresSettings, scores.run, "score matrices and feature statistics of every dictionary and step"),
    "features": Command(FeaturesSettings, ranking.run, "rank the features of each site and step"),
    "coherence": Command(CoherenceSettings, coherence.run, "how alike a feature's top images are, by CLIP"),
    "scan": Command(ScanSettings, discovery.run, "features that tell prompts, places or steps apart"),
    "truth": Command(
        TruthSettings, truth.run, "the feature that stands for each attribute, scored (where the truth is known)"
    ),
    "sheet": Command(SheetSettings, sheets.run, "contact sheets: top images with the heat of a feature over them"),
    "compare": Command(CompareSettings, comparing.run, "which features of two layers or steps go together"),
    "directions": Command(DirectionsSettings, mapping.run, "decoder directions: similarities and a map, drawn"),
    "label": Command(LabelSettings, labels.run, "name features, list and merge their names"),
    "report": Command(ReportSettings, report.run, "an HTML report that opens from disk"),
    "all": Command(AllSettings, everything.run, "scores, coherence, truth where it is known, report"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    return program("analyze", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
