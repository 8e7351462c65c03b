"""What a circuit is compared with: as many features that were chosen without its graphs, and single ones.

    circuit    the circuit's best sources
    target     the features that the graphs explain, alone
    matched    as many features of the target's own sites, chosen without graphs
    contrast   as many features of the circuit's streams, chosen without graphs
    single     the one feature that tells the value best, of all sites and steps (the truth table's)
    random     for each feature of the circuit one of its site that is active about as often

Chosen without graphs means: by contrast of scores, which needs labelled pictures where graphs need traces.  A feature's contrast is
the mean of its scores over pictures with the value, less that over pictures without, in standard deviations of the latter (and 5 %
of its greatest score, so that one that is never active elsewhere has a finite contrast); mean over steps.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int

from analyze.guided.sources import Feature
from analyze.inputs import Analysis, Subject
from store.errors import UsageError
from store.sites import Site
from store.tables import read_table
from train import Dictionary

Arm = Literal["circuit", "target", "matched", "contrast", "single", "random"]
ARMS: tuple[Arm, ...] = get_args(Arm)
NEAREST = 16
"""features of most similar density that a random one is drawn from"""
FLOOR = 0.05
"""of a feature's greatest score, added to the standard deviation that its contrast is counted in"""


@dataclass(frozen=True)
class Labelled:
    """Pictures on which features may be chosen, and which of them show the value."""

    images: Int[np.ndarray, " row"]
    shown: Bool[np.ndarray, " row"]


def transcoders(analysis: Analysis) -> dict[Site, Subject]:
    """The analysis's transcoders of double blocks by site: those whose features can be changed."""
    return {
        subject.site: subject
        for subject in analysis.subjects
        if subject.outline.config.kind == "transcoder" and subject.site.kind == "double"
    }


def left_out(analysis: Analysis) -> list[Site]:
    """The sites of single-stream blocks whose dictionaries lie beside the others."""
    return sorted({subject.site for subject in analysis.subjects if subject.site.kind != "double"})


def contrasts(analysis: Analysis, sites: Collection[Site], labelled: Labelled) -> dict[Feature, float]:
    """The contrast of every feature of some sites; reads their score matrices once a step."""
    subjects = transcoders(analysis)
    found: dict[Feature, float] = {}
    for site in sorted(sites):
        total = np.zeros(subjects[site].n_features)
        for step in analysis.steps:
            matrix = analysis.matrix(subjects[site], step)
            for block in matrix.blocks():
                scores = np.asarray(matrix.scores(block), np.float64)[labelled.images]
                total[block] += _contrast(scores, labelled.shown) / len(analysis.steps)
        found |= {(site, feature): float(value) for feature, value in enumerate(total)}
    return found


def _contrast(scores: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(feature,) from scores (image, feature); 0 for a feature that is never active."""
    away = scores[~shown].mean(0)
    unit = scores[~shown].std(0) + FLOOR * scores.max(0)
    found: np.ndarray = np.divide(scores[shown].mean(0) - away, unit, out=np.zeros_like(away), where=unit > 0)
    return found


def best_by_contrast(
    analysis: Analysis, sites: Collection[Site], labelled: Labelled, count: int, without: Collection[Feature] = ()
) -> tuple[Feature, ...]:
    """The `count` features of highest contrast; those of `without` are passed over."""
    found = contrasts(analysis, sites, labelled)
    ranked = sorted((key for key in found if key not in without), key=lambda key: (-found[key], key))
    return tuple(ranked[:count])


def alike_at_random(analysis: Analysis, circuit: Sequence[Feature], seed: int) -> tuple[Feature, ...]:
    """For each feature of the circuit another of its site, drawn from the 16 whose density (mean over steps) is most like its own."""
    subjects, rng, taken = transcoders(analysis), np.random.default_rng(seed), set(circuit)
    drawn = []
    density: dict[Site, np.ndarray] = {}
    for site, feature in circuit:
        if site not in density:
            density[site] = _density(analysis, subjects[site])
        logs = np.log(density[site] + 1e-9)
        order = np.argsort(np.abs(logs - logs[feature]), kind="stable").tolist()
        near = [other for other in order if (site, other) not in taken][:NEAREST]
        if not near:
            raise UsageError(f"{site} has no feature left to draw at random: choose fewer than {len(circuit)} sources")
        drawn.append((site, int(rng.choice(near))))
        taken.add(drawn[-1])
    return tuple(drawn)


def _density(analysis: Analysis, subject: Subject) -> np.ndarray:
    tables = [analysis.matrix(subject, step).features()["density"].to_numpy() for step in analysis.steps]
    return np.asarray(np.mean(tables, axis=0))


def best_of_truth(
    analysis: Analysis, attribute: str, value: str, sites: Collection[Site], step: int | None = None
) -> Feature:
    """The feature that tells a value best, of transcoders at some sites, at any step or at one: by the half that it was chosen on.

    `UsageError` for an analysis without a truth table, and for a value that it has no feature of.
    """
    found = best_of(told_by_truth(analysis, attribute), value, sites, step)
    if found is None:
        raise UsageError(
            f"{analysis.out / 'truth.parquet'} has no feature of {attribute} {value} at {', '.join(map(str, sorted(sites)))}"
        )
    return found


@dataclass(frozen=True)
class Told:
    """A row of the truth table: which feature of a site tells a value best at a step, over whole pictures."""

    value: str
    step: int
    feature: Feature
    selection: float
    """AUROC on the half that it was chosen on"""


def told_by_truth(analysis: Analysis, attribute: str) -> list[Told]:
    """The truth table's features of an attribute; `UsageError` for an analysis without one, `DamagedError` for one that is cut."""
    path = analysis.out / "truth.parquet"
    if not path.is_file():
        raise UsageError(
            f"{analysis.out} has no truth table: run python -m analyze truth with the same store and dictionaries"
        )
    names = {subject.name: subject.site for subject in transcoders(analysis).values()}
    columns = ["dictionary", "step", "group", "value", "image_feature", "image_selection"]
    return [
        Told(row["value"], row["step"], (names[row["dictionary"]], int(row["image_feature"])), row["image_selection"])
        for row in read_table(path, "run python -m analyze truth again", columns).to_pylist()
        if row["group"] == attribute and row["image_feature"] is not None and row["dictionary"] in names
    ]


def best_of(told: Sequence[Told], value: str, sites: Collection[Site], step: int | None = None) -> Feature | None:
    """The feature that tells a value best at some sites, at any step or at one; None where there is none."""
    rows = [row for row in told if row.value == value and row.feature[0] in sites and step in (None, row.step)]
    return max(rows, key=lambda row: row.selection).feature if rows else None  # of equals the earliest site and step


def features_of_arms(
    arms: Sequence[Arm], own: tuple[Feature, ...], targets: Sequence[Feature], analysis: Analysis, labelled: Labelled,
    single: Feature, seed: int,
) -> dict[Arm, tuple[Feature, ...]]:  # fmt: skip
    """The features of every arm that is asked for; `own` are the circuit's, and matched, contrast and random have as many."""
    streams = {site.stream for site, _ in own}
    beside = [site for site in transcoders(analysis) if site.stream in streams]
    made: dict[Arm, Callable[[], tuple[Feature, ...]]] = {
        "circuit": lambda: own,
        "target": lambda: tuple(targets),
        "matched": lambda: best_by_contrast(analysis, {site for site, _ in targets}, labelled, len(own)),
        "contrast": lambda: best_by_contrast(analysis, beside, labelled, len(own)),
        "single": lambda: (single,),
        "random": lambda: alike_at_random(analysis, own, seed),
    }
    return {arm: made[arm]() for arm in arms}


def outlines_of(analysis: Analysis) -> Mapping[tuple[Site, str], Dictionary]:
    """What `interventions.check` asks for."""
    return {(site, "transcoder"): subject.outline for site, subject in transcoders(analysis).items()}
