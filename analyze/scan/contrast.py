"""Contrastive scans: the images of side a against those of side b, matched by seed where both sides have the same seeds.

1. A contrast is a list of pairs, each with images on both sides (all seeds of a prompt, or the images that were named).
2. Where both sides of every pair share seeds, those of half of the smaller side or more, a difference is taken for each pair and
   shared seed, and images of other seeds are left out.  The difference of a feature is the mean over pairs of the mean over
   seeds, its effect that mean over the deviation of all differences (Cohen's d of matched samples).  The deviation over seeds is
   that of a pair's differences, and known only where each of them is of the same prompts.
3. Elsewhere the mean of side b (prompts counting once) is taken from that of side a, pair by pair, and the effect is that over the
   deviation of images within their sides (Cohen's d).
4. AUROC: the chance that an image of side a exceeds one of side b, the images of all pairs taken together.

The score matrices hold all that it needs: the activation of a feature on an image is its maximum over the counted tokens.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from analyze.scan.figures import Figures
from analyze.scan.images import ONE_SEED, UNTOLD, Catalogue
from analyze.scan.replicates import ROUNDING, ratio
from analyze.scan.settings import Direction, Match, Rank, ScanSettings
from analyze.truth.auroc import auroc
from store.errors import UsageError

Images = Int[np.ndarray, "_"]


@dataclass(frozen=True)
class Parts:
    """Rows in parts, to take deviations within: the rows, part by part, and where each part starts."""

    rows: Images
    starts: Int[np.ndarray, " part"]

    @classmethod
    def of(cls, rows: Images, label: Int[np.ndarray, " row"]) -> "Parts":
        """The rows, in parts of equal label."""
        order = np.argsort(label, kind="stable")
        return cls(rows[order], np.flatnonzero(np.concatenate(([True], np.diff(label[order]) != 0))))

    def deviation(self, x: Float[np.ndarray, "row feature"]) -> Float[np.ndarray, " feature"]:
        """The deviation within the parts, pooled; NaN when no part has two rows."""
        freedom = len(self.rows) - len(self.starts)
        if freedom < 1:
            return np.full(x.shape[1], np.nan)
        values, counts = x[self.rows], np.diff(np.append(self.starts, len(self.rows)))
        size = np.einsum("if,if->f", values, values)
        values = values - np.repeat(np.add.reduceat(values, self.starts) / counts[:, None], counts, axis=0)
        squares = np.einsum("if,if->f", values, values)
        return np.sqrt(np.where(squares > ROUNDING * size, squares, 0.0) / freedom)


@dataclass(frozen=True)
class Contrast:
    """The two sides of a scan, as weights of images."""

    images: Images
    """the images of both sides, ascending"""
    sides: tuple[Images, Images]
    """places in `images`; an image may stand on both sides, in different pairs"""
    weights: tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]
    """how much each of `images` counts in the mean of each side"""
    differences: sparse.csr_array | None
    """(difference, row): a matched difference is this times the figures of the images; None where seeds do not match"""
    seeds: Parts | None
    """what differs in seed alone: the differences of a pair where matched, else the images of a prompt, side and pair; None: nothing"""
    units: Parts
    """what the effect is measured over: all differences where matched, else the images of a side and pair"""
    pairs: int
    unmatched: str = ""
    """why seeds are not matched, where they are not"""


def sides_of(known: Catalogue, settings: ScanSettings) -> list[tuple[Images, Images]]:
    """The pairs of image lists that the settings name; `UsageError` for what the store has not."""
    if settings.pairs is not None:
        return read_pairs(settings.pairs, known)
    if settings.positive is not None:
        among = np.arange(len(known.prompts)) if settings.images is None else known.numbered(settings.images)
        a = _among(known.matching(settings.positive, "positive"), among, settings, "positive")
        if settings.negative is None:
            b = np.setdiff1d(among, a)
            if not len(b):
                raise UsageError(
                    f"every prompt matches --positive {settings.positive!r}: there is nothing to compare with"
                )
        else:
            b = _among(known.matching(settings.negative, "negative"), among, settings, "negative")
        names = ("--positive", "--negative")
    else:
        assert settings.images is not None
        assert settings.against is not None
        a, b, names = known.numbered(settings.images), known.numbered(settings.against), ("--images", "--against")
    both = np.intersect1d(a, b)
    if len(both):
        raise UsageError(
            f"image {both[0]} is on both sides, {names[0]} and {names[1]}: choose them so that none is on both"
        )
    return [(a, b)]


def _among(found: Images, among: Images, settings: ScanSettings, side: str) -> Images:
    """Those of the images found that are to be looked at; `UsageError` when none is."""
    kept = np.intersect1d(found, among)
    if not len(kept):
        raise UsageError(
            f"none of the images {settings.images} has a prompt that matches --{side} {getattr(settings, side)!r}: "
            f"images {', '.join(map(str, found[:8]))} do"
        )
    return kept


def read_pairs(path: Path, known: Catalogue) -> list[tuple[Images, Images]]:
    """The pairs of a CSV file with the columns prompt_a,prompt_b or image_a,image_b (numbers, or lists such as `0-3 7`)."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), [name.strip() for name in reader.fieldnames or []]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--pairs {path} cannot be read as CSV: {error}") from None
    kinds = [kind for kind in ("prompt", "image") if {f"{kind}_a", f"{kind}_b"} <= set(columns)]
    if len(kinds) != 1:
        raise UsageError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; pairs are prompt_a,prompt_b or image_a,image_b"
        )
    if not rows:
        raise UsageError(f"{path} has a header and no pairs")
    found = []
    for number, row in enumerate(rows, start=1):
        texts = {str(name).strip(): value for name, value in row.items()}
        a, b = (_images_of(known, kinds[0], texts[f"{kinds[0]}_{side}"], f"{path}, pair {number}") for side in "ab")
        if len(np.intersect1d(a, b)):
            raise UsageError(f"{path}, pair {number}: image {np.intersect1d(a, b)[0]} is on both sides")
        found.append((a, b))
    return found


def _images_of(known: Catalogue, kind: str, text: str | None, where: str) -> Images:
    if text is None or not text.strip():
        raise UsageError(f"{where}: one of its sides is empty")
    if kind == "prompt":
        return known.of_prompt(text, where)
    try:
        return known.numbered(text.strip().replace(" ", ","))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def contrast_of(known: Catalogue, pairs: list[tuple[Images, Images]], match: Match = "auto") -> Contrast:
    """The contrast of pairs of image lists, matched by seed where every pair shares seeds; `UsageError` where it must and cannot."""
    shared = [np.intersect1d(known.seeds[a], known.seeds[b]) for a, b in pairs]
    unmatched = _unmatched(known, pairs, shared, match)
    matched = not unmatched
    if matched:
        pairs = [
            (a[np.isin(known.seeds[a], seeds)], b[np.isin(known.seeds[b], seeds)])
            for (a, b), seeds in zip(pairs, shared, strict=True)
        ]
    images = np.unique(np.concatenate([side for pair in pairs for side in pair]))
    groups = known.groups(images)
    places = [(np.searchsorted(images, a), np.searchsorted(images, b)) for a, b in pairs]
    if matched:
        return _matched(known.seeds[images], images, places, shared, groups)
    weights = [np.mean([_balanced(len(images), pair[side], groups) for pair in places], axis=0) for side in (0, 1)]
    each = [side for pair in places for side in pair]
    rows, side_of = np.concatenate(each), np.repeat(np.arange(len(each)), list(map(len, each)))
    prompts = Parts.of(rows, side_of * (int(groups.max()) + 1) + groups[rows])
    return Contrast(
        images, _joined(places), (weights[0], weights[1]), None, prompts, Parts.of(rows, side_of), len(pairs), unmatched
    )


def _unmatched(known: Catalogue, pairs: list[tuple[Images, Images]], shared: list[np.ndarray], match: Match) -> str:
    """Why seeds are not matched, empty where they are; `UsageError` where --match seed asks for what cannot be."""
    if match == "none":
        return "--match none"
    some = " of every pair" if len(pairs) > 1 else ""
    unknown = known.unseeded(np.unique(np.concatenate([side for pair in pairs for side in pair])))
    if len(unknown):
        why = f"the seed of {len(unknown)} of the images is not known, image {unknown[0]} the first"
    elif not all(map(len, shared)):
        why = f"no seed is on both sides{some}"
    elif match == "auto" and (few := _thin(known, pairs, shared)):
        why = f"the seeds on both sides cover {few[0][0]} of the {few[0][1]} images of the smaller side{' of a pair' if some else ''}, "
        return why + "less than half (--match seed compares those alone)"
    else:
        return ""
    if match == "seed":
        raise UsageError(f"--match seed: {why}: choose images of the same seeds, or leave the flag out")
    return why


def _thin(known: Catalogue, pairs: list[tuple[Images, Images]], shared: list[np.ndarray]) -> list[tuple[int, int]]:
    """Of pairs whose shared seeds cover less than half of the smaller side: the images of it that they cover, and all of it."""
    found = []
    for pair, seeds in zip(pairs, shared, strict=True):
        size, covered = min((len(side), int(np.isin(known.seeds[side], seeds).sum())) for side in pair)
        if 2 * covered < size:
            found.append((covered, size))
    return found


def _joined(places: list[tuple[Images, Images]]) -> tuple[Images, Images]:
    return np.concatenate([a for a, _ in places]), np.concatenate([b for _, b in places])


def _matched(
    seeds: Int[np.ndarray, " row"],
    images: Images,
    places: list[tuple[Images, Images]],
    shared: list[np.ndarray],
    groups: Int[np.ndarray, " row"],
) -> Contrast:
    """`seeds` are those of `images`, `groups` their prompts, `shared` the seeds of both sides of each pair: a difference each."""
    counts = np.asarray([len(found) for found in shared])
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    pair_of = np.repeat(np.arange(len(places)), counts)
    means = []
    for side in (0, 1):
        row = np.concatenate([pair[side] for pair in places])
        unit = np.concatenate(
            [
                start + np.searchsorted(found, seeds[pair[side]])
                for start, found, pair in zip(first, shared, places, strict=True)
            ]
        )
        share = 1 / np.bincount(unit, minlength=len(pair_of))[unit]
        means.append(sparse.csr_array((share, (unit, row)), shape=(len(pair_of), len(images))))
    weight = 1 / (len(places) * counts[pair_of])
    every = np.arange(len(pair_of))
    alike = all(_same_prompts(seeds[side], groups[side]) for pair in places for side in pair)
    return Contrast(
        images, _joined(places), (weight @ means[0], weight @ means[1]), sparse.csr_array(means[0] - means[1]),
        Parts.of(every, pair_of) if alike else None, Parts.of(every, np.zeros_like(every)), len(places),
    )  # fmt: skip


def _same_prompts(seeds: Int[np.ndarray, " image"], groups: Int[np.ndarray, " image"]) -> bool:
    """Whether the images of every seed are of the same prompts, so that means of seeds differ in seed alone."""
    seed, group = (np.unique(labels, return_inverse=True)[1].ravel() for labels in (seeds, groups))
    counts = np.zeros((seed.max() + 1, group.max() + 1), np.int64)
    np.add.at(counts, (seed, group), 1)
    return bool((counts == counts[0]).all())


def _balanced(count: int, places: Images, groups: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Weights of the mean over prompts of the mean over their images."""
    numbers, inverse, sizes = np.unique(groups[places], return_inverse=True, return_counts=True)
    weights = np.zeros(count)
    weights[places] = 1 / (len(numbers) * sizes[inverse])
    return weights


def contrast_figures(
    scores: Float[np.ndarray, "row feature"],
    contrast: Contrast,
    step: int,
    rank: Rank,
    direction: Direction,
    above: float,
) -> Figures:
    """The figures of a block of features; `scores` are those of `contrast.images`, active above `above`."""
    x = scores.astype(np.float64)
    mean_a, mean_b = contrast.weights[0] @ x, contrast.weights[1] @ x
    difference = mean_a - mean_b
    units = x if contrast.differences is None else contrast.differences @ x
    deviation = np.full(x.shape[1], np.nan) if contrast.seeds is None else contrast.seeds.deviation(units)
    effect = ratio(difference, contrast.units.deviation(units))
    n, agree = len(contrast.units.rows), np.full(x.shape[1], np.nan)
    if contrast.differences is not None:
        agree = np.where(difference >= 0, units > 0, units < 0).mean(axis=0)
    stacked = np.concatenate([scores[side] for side in contrast.sides])
    label = np.arange(len(stacked))[:, None] < len(contrast.sides[0])
    chance = auroc(stacked.astype(np.float32), label)[0]
    on_b = difference < 0 if direction == "both" else np.full(len(difference), direction == "b")
    image, height = _strongest(x, contrast, on_b)
    sign = np.where(on_b, -1.0, 1.0)
    by = {"difference": sign * difference, "effect": sign * effect, "auroc": np.where(on_b, 1 - chance, chance)}[rank]
    listed = (sign * difference > 0) & (height > above)
    columns = {
        "mean_a": mean_a, "mean_b": mean_b, "difference": difference, "deviation": deviation,
        "n": np.full(len(difference), n), "effect": effect, "auroc": chance, "agree": agree,
    }  # fmt: skip
    return Figures(np.where(listed, by, np.nan), np.full(len(by), step), image, None, columns)


def _strongest(x: np.ndarray, contrast: Contrast, on_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image of the side that a feature prefers where it is most active, the lower one of equals, and its activation."""
    best = [np.unique(side) for side in contrast.sides]
    places = [side[np.argmax(x[side], axis=0)] for side in best]
    place = np.where(on_b, places[1], places[0])
    return contrast.images[place], x[place, np.arange(x.shape[1])]


def sentence(contrast: Contrast, pairs: list[tuple[Images, Images]], told: bool = True) -> str:
    """What is compared with what, whether seeds match, and what cannot be said; `told`: whether the store says its prompts."""
    count = "" if contrast.pairs == 1 else f"{contrast.pairs} pairs, "
    if contrast.differences is not None:
        n = contrast.differences.shape[0]
        left = len(np.unique(np.concatenate([s for pair in pairs for s in pair]))) - len(contrast.images)
        more = f"; {left} images of other seeds are left out" if left else ""
        lines = [f"{count}matched by seed: {n} differences of images{more}"]
    else:
        sides = [len(np.unique(side)) for side in contrast.sides]
        lines = [f"{count}{sides[0]} images on side a and {sides[1]} on side b, not matched: {contrast.unmatched}"]
    if contrast.pairs > 1:
        lines.append("auroc compares the images of all pairs together; the other figures go pair by pair")
    return "\n".join(lines + _without_deviation(contrast, told))


def _without_deviation(contrast: Contrast, told: bool) -> list[str]:
    if contrast.seeds is not None and len(contrast.seeds.rows) > len(contrast.seeds.starts):
        return []
    if not told:
        return [UNTOLD]
    if contrast.differences is None:
        return [ONE_SEED]
    if contrast.seeds is None:
        return ["the images of different seeds are of different prompts: no deviation over seeds can be given"]
    return [
        "one seed on both sides"
        + (" of a pair" if contrast.pairs > 1 else "")
        + ": no deviation over seeds can be given"
    ]
