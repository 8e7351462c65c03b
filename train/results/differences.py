"""In what dictionaries that stand side by side differ: what sets how sparse they are, other settings, and seeds."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from train.dictionaries.dictionary import Dictionary
from train.recipe import Recipe
from train.results.plots import short_number

SEEDS = ("seed", "order_seed")
SPARSITY = ("k", "l1")
_SHOWN_ANYWAY = ("kind", "expansion", *SPARSITY)
"""settings that have a column of their own, or stand in the name"""
SETTINGS = (*(f.name for f in fields(Recipe) if f.name not in _SHOWN_ANYWAY), "batch", "order_seed")
"""settings that are shown where they differ between dictionaries of one site and kind"""


def sparsity_of(dictionary: Dictionary) -> str:
    """`k 64`, `l1 3e-4`, `k 64, l1 1e-4`: what sets how sparse a dictionary is; empty where nobody knows."""
    k, l1 = dictionary.config.k, setting(dictionary, "l1")
    words = [] if k is None else [f"k {k:,}"]
    if l1 is not None and (l1 or k is None):
        words.append(f"l1 {short_number(l1)}")
    return ", ".join(words)


def setting(dictionary: Dictionary, name: str) -> Any:
    """What a dictionary was trained with; None where it does not say."""
    value = (dictionary.config.training or {}).get(name)
    return tuple(value) if isinstance(value, list) else value


def varying(dictionaries: Sequence[Dictionary]) -> list[str]:
    """The settings that differ between dictionaries of one site and kind."""
    found = []
    for name in SETTINGS:
        seen: dict[tuple[Any, str], Any] = {}
        values = [((each.site, each.config.kind), setting(each, name)) for each in dictionaries]
        if any(seen.setdefault(peers, value) != value for peers, value in values):
            found.append(name)
    return found


def shown(value: Any) -> str:
    """A setting as a table has it; `-` for none."""
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else short_number(value) if isinstance(value, float) else str(value)


def seeds_apart(dictionaries: Sequence[Dictionary]) -> list[list[int]]:
    """The places of those that nothing but their seeds tells apart, two and more together; measured on the same rows."""
    found: dict[str, list[int]] = {}
    for place, each in enumerate(dictionaries):
        if each.config.training is not None:
            about, metrics = each.config.to_json(), each.metrics or {}
            about["training"] = {key: value for key, value in each.config.training.items() if key not in SEEDS}
            measured = metrics.get("pack"), metrics.get("targets")
            found.setdefault(json.dumps([about, measured], sort_keys=True), []).append(place)
    return [places for places in found.values() if len(places) > 1]
