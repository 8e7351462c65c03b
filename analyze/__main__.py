"""`python -m analyze COMMAND …`: what the features of a store's dictionaries stand for."""

import sys

from store.command import Command, program

COMMANDS = {
    "scores": Command(
        "analyze.scoring.settings:ScoresSettings",
        "analyze.scoring.scores:run",
        "score matrices and feature statistics of every dictionary and step",
    ),
    "features": Command(
        "analyze.features.settings:FeaturesSettings",
        "analyze.features.ranking:run",
        "rank the features of each site and step",
    ),
    "coherence": Command(
        "analyze.features.settings:CoherenceSettings",
        "analyze.features.coherence:run",
        "how alike a feature's top images are, by CLIP",
    ),
    "scan": Command(
        "analyze.scan.settings:ScanSettings",
        "analyze.scan.discovery:run",
        "features that tell prompts, places or steps apart",
    ),
    "truth": Command(
        "analyze.truth.settings:TruthSettings",
        "analyze.truth.judging:run",
        "the feature that stands for each attribute, scored (where the truth is known)",
    ),
    "sheet": Command(
        "analyze.pictures.settings:SheetSettings",
        "analyze.pictures.sheets:run",
        "contact sheets: top images with the heat of a feature over them",
    ),
    "compare": Command(
        "analyze.compare.settings:CompareSettings",
        "analyze.compare.comparing:run",
        "which features of two layers or steps go together",
    ),
    "directions": Command(
        "analyze.compare.settings:DirectionsSettings",
        "analyze.compare.mapping:run",
        "decoder directions: similarities and a map, drawn",
    ),
    "label": Command(
        "analyze.labels.settings:LabelSettings",
        "analyze.labels.command:run",
        "name features, list and merge their names",
    ),
    "report": Command(
        "analyze.report.settings:ReportSettings",
        "analyze.report.building:run",
        "an HTML report that opens from disk",
    ),
    "graph": Command(
        "analyze.circuits.settings:GraphSettings",
        "analyze.circuits.command:run",
        "attribution graphs: what made a feature fire, from stored traces",
    ),
    "graphs": Command(
        "analyze.circuits.gathering:GraphsSettings",
        "analyze.circuits.gathering:run",
        "many graphs together: edges that recur over prompts, one image over its steps",
    ),
    "steer": Command(
        "analyze.steering.settings:SteerSettings",
        "analyze.steering.command:run",
        "change features while pictures are drawn, and see what becomes of them (runs the model)",
    ),
    "targets": Command(
        "analyze.guided.targets:TargetsSettings",
        "analyze.guided.targets:run",
        "what graph is to explain, so that it finds the circuit of each colour",
    ),
    "guided": Command(
        "analyze.guided.settings:GuidedSettings",
        "analyze.guided.command:run",
        "steer by a circuit against steering by single features (runs the model)",
    ),
    "responsive": Command(
        "analyze.responsive.settings:ResponsiveSettings",
        "analyze.responsive.command:run",
        "prompts that show best what a feature does (runs the model)",
    ),
    "faithfulness": Command(
        "analyze.faithfulness.settings:FaithfulnessSettings",
        "analyze.faithfulness.command:run",
        "dictionaries in the place of the MLPs: what becomes of latents and pictures (runs the model)",
    ),
    "validate": Command(
        "analyze.validation.settings:ValidateSettings",
        "analyze.validation.command:run",
        "edges and influences of graphs against perturbations of the real model (runs the model)",
    ),
    "explore": Command(
        "analyze.explore.settings:ExploreSettings",
        "analyze.explore.command:run",
        "a local app: find features, move sliders, see the picture change (runs the model)",
    ),
    "all": Command(
        "analyze.settings:AllSettings",
        "analyze.everything:run",
        "scores, coherence, truth where it is known, report",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    return program("analyze", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
