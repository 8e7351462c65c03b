"""What `guided` leaves in OUT.

OUT/run.json               what made it: store, dictionaries, truth table, settings, versions; features and pictures of every value
OUT/values/red.parquet     a row a judged picture and variant: what the judge reads in it, plain and changed (`judging.VERDICTS`)
OUT/values/red.json        the circuit, the features of every arm, and on which pictures which strengths were tried
OUT/values/red.png         some of the pictures side by side
OUT/rates.parquet          a row a value and variant, then the variants over all values: shares, with n and 95 % intervals
OUT/summary.md             the same to read
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from analyze.guided.arms import ARMS
from analyze.steering.judging import VERDICTS, Rate, rates
from store.sizes import many

ALL = "all"
"""what the rows over every value are called"""
FACTS = pa.schema(
    [
        pa.field("value", pa.string(), nullable=False),
        pa.field("image", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("own_strength", pa.bool_(), nullable=False),
        pa.field("strength", pa.float64(), nullable=False),
        pa.field("features", pa.int32(), nullable=False),
    ]
)
PICTURES = pa.schema([*FACTS, *VERDICTS])
RATES = pa.schema(
    [
        pa.field("value", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("own_strength", pa.bool_(), nullable=False),
        pa.field("strength", pa.float64()),  # null over values whose strengths differ
        pa.field("features", pa.float64(), nullable=False),  # how many, mean over values
        pa.field("measure", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("share", pa.float64()),
        pa.field("low", pa.float64(), nullable=False),
        pa.field("high", pa.float64(), nullable=False),
    ]
)
GOAL_CHANGED, GOAL_KEPT = 0.7, 0.8
"""shares of pictures from which on a value counts as suppressed, and another attribute as left alone"""


def kept_of(attribute: str) -> tuple[str, ...]:
    """What must stay when an attribute is to change."""
    return tuple(f"kept_{name}" for name in ("shape", "colour", "position") if name != attribute)


def measured(found: pa.Table, attribute: str) -> dict[str, Rate]:
    """The judge's rates of some pictures, and `clean`: changed, and nothing else that must stay was."""
    asked = found.filter(found["asked"])
    held = asked["changed"].to_pylist()
    for name in kept_of(attribute):
        held = [bool(one) and two for one, two in zip(held, asked[name].to_pylist(), strict=True)]
    return {"clean": Rate(sum(held), len(held)), **rates(found)}


def reached(found: Mapping[str, Rate], attribute: str) -> bool:
    """Whether the value is changed in 70 % of the pictures and shape and position (say) are kept in 80 %."""
    return found["changed"].share >= GOAL_CHANGED and all(found[name].share >= GOAL_KEPT for name in kept_of(attribute))


def best_strength(tried: Mapping[float, Mapping[str, Rate]]) -> float:
    """The strength with most clean changes, by which arms are compared too; of equals the smallest."""
    return max(sorted(tried, key=abs), key=lambda strength: _clean(tried[strength]))


def edge_of(tried: Mapping[float, Mapping[str, Rate]]) -> str | None:
    """What is wrong with the best strength: `none` where no strength gives a clean change, `least` or `greatest` at an end; else None."""
    best, ranked = best_strength(tried), sorted(tried, key=abs)
    if _clean(tried[best]) == 0:
        return "none"
    if len(ranked) > 1 and best in (ranked[0], ranked[-1]):
        return "least" if best == ranked[0] else "greatest"
    return None


def _clean(found: Mapping[str, Rate]) -> float:
    return found["clean"].share if found["clean"].n else 0.0


def edges_said(abouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is to be known of strengths of their own, from the values' JSON files: lines, none where there is nothing to say."""
    found: dict[str, list[str]] = {"none": [], "least": [], "greatest": []}
    for about in abouts:
        for arm, own in about["own_strengths"].items():
            if own["edge"] is not None:
                found[own["edge"]].append(f"{about['value']} {arm} ({own['strength']:g})")
    heads = {
        "none": "no strength of --own-strengths changed a tuning picture cleanly",
        "least": "best at the least of --own-strengths, a smaller one may do better",
        "greatest": "best at the greatest of --own-strengths, a greater one may do better",
    }
    return [f"{heads[edge]}: {', '.join(cases)}" for edge, cases in found.items() if cases]


def rates_table(tables: Sequence[pa.Table], attribute: str) -> pa.Table:
    """A row a value, variant and measure; then those over all values, where there are several."""
    whole = pa.concat_tables(tables)
    groups = [(table, table["value"][0].as_py()) for table in tables] + ([(whole, ALL)] if len(tables) > 1 else [])
    rows: list[dict[str, Any]] = []
    for table, value in groups:
        for own in (False, True):
            for arm in ARMS:
                mine = table.filter(pc.and_(pc.equal(table["arm"], arm), pc.equal(table["own_strength"], own)))
                if len(mine):
                    rows += _rows(mine, {"value": value, "arm": arm, "own_strength": own}, attribute)
    return pa.Table.from_pylist(rows, schema=RATES)


def _rows(mine: pa.Table, facts: dict[str, Any], attribute: str) -> list[dict[str, Any]]:
    strengths = set(mine["strength"].to_pylist())
    sizes = {row["value"]: row["features"] for row in mine.select(["value", "features"]).to_pylist()}
    facts |= {
        "strength": strengths.pop() if len(strengths) == 1 else None,
        "features": sum(sizes.values()) / len(sizes),
    }
    return [
        facts
        | {"measure": name, "count": rate.count, "n": rate.n, "share": rate.share if rate.n else None}
        | dict(zip(("low", "high"), rate.interval, strict=True))
        for name, rate in measured(mine, attribute).items()
    ]


def lines_of(table: pa.Table, attribute: str) -> list[list[str]]:
    """The rates as cells: a head, then a line a value and variant."""
    kept = kept_of(attribute)
    measures = ("changed", *kept, "clean", "lost")
    head = [attribute, "intervened on", "features", "strength", "pictures", "changed"]
    lines = [[*head, *(name.replace("kept_", "") + " kept" for name in kept), "all of these", "objects lost"]]
    found: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for row in table.to_pylist():
        entry = found.setdefault((row["value"], row["arm"], row["own_strength"]), {"facts": row})
        entry[row["measure"]] = Rate(row["count"], row["n"])
    for (value, arm, own), entry in found.items():
        facts = entry["facts"]
        strength = "its own each" if facts["strength"] is None else f"{facts['strength']:g}"
        lines.append(
            [
                value,
                arm + (", own strength" if own else ""),
                f"{facts['features']:.3g}",
                strength,
                str(entry["changed"].n),
            ]
            + [str(entry[name]) for name in measures]
        )
    return lines


def verdict_of(table: pa.Table, attribute: str) -> str:
    """Which arm changed the value in most pictures without changing anything else, over all values; one sentence."""
    overall = table.filter(pc.equal(table["value"], ALL if ALL in table["value"].to_pylist() else table["value"][0]))
    clean = overall.filter(pc.equal(overall["measure"], "clean")).to_pylist()
    clean.sort(key=lambda row: -(row["share"] or 0.0))  # of equals the first stays the first
    top = clean[0]["share"] or 0.0
    beyond = [row for row in clean if row["arm"] != clean[0]["arm"]]
    sure = all(row["high"] < clean[0]["low"] for row in beyond)
    equal = [row for row in clean if (row["share"] or 0.0) == top]
    best = [row for place, row in enumerate(equal) if place == 0 or row["arm"] != equal[0]["arm"]]
    others = [f"{_named(row)} {100 * (row['share'] or 0):.0f} %" for row in clean if row not in best]
    kept = " and ".join(word.removeprefix("kept_") for word in kept_of(attribute))
    if len(best) > 1:
        wins = f"{' and '.join(map(_named, best))} do equally well"
    else:
        wins = f"{_named(best[0])} {'wins' if sure else 'leads, with overlapping 95 % intervals'}"
    return (
        f"{wins}: {100 * top:.0f} % of {many(best[0]['n'], 'picture')} have another {attribute} and the same {kept}"
        + (f"; {', '.join(others)}" if others else "")
    )


def goals_of(table: pa.Table, attribute: str) -> str:
    """How many values each arm changed in 70 % of the pictures with 80 % keeping shape (say) and 80 % position; one sentence."""
    found: dict[str, dict[str, dict[str, Rate]]] = {}
    for row in table.to_pylist():
        if row["value"] != ALL:
            arm = found.setdefault(_named(row), {})
            arm.setdefault(row["value"], {})[row["measure"]] = Rate(row["count"], row["n"])
    kept = " and ".join(word.removeprefix("kept_") for word in kept_of(attribute))
    said = [
        f"{arm} {sum(reached(rates, attribute) for rates in values.values())} of {many(len(values), 'value')}"
        for arm, values in found.items()
    ]
    return (
        f"changed in {GOAL_CHANGED:.0%} or more of the pictures, with {kept} each kept in {GOAL_KEPT:.0%} or more: "
        f"{', '.join(said)}"
    ).replace("%", " %")


def _named(row: Mapping[str, Any]) -> str:
    return str(row["arm"]) + (" at its own strength" if row["own_strength"] else "")
