"""Features of two sites or steps that belong together: the command `compare`.

    OUT/compare/img_3@1/img_5@1/matches.parquet   the best matches of each live feature of img_3@1, by each measure
    OUT/compare/img_3@1/img_5@1/summary.json      how well the two sides match
    OUT/compare/img_3@1/img_5@1/pair-12-407.png   matched features side by side on the same images
    OUT/compare/pairs.parquet, pairs.png          all pairs: how well each side is found in each other, and how well by chance
    OUT/compare/img_3@1/pairs.parquet             --of alone: the same of that side and each other

Sides share the images of the store, so what fires together can be counted over them, whatever the sites and steps.
Cosines say less than they seem to: dictionaries that were trained with one seed start from the same decoder, and keep much of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from analyze.compare.coactivation import (
    KIND_NAMES,
    MEASURES,
    Matches,
    Measure,
    Side,
    best_by_chance,
    match,
    same_decoder,
)
from analyze.compare.pairs import Pair, pair_sheet
from analyze.compare.plots import pair_map
from analyze.compare.settings import CompareSettings
from analyze.inputs import Analysis, check_output, open_analysis
from analyze.labels.book import LabelBook, name_of
from analyze.pictures.drawing import png_bytes
from analyze.pictures.examples import check_top, refuse_without_pictures
from analyze.scoring.statistics import ACTIVE_ABOVE
from store.errors import UsageError
from store.files import write_bytes, write_json
from store.sites import parse_numbers
from store.sizes import parse_size
from store.tables import write_table

DRAWN = 3
PRINTED = 5
SAME_START = 5
"""times as many mutual matches of one number as chance would give say that two dictionaries started from the same random numbers"""
FEWEST_SAME = 3
"""and so many at least: one or two are no sign"""
Chance = tuple[dict[Measure, float], dict[Measure, float]]
"""the median best match of unrelated features, there and back"""


@dataclass(frozen=True)
class Comparison:
    """What was found for one pair of sides."""

    of: str
    other: str
    folder: Path
    table: pa.Table
    """as `matches.parquet` has it"""
    summary: dict[str, Any]
    """as `summary.json` has it"""
    sheets: tuple[Path, ...]


def run(settings: CompareSettings) -> list[Comparison]:
    """Compare the chosen sides, write what was found, and print the best pairs."""
    analysis = open_analysis(_of_named_sites(settings))
    record = check_output(analysis)
    active_above = float(record.get("active_above", ACTIVE_ABOVE))
    pairs = [_alike(*pair) for pair in chosen_pairs(analysis, settings)]
    best = settings.best if settings.best is not None else DRAWN if len(pairs) == 1 else 0
    if settings.by == "cosine" and len(pairs) == 1 and same_decoder(*pairs[0]):
        raise UsageError(
            f"{pairs[0][0].name} and {pairs[0][1].name} have the same decoder: every feature's best match by cosine is itself; "
            "rank by --by correlation or --by jaccard"
        )
    if not best and settings.features is None:
        settings.refuse_if_nothing_is_drawn()
    else:
        check_top(record["top"], -(-settings.top // 2))
        refuse_without_pictures(analysis, {side.subject.name: side.subject for pair in pairs for side in pair}.values())
    found = []
    for of, other in tqdm(pairs, desc="compare", unit="pair", mininterval=0.5, disable=len(pairs) == 1):
        memory = parse_size(settings.memory)
        matches = match(of, other, settings.matches, active_above, memory)
        chance = best_by_chance(of, other, active_above, memory), best_by_chance(other, of, active_above, memory)
        found.append(_written(analysis, of, other, matches, chance, settings, best, active_above))
    if settings.other is None:
        _write_pairs(analysis.out / "compare" / ("" if settings.of is None else pairs[0][0].name), found)
    drawn = sum(len(each.sheets) for each in found)
    print(
        f"compare: {len(found)} comparison{'s' * (len(found) > 1)}, {drawn} matched pair{'s' * (drawn != 1)} drawn now "
        f"-> {analysis.out / 'compare'}"
    )
    return found


def _of_named_sites(settings: CompareSettings) -> CompareSettings:
    """The settings narrowed to the sites of --of and --with where both are named, so that no other dictionary is opened."""
    if settings.of is None or settings.other is None or settings.sites.strip() != "all":
        return settings
    names = [text.strip().rpartition("@")[0] for text in (settings.of, settings.other)]
    sites = [name.removeprefix("transcoder_").removeprefix("sae_") for name in names]
    return replace(settings, sites=",".join(sites)) if all(names) else settings


def chosen_pairs(analysis: Analysis, settings: CompareSettings) -> list[tuple[Side, Side]]:
    """The pairs of sides that the settings ask for, each once."""
    of = None if settings.of is None else _side(analysis, settings.of)
    if of is not None and settings.other is not None:
        return [(of, _side(analysis, settings.other))]
    sides = [_opened(analysis, name, step) for name in _names(analysis) for step in analysis.steps]
    if of is not None:
        return [(of, side) for side in sides if side.name != of.name]
    if len(sides) < 2:
        raise UsageError(
            f"there is only {sides[0].name} to compare: choose more with --sites and --steps, or name --of and --with"
        )
    return list(combinations(sides, 2))


def _names(analysis: Analysis) -> list[str]:
    return [subject.name for subject in analysis.subjects]


def _side(analysis: Analysis, text: str) -> Side:
    """The side that `img_3@1` names."""
    name, at, number = text.strip().rpartition("@")
    if not at or not number.isdecimal():
        raise UsageError(
            f"{text!r} names no side: write DICTIONARY@STEP, such as {_names(analysis)[0]}@{analysis.steps[0]}"
        )
    if name not in _names(analysis):
        raise UsageError(f"there is no dictionary {name} ({text}) among those chosen: {', '.join(_names(analysis))}")
    if int(number) not in analysis.steps:
        raise UsageError(
            f"there is no step {number} ({text}) among those chosen: {', '.join(map(str, analysis.steps))}"
        )
    return _opened(analysis, name, int(number))


def _opened(analysis: Analysis, name: str, step: int) -> Side:
    subject = next(subject for subject in analysis.subjects if subject.name == name)
    matrix = analysis.matrix(subject, step)
    alive = np.flatnonzero(matrix.features()["alive"].to_numpy(zero_copy_only=False))
    if not len(alive):
        raise UsageError(f"no feature of {name} is alive at step {step}: there is nothing to compare; choose others")
    return Side(subject, step, matrix, alive)


def _alike(of: Side, other: Side) -> tuple[Side, Side]:
    """Both sides over the same tokens, where one is joint and the other image or text; `UsageError` where nothing is active there."""
    pair = of.beside(other), other.beside(of)
    for side in pair:
        if not len(side.features):
            raise UsageError(
                f"no feature of {side.name} is active on {KIND_NAMES[side.kinds[0]]}, which are what it and the other side share"
            )
    return pair


def _written(
    analysis: Analysis,
    of: Side,
    other: Side,
    matches: Matches,
    chance: Chance,
    settings: CompareSettings,
    best: int,
    active_above: float,
) -> Comparison:
    folder = analysis.out / "compare" / of.name / other.name
    table = match_table(matches, same_decoder(of, other))
    table = table.replace_schema_metadata(
        {"of": of.name, "with": other.name, "images": str(of.matrix.n_images), "active_above": repr(active_above)}
    )
    pairs = best_pairs(of, other, matches, settings, max(PRINTED, best))
    summary = summarised(of, other, matches, chance) | {
        "active_above": active_above,
        "ranked_by": settings.by,
        "best": [pair.figures() for pair in pairs],
    }
    write_table(folder / "matches.parquet", table)
    write_json(folder / "summary.json", summary)
    if settings.features is not None:
        chosen = parse_numbers(settings.features, of.subject.n_features, "feature")
        drawn = [_pair_of(matches, feature, settings, of) for feature in chosen]
    else:
        drawn = pairs[:best]
    books = LabelBook.of(of.subject), LabelBook.of(other.subject)
    sheets = []
    for pair in tqdm(drawn, desc="sheets", unit="sheet", mininterval=0.5, leave=False, disable=len(drawn) < 2):
        path = folder / f"pair-{pair.of}-{pair.other}.png"
        write_bytes(path, png_bytes(pair_sheet(analysis, (of, other), pair, settings, books)))
        sheets.append(path)
    print("\n".join(_lines(of, other, summary, drawn if settings.features else pairs[:PRINTED], books, settings)))
    return Comparison(of.name, other.name, folder, table, summary, tuple(sheets))


def match_table(matches: Matches, without_cosine: bool = False) -> pa.Table:
    """One row for each live feature, measure and rank: the match, all three measures of the pair, and whether the match is mutual.

    `without_cosine`: no matches by cosine, of sides with the same decoder.
    """
    mutual = matches.mutual
    there = matches.match >= 0
    if without_cosine:
        there[MEASURES.index("cosine")] = False
    measure, row, rank = np.nonzero(there)
    order = np.lexsort((rank, measure, row))
    measure, row, rank = measure[order], row[order], rank[order]
    values = matches.values[measure, row, rank]
    columns: dict[str, Any] = {name: values[:, place].astype(np.float32) for place, name in enumerate(MEASURES)}
    return pa.table(
        {
            "feature": matches.features[row].astype(np.int32),
            "by": pa.DictionaryArray.from_arrays(measure.astype(np.int8), list(MEASURES)),
            "rank": rank.astype(np.int32),
            "match": matches.match[measure, row, rank].astype(np.int32),
            **columns,
            "mutual": mutual[measure, row, rank],
        }
    )


def best_pairs(of: Side, other: Side, matches: Matches, settings: CompareSettings, most: int) -> list[Pair]:
    """Mutual best matches of features that are active on enough images, best first, `most` of them."""
    if settings.by == "cosine" and same_decoder(of, other):
        return []
    by = MEASURES.index(settings.by)
    enough = [_active_images(side) >= settings.min_images for side in (of, other)]
    match_of, mutual = matches.match[by, :, 0], matches.mutual[by, :, 0]
    rows = np.flatnonzero(mutual & enough[0][matches.features] & enough[1][np.maximum(match_of, 0)])
    rows = rows[np.lexsort((matches.features[rows], -matches.values[by, rows, 0, by]))]
    return [Pair.of_row(matches, by, int(row)) for row in rows[:most] if matches.values[by, row, 0, by] > 0]


def _active_images(side: Side) -> np.ndarray:
    """Images on which each feature is active, over the tokens that count; of several kinds the most of one, which is no more."""
    table = side.matrix.features()
    names = ["images_active" if kind == "all" else f"images_active_{kind}" for kind in side.kinds]
    return np.asarray(np.max([table[name].to_numpy() for name in names], axis=0))


def _pair_of(matches: Matches, feature: int, settings: CompareSettings, of: Side) -> Pair:
    """A named feature with its best match."""
    row = int(np.searchsorted(matches.features, feature))
    if row == len(matches.features) or matches.features[row] != feature:
        raise UsageError(f"feature {feature} of {of.name} is active on no image, so it has no match: choose live ones")
    return Pair.of_row(matches, MEASURES.index(settings.by), row)


def summarised(of: Side, other: Side, matches: Matches, chance: Chance) -> dict[str, Any]:
    """How well the features of one side are found in the other, and unrelated ones would be, as JSON carries it."""
    first = matches.match[:, :, 0]
    trivial = same_decoder(of, other)
    measures = {
        name: _nothing() if trivial and name == "cosine" else _figures(matches, place, name, chance)
        for place, name in enumerate(MEASURES)
    }
    same, mutual = _of_one_number(matches)
    return {
        "of": {"dictionary": of.subject.name, "step": of.step, "features": of.subject.n_features, "alive": len(of.features)},
        "with": {
            "dictionary": other.subject.name, "step": other.step, "features": other.subject.n_features, "alive": len(other.features),
        },
        "images": of.matrix.n_images,
        "measures": measures,
        "same_best_by_cosine_and_correlation": None if trivial else _rounded((first[0] == first[1]).mean()),
        "mutual_by_cosine_of_one_number": None if of.subject.identity == other.subject.identity else same,
        "notes": _notes(of, other, same, mutual),
    }  # fmt: skip


def _figures(matches: Matches, place: int, name: Measure, chance: Chance) -> dict[str, Any]:
    best = matches.values[place, :, 0, place]
    best = best[np.isfinite(best)]
    back = matches.value_of_other[place]
    back = back[np.isfinite(back)]
    return {
        "median_best": _rounded(np.median(best)) if len(best) else None,
        "median_by_chance": _rounded(chance[0][name]),
        "median_best_back": _rounded(np.median(back)) if len(back) else None,
        "median_by_chance_back": _rounded(chance[1][name]),
        "share_at_least": {str(at): _rounded((best >= at).mean()) for at in (0.5, 0.7, 0.9)} if len(best) else {},
        "mutual": int(matches.mutual[place, :, 0].sum()),
    }


def _nothing() -> dict[str, Any]:
    """The figures of a measure that says nothing."""
    medians = ("median_best", "median_by_chance", "median_best_back", "median_by_chance_back")
    return {**dict.fromkeys(medians), "share_at_least": {}, "mutual": None}


def _of_one_number(matches: Matches) -> tuple[int, int]:
    """Mutual matches by cosine whose features have the same number on both sides, and all mutual ones."""
    place = MEASURES.index("cosine")
    mutual = matches.mutual[place, :, 0]
    return int((mutual & (matches.match[place, :, 0] == matches.features)).sum()), int(mutual.sum())


def _notes(of: Side, other: Side, same: int, mutual: int) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    if {of.subject.site.stream, other.subject.site.stream} == {"img", "txt"}:
        notes.append("image and text stream are spaces of their own, so their cosines say little")
    notes += [side.note for side in (of, other) if side.note]
    if same_decoder(of, other):
        notes.append("the same decoder: cosine says nothing")
    width = min(of.subject.n_features, other.subject.n_features)
    many = same >= FEWEST_SAME and same > SAME_START * mutual / width
    if many and of.subject.identity != other.subject.identity:
        notes.append(
            f"{same} of {mutual} mutual matches by cosine have the same number in both dictionaries: they started from the same random "
            "numbers, so their cosines say little; train with different --seed, or match by correlation"
        )
    return notes


def _rounded(value: Any) -> float:
    return round(float(value), 6)


def _lines(
    of: Side,
    other: Side,
    summary: dict[str, Any],
    pairs: Sequence[Pair],
    books: tuple[LabelBook, LabelBook],
    settings: CompareSettings,
) -> list[str]:
    lines = [
        f"\n{of.name} with {other.name}: {len(of.features)} and {len(other.features)} features alive, {summary['images']} images"
    ]
    for name, figures in summary["measures"].items():
        if figures["median_best"] is not None:
            lines.append(
                f"  best by {name:<12} median {figures['median_best']:.2f} (by chance {figures['median_by_chance']:.2f}), "
                f"at least 0.7 for {figures['share_at_least']['0.7']:.0%}, mutual for {figures['mutual']}"
            )
    lines += [f"  note: {note}" for note in summary["notes"]]
    if not pairs:
        lines.append(f"  no two features active on {settings.min_images} images or more are each other's best match")
    for pair in pairs:
        names = [
            name_of(side.subject, number, book)
            for side, number, book in zip((of, other), (pair.of, pair.other), books, strict=True)
        ]
        lines.append(f"  {names[0]}  and  {names[1]}:  {pair.words()}")
    return lines


def _write_pairs(folder: Path, found: Sequence[Comparison]) -> None:
    """How well each side is found in each other: the median over features of the best match, both ways, and what it is by chance."""
    rows = []
    for each in found:
        for name, figures in each.summary["measures"].items():
            for of, other, way in ((each.of, each.other, ""), (each.other, each.of, "_back")):
                medians = figures[f"median_best{way}"], figures[f"median_by_chance{way}"]
                rows.append((of, other, name, *medians))
    columns = list(zip(*rows, strict=True))
    numbers = [pa.array(column, pa.float64()) for column in columns[3:]]
    table = pa.table([*map(pa.array, columns[:3]), *numbers], ["of", "with", "by", "median_best", "median_by_chance"])
    write_table(folder / "pairs.parquet", table)
    if len({each.of for each in found}) > 1:
        write_bytes(folder / "pairs.png", pair_map(table))
