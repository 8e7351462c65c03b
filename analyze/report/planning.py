"""What a report would be: files, bytes and time, from the feature tables and a few pictures, before anything is written."""

from dataclasses import dataclass

import numpy as np

from analyze.circuits.viewer.pages import planned
from analyze.inputs import Analysis, Subject
from analyze.pictures.drawing import fitted
from analyze.report.chosen import most_interesting
from analyze.report.chunks import CHUNK
from analyze.report.columns import SMALL, FeatureColumns
from analyze.report.heat_pass import stream_tokens
from analyze.report.images import BLOCK
from analyze.report.picture_files import webp_bytes
from analyze.report.settings import ReportSettings
from analyze.report.steering import planned as planned_steering

BASE64 = 4 / 3
LIBRARIES = 2_300_000
PICTURES_TRIED = 8
FEATURE_BYTES, FIGURES_BYTES, EXAMPLE_BYTES = 60, 170, 22
"""bytes of a feature's entry, of its figures at a step, and of an example without heat"""
SECONDS_A_MILLION_FEATURES, SECONDS_A_PICTURE, SECONDS_A_HEAT = 90.0, 0.012, 0.00006
"""measured on 2 cores: writing, shrinking a picture, packing the heat of an example; reading the store comes on top"""
READ_RATE = 0.25e9
"""bytes a second from a disk"""


@dataclass(frozen=True)
class Plan:
    """What `report` would write."""

    files: int
    bytes: dict[str, int]
    """by what they are: tables, examples, heat, pictures, prompts, libraries, and graphs and steering where there are any"""
    seconds: float
    heated: int
    """features with heat, over all dictionaries and steps"""

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())

    def sentence(self) -> str:
        """The plan in words."""
        parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in self.bytes.items())
        return (
            f"report: about {self.files:,} files, {self.total / 1e6:,.1f} MB ({parts}), {self.seconds:,.0f} s; heat on the images of "
            f"{self.heated:,} features (--heat-features)"
        )


def plan_of(analysis: Analysis, settings: ReportSettings, limit: int) -> Plan:
    """Sizes from the tables themselves; a picture's from those of a few images, heat's from how many tokens are active."""
    sizes = dict.fromkeys(("tables", "examples", "heat", "pictures", "prompts"), 0.0)
    files, heated, rounds, seconds = 0, 0, 0, 0.0
    images: set[int] = set()
    for subject in analysis.subjects:
        files += -(-subject.n_features // CHUNK)
        sizes["examples"] += subject.n_features * (FEATURE_BYTES + 13 * settings.similar)
        for step in analysis.steps:
            columns = FeatureColumns.of(analysis.matrix(subject, step).features(), settings.top)
            chosen = most_interesting(columns, limit)
            examples = int((columns.images >= 0).sum())
            images |= set(np.unique(columns.images[columns.images >= 0]).tolist())
            number = 2 if analysis.store.n_images < SMALL else 4
            sizes["tables"] += columns.n_features * (4 * 7 + 1 + number * settings.top) * BASE64
            sizes["examples"] += columns.n_features * FIGURES_BYTES + examples * EXAMPLE_BYTES
            packed, count = _heat(analysis, subject, columns, chosen)
            sizes["heat"] += packed
            seconds += count * SECONDS_A_HEAT + _bytes_read(analysis, subject, columns, chosen) / READ_RATE
            files += 1 + -(-columns.n_features // CHUNK)
            heated, rounds = heated + len(chosen), rounds + columns.n_features
    texts = analysis.store.prompt_columns("prompt")["prompt"].to_pylist() if analysis.store.n_images else []
    sizes["prompts"] = sum(len(str(text)) + 25 for text in texts) * (2.2 if set(analysis.streams()) != {"img"} else 1.0)
    drawn = images if analysis.store.meta.pictures != "none" and set(analysis.streams()) != {"txt"} else set()
    sizes["pictures"] = len(drawn) * _picture_bytes(analysis, sorted(drawn), settings.picture_side)
    files += len(drawn) + 2 * -(-analysis.store.n_images // BLOCK) + 25
    seconds += len(drawn) * SECONDS_A_PICTURE + rounds * SECONDS_A_MILLION_FEATURES / 1e6 + 2
    if settings.graphs:
        more, sizes["graphs"] = planned(settings.graphs)
        files += more
    if settings.steering or settings.faithfulness:
        more, sizes["steering"] = planned_steering(settings.steering, settings.faithfulness)
        files += more
    return Plan(files, {**{name: int(size) for name, size in sizes.items()}, "libraries": LIBRARIES}, seconds, heated)


def _heat(analysis: Analysis, subject: Subject, columns: FeatureColumns, chosen: np.ndarray) -> tuple[float, int]:
    """Bytes of the packed heat of the chosen features, and how many heats they are.

    On an image where a feature is active it is so on density / image_share of the tokens: two bytes for each, or one for every token.
    """
    total = stream_tokens(analysis, subject.site.stream)
    density, share = columns.numbers["density"][chosen], columns.numbers["image_share"][chosen]
    active = total * np.minimum(1, 2 * density / np.maximum(share, 1e-9))  # top images are busier than most: twice
    examples = (columns.images[chosen] >= 0).sum(axis=1)
    return float((np.minimum(2 * active, total) * BASE64 * examples + 30 * examples).sum()), int(examples.sum())


def _bytes_read(analysis: Analysis, subject: Subject, columns: FeatureColumns, chosen: np.ndarray) -> float:
    """What is read of the store: the chunks with an image that is wanted."""
    meta = analysis.store.meta
    wanted = np.unique(columns.images[chosen][columns.images[chosen] >= 0] // meta.chunk_images)
    width = 4 if meta.store_dtype == "float32" else 2
    return float(len(wanted) * meta.chunk_images * meta.tokens[subject.site.stream].kept * meta.d_model * width)


def _picture_bytes(analysis: Analysis, images: list[int], side: int) -> float:
    """Mean bytes of a picture in the report, from a few of them."""
    tried = images[:: max(1, len(images) // PICTURES_TRIED)][:PICTURES_TRIED]
    sizes = []
    for image in tried:
        picture = analysis.store.picture(image)
        assert picture is not None, "asked for only where the store keeps pictures"
        sizes.append(len(webp_bytes(picture if max(picture.size) <= side else fitted(picture, side))))
    return float(np.mean(sizes)) if sizes else 0.0
