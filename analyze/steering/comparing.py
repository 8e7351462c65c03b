"""How far each variant lies from plain: the table of every shot, and its medians by variant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from analyze.features.clip import Clip
from analyze.steering.distances import distances, typical
from analyze.steering.experiment import ALL, Variant
from analyze.steering.judging import VERDICTS, Rate, rates, readings, verdicts
from analyze.steering.results import Results

FACTS = pa.schema(
    [
        ("shot", pa.int64()), ("image", pa.int64()), ("prompt", pa.string()), ("seed", pa.int64()), ("number", pa.int64()),
        ("variant", pa.string()), ("strength", pa.float64()), ("picture", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """What came of an experiment."""

    table: pa.Table
    """`FACTS`, then a column a distance, null for plain, and what the judge reads"""
    distances: tuple[str, ...]
    """names of the columns of distances"""

    rates: tuple[Mapping[str, Rate], ...]
    """of each variant what the judge says: the shares that changed, lost objects, kept what; empty without the judge"""

    def of(self, number: int) -> pa.Table:
        """The rows of one variant, 0 for plain."""
        return self.table.filter(pa.compute.equal(self.table["number"], number))


def judged(asked: str) -> tuple[str | None, str | None]:
    """Attribute and value of `colour=red`; the value None for `colour`, and both None for `all`."""
    attribute, _, value = (word.strip() for word in asked.partition("="))
    return (None, None) if attribute == ALL else (attribute, value or None)


def compare(results: Results, clip: Clip | None) -> Compared:
    """A row a shot and variant, by shot, with the distances of its picture and latents from plain; batch by batch."""
    rows: list[dict[str, Any]] = []
    names: tuple[str, ...] = ()
    asked = results.experiment.judge
    found: list[list[pa.Table]] = [[] for _ in results.experiment.variants]
    for batch in results.batches:
        shots = results.shots(batch)
        plain = [results.picture(shot, 0) for shot in shots]
        plain_latents = results.latents(batch, 0)
        before = readings(plain) if asked is not None else []
        rows += [_facts(results, shot, 0) for shot in shots]
        for number in range(1, len(results.files)):
            changed = [results.picture(shot, number) for shot in shots]
            measured = distances(plain, changed, plain_latents, results.latents(batch, number), clip)
            names = tuple(measured)
            said = verdicts(before, readings(changed), *judged(asked)) if asked is not None else None
            if said is not None:
                found[number - 1].append(said)
            judgements = said.to_pylist() if said is not None else [{}] * len(shots)
            for place, shot in enumerate(shots):
                values = {name: float(values[place]) for name, values in measured.items()}
                rows.append({**_facts(results, shot, number), **values, **judgements[place]})
    rows.sort(key=lambda row: (row["shot"], row["number"]))
    schema = [*FACTS, *((name, pa.float64()) for name in names)]
    schema += [each.with_nullable(True) for each in VERDICTS] if asked is not None else []
    told = tuple(rates(pa.concat_tables(each)) for each in found) if asked is not None else ()
    return Compared(pa.Table.from_pylist(rows, pa.schema(schema)), names, told)


def _facts(results: Results, shot: int, number: int) -> dict[str, Any]:
    experiment = results.experiment
    drawn = experiment.shots[shot]
    return {
        "shot": shot, "image": drawn.image, "prompt": drawn.prompt, "seed": drawn.seed, "number": number,
        "variant": experiment.names[number], "strength": experiment.variants[number - 1].strength if number else None,
        "picture": results.picture_name(shot, number),
    }  # fmt: skip


def medians(compared: Compared, number: int) -> Mapping[str, float]:
    """The median of every distance over the shots of one variant."""
    rows = compared.of(number)
    return typical({name: np.asarray(rows[name].to_numpy(), np.float64) for name in compared.distances})


def distance_lines(results: Results, compared: Compared) -> list[list[str]]:
    """The medians of the distances as cells: a head, then a line a variant."""
    lines = [["variant", "strength", "shots", *compared.distances]]
    for number, variant in enumerate(results.experiment.variants, 1):
        found = medians(compared, number)
        cells = [f"{found[name]:.4g}" for name in compared.distances]
        lines.append([variant.name, _strength(variant), str(len(results.experiment.shots)), *cells])
    return _without_strengths(lines)


def judge_lines(results: Results, compared: Compared) -> list[list[str]]:
    """What the judge says as cells: a head, then a line a variant: pictures asked about, share that changed, lost and kept what."""
    columns = list(dict.fromkeys(name for each in compared.rates for name, rate in each.items() if rate.n))
    lines = [["variant", "strength", "asked", *(name.replace("_", " ") for name in columns)]]
    for variant, found in zip(results.experiment.variants, compared.rates, strict=True):
        asked = max((rate.n for rate in found.values()), default=0)
        lines.append([variant.name, _strength(variant), str(asked), *(str(found[name]) for name in columns)])
    return _without_strengths(lines)


def _strength(variant: Variant) -> str:
    return "" if variant.strength is None else f"{variant.strength:g}"


def _without_strengths(lines: list[list[str]]) -> list[list[str]]:
    """The lines without the column of strengths where no variant has one, or where its name says it."""
    if any(line[1] and line[0] != f"strength {line[1]}" for line in lines[1:]):
        return lines
    return [[line[0], *line[2:]] for line in lines]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The cells in columns, names to the left and numbers to the right, as a terminal shows them."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def padded(line: Sequence[str]) -> str:
        name, *numbers = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        return "  ".join([name.strip().ljust(widths[0]), *numbers])

    return "\n".join(f"  {padded(line)}" for line in lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The cells as a Markdown table."""
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))
