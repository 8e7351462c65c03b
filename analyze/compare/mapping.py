"""Where the decoder directions of each dictionary point: the command `directions`.

    OUT/directions/NAME/cosines.png          chosen or best features against one another, similar ones side by side
    OUT/directions/NAME/neighbours.png       how near the nearest other direction of each feature is, against chance
    OUT/directions/NAME/projection.png       all directions in the plane of their first two principal axes
    OUT/directions/NAME/directions.parquet   feature, nearest, cosine, x, y, density, mean_step
    OUT/directions/NAME/summary.json         the figures of the plots; the heat map's features in its order with their cosines

Directions belong to a dictionary and not to a step; density and mean step are taken over the steps that were chosen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from tqdm import tqdm

from analyze.compare import directions
from analyze.compare.plots import cosine_map, neighbour_histogram, projection_plot
from analyze.compare.settings import MOST_ON_MAP, DirectionsSettings
from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.labels.book import LabelBook, name_of
from store.errors import UsageError
from store.files import write_bytes, write_json
from store.sites import parse_numbers
from store.tables import write_table

NAMED_POINTS = 12
CLOSE = 0.9


@dataclass(frozen=True)
class Mapped:
    """What was found for one dictionary."""

    name: str
    folder: Path
    table: pa.Table
    """as `directions.parquet` has it"""
    summary: dict[str, Any]
    """as `summary.json` has it"""


@dataclass(frozen=True)
class _Profile:
    """How often each feature is active over all steps, and when; NaN where it never is."""

    density: Float[np.ndarray, " feature"]
    mean_step: Float[np.ndarray, " feature"]
    interest: Float[np.ndarray, " feature"]
    """the greatest of any step; -inf for features that are never active"""


def run(settings: DirectionsSettings) -> list[Mapped]:
    """Write tables and plots for every chosen dictionary."""
    analysis = open_analysis(settings)
    check_output(analysis)
    for subject in analysis.subjects:  # refused before any is computed
        if settings.neighbours >= subject.n_features:
            raise UsageError(
                f"{subject.name} has {subject.n_features} features: --neighbours is {settings.neighbours}, at most "
                f"{subject.n_features - 1} can be listed"
            )
    found = []
    for subject in tqdm(list(analysis.subjects), desc="directions", unit="dictionary", mininterval=0.5):
        profile = _profile(analysis, subject)
        chosen = _chosen(subject, profile, settings)
        found.append(_mapped(analysis, subject, profile, chosen, settings.neighbours))
    for each in found:
        figures = each.summary["nearest"]
        print(
            f"{each.name}: nearest direction at cosine {figures['median']:.2f} (median; random directions: {figures['chance']:.2f}), "
            f"{figures['share_at_least_0.9']:.1%} of the features at {CLOSE} or more"
        )
    print(f"directions: {len(found)} dictionaries -> {analysis.out / 'directions'}")
    return found


def _profile(analysis: Analysis, subject: Subject) -> _Profile:
    tables = [analysis.matrix(subject, step).features() for step in analysis.steps]
    density = np.stack([table["density"].to_numpy() for table in tables])
    interest = np.stack([np.where(table["alive"], table["interest"], -np.inf) for table in tables])
    total = density.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean_step = (np.asarray(analysis.steps, np.float64)[:, None] * density).sum(axis=0) / total
    return _Profile(np.where(total > 0, density.mean(axis=0), np.nan), mean_step, interest.max(axis=0))


def _chosen(subject: Subject, profile: _Profile, settings: DirectionsSettings) -> Int[np.ndarray, " chosen"]:
    if settings.features is not None:
        chosen = np.asarray(parse_numbers(settings.features, subject.n_features, "feature"), np.int64)
        if len(chosen) > MOST_ON_MAP:
            raise UsageError(
                f"--features names {len(chosen)}: the names of at most {MOST_ON_MAP} can be read beside a heat map"
            )
        return chosen
    order = np.argsort(-profile.interest, kind="stable")[: settings.best]
    alive = np.asarray(order[np.isfinite(profile.interest[order])])
    if not len(alive):
        raise UsageError(f"no feature of {subject.name} is alive at these steps: name some with --features")
    return alive


def _mapped(
    analysis: Analysis, subject: Subject, profile: _Profile, chosen: Int[np.ndarray, " chosen"], neighbours: int
) -> Mapped:
    dictionary, book = subject.dictionary, LabelBook.of(subject)
    index, cosine = directions.nearest(dictionary, neighbours)
    plane = directions.projected(directions.unit_directions(dictionary))
    chance = directions.chance_cosine(subject.n_features, int(dictionary.config.d_model))
    ordered = similar_together(chosen, directions.cosines_between(dictionary, chosen))
    cosines = directions.cosines_between(dictionary, ordered)
    table = _table(index, cosine, plane, profile)
    summary = _summary(analysis, subject, cosine, plane, chance, ordered, cosines)
    folder = analysis.out / "directions" / subject.name
    names = [_short(subject, int(feature), book) for feature in ordered]
    of = f"{subject.name}: {subject.n_features:,} decoder directions"
    write_table(folder / "directions.parquet", table)
    write_json(folder / "summary.json", summary)
    write_bytes(
        folder / "cosines.png", cosine_map(cosines, names, f"{subject.name}: cosines of {len(ordered)} features")
    )
    write_bytes(folder / "neighbours.png", neighbour_histogram(cosine[:, 0], chance, of))
    colours = [("density, log10", _log10(profile.density), "viridis")]
    if len(analysis.steps) > 1:
        colours.append(("mean step of its activity", profile.mean_step, "plasma"))
    named = [(int(feature), _short(subject, int(feature), book)) for feature in chosen[:NAMED_POINTS]]
    write_bytes(folder / "projection.png", projection_plot(plane.places, plane.explained, colours, named, of))
    return Mapped(subject.name, folder, table, summary)


def _short(subject: Subject, feature: int, book: LabelBook) -> str:
    """A feature's name without its dictionary's, which stands in the title: `12 · red`."""
    return name_of(subject, feature, book).removeprefix(f"{subject.name}/")


def _log10(density: Float[np.ndarray, " feature"]) -> Float[np.ndarray, " feature"]:
    return np.asarray(np.log10(np.where(density > 0, density, np.nan)))


def similar_together(
    features: Int[np.ndarray, " chosen"], cosines: Float[np.ndarray, "chosen chosen"]
) -> Int[np.ndarray, " chosen"]:
    """The features in the order of the leaves of a tree of their cosines (average linkage), so that similar ones stand together."""
    if len(features) < 3:
        return features
    distance = np.maximum(1 - cosines.astype(np.float64), 0)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform((distance + distance.T) / 2, checks=False), "average", optimal_ordering=True)
    return np.asarray(features[leaves_list(tree)])


def _table(
    index: Int[np.ndarray, "feature k"],
    cosine: Float[np.ndarray, "feature k"],
    plane: directions.Projection,
    profile: _Profile,
) -> pa.Table:
    k = index.shape[1]
    return pa.table(
        {
            "feature": np.arange(len(index), dtype=np.int32),
            "nearest": pa.FixedSizeListArray.from_arrays(index.ravel(), k),
            "cosine": pa.FixedSizeListArray.from_arrays(cosine.ravel(), k),
            "x": plane.places[:, 0],
            "y": plane.places[:, 1],
            "density": pa.array(profile.density, from_pandas=True),
            "mean_step": pa.array(profile.mean_step, from_pandas=True),
        }
    )


def _summary(
    analysis: Analysis,
    subject: Subject,
    cosine: Float[np.ndarray, "feature k"],
    plane: directions.Projection,
    chance: float,
    ordered: Int[np.ndarray, " chosen"],
    cosines: Float[np.ndarray, "chosen chosen"],
) -> dict[str, Any]:
    counts, edges = np.histogram(cosine[:, 0], bins=np.linspace(-1, 1, 101))
    return {
        "dictionary": subject.identity,
        "features": subject.n_features,
        "d_model": int(subject.dictionary.config.d_model),
        "steps": list(analysis.steps),
        "nearest": {
            "median": _rounded(np.median(cosine[:, 0])),
            "chance": _rounded(chance),
            "share_at_least_0.9": _rounded((cosine[:, 0] >= CLOSE).mean()),
            "histogram": counts.tolist(),
            "edges": [_rounded(edge) for edge in edges],
        },
        "explained": [_rounded(share) for share in plane.explained],
        "map": {
            "features": [int(feature) for feature in ordered],
            "cosines": [[_rounded(value) for value in row] for row in cosines],
        },
    }


def _rounded(value: Any) -> float:
    return round(float(value), 6)
