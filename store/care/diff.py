"""`python -m store diff A B`: where two stores differ.

1. Two finished stores of one id were committed equal; nothing more is read (`verify` says whether the files still are so).
2. The metadata are compared leaf by leaf; what only one store has is named.
3. The commits are compared by the hashes that they list: no chunk is read.
4. With `--values`, arrays that differ are read in both, a chunk at a time, and their differences measured.

What the commits say is taken for what lies there: `verify` checks that.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro
from tqdm import tqdm

from store.care.findings import Costs, costs_of, costs_text, spans
from store.care.packs import refuse_pack
from store.errors import MismatchError
from store.files import json_bytes
from store.format import part_name, to_float32
from store.opening import leaves, worth_naming
from store.places import Place, place_of
from store.reader import Store
from store.sites import Point, Site

Key = tuple[Site, int, Point]
OF_LAYOUT = ("chunk_images", "store_dtype", "codec")
"""metadata by which equal values lie in files of different bytes; the kept tokens of a stream are another"""
OF_VALUES = ("activations", "scales")
SHOWN = 20


BY_SEAL = ", by their seals: no chunk was read; python -m store verify says whether the files are still whole"


@dataclass(frozen=True)
class DiffSettings:
    """Say where two stores differ."""

    a: Annotated[str, tyro.conf.Positional]
    """one store, a folder or a URL"""
    b: Annotated[str, tyro.conf.Positional]
    """the other one"""
    values: bool = False
    """read the arrays that differ, and say by how much"""


@dataclass(frozen=True)
class Gap:
    """How far one array is apart in two stores."""

    greatest: float
    """greatest absolute difference; infinite where one store holds a NaN and the other a number"""
    relative_rms: float
    """RMS of the difference over the RMS of A's values"""
    images: int
    """how many both have, and were compared"""


@dataclass
class Difference:
    """Where two stores differ; all empty where they do not."""

    metadata: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """dotted key -> the values in A and in B"""
    only: dict[str, dict[str, str]] = field(default_factory=lambda: {"A": {}, "B": {}})
    """what one store alone has: sites, steps, points, traces, images, parts"""
    parts: dict[int, list[Costs]] = field(default_factory=dict)
    """part -> what differs in it, of what both have"""
    incomparable: str | None = None
    """why the files of the two stores cannot be compared by their hashes"""
    values: dict[Key, Gap | str] = field(default_factory=dict)
    """with `--values`: how far an array is apart, or why that cannot be said"""
    columns: list[str] = field(default_factory=list)
    """with `--values`: columns of the prompt tables that differ"""

    by_seal: bool = False
    """whether both have one id: what was committed is equal, whatever happened to the files since"""

    def __bool__(self) -> bool:
        return bool(self.metadata or any(self.only.values()) or self.parts)


def run(settings: DiffSettings) -> Difference:
    """Print where the stores differ; `MismatchError` when they do."""
    found = diff(settings.a, settings.b, settings.values)
    print(_text(found, settings), flush=True)
    if found:
        raise MismatchError(f"{settings.a} and {settings.b} differ")
    return found


def diff(a: str | Path | Place, b: str | Path | Place, values: bool = False) -> Difference:
    """Where two stores differ; either may be unfinished.  Errors: `ForeignError`, `DamagedError`, `UnreachableError`."""
    for place in (a, b):
        refuse_pack(place_of(place), "diff")
    first, second = Store.open(a, unfinished=True), Store.open(b, unfinished=True)
    found = Difference()
    if first.finished and second.finished and first.id == second.id:
        found.by_seal = True
        if not values:
            return found
    _Diff(first, second, found).compare(values)
    return found


class _Diff:
    """The comparison of two stores."""

    def __init__(self, a: Store, b: Store, found: Difference) -> None:
        self.a, self.b, self.found = a, b, found
        self.sites = [site for site in a.sites if site in b.sites]
        self.steps = [step for step in a.steps if step in b.steps]
        self.points = [point for point in a.points if point in b.points]
        self.keys = [(site, step, point) for site in self.sites for step in self.steps for point in self.points]
        self.same_arrays = a.sites == b.sites and a.steps == b.steps and a.points == b.points
        self.images = min(a.n_images, b.n_images)
        self.parts = sorted(set(a.committed_parts) & set(b.committed_parts))

    def compare(self, values: bool) -> None:
        found = self.found
        here, there = (leaves(json.loads(json_bytes(store.meta.attributes()))) for store in (self.a, self.b))
        odd = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
        found.metadata = {key: (here.get(key), there.get(key)) for key in worth_naming(odd)}
        self._find_only()
        tokens = tuple(f"tokens.{stream}." for stream in self.a.meta.streams if stream in self.b.meta.streams)
        layout = [key for key in odd if key in OF_LAYOUT or key.startswith(tokens)]
        if layout:
            found.incomparable = f"they differ in {', '.join(layout)}: equal values lie in files of different bytes"
        else:
            for part in self.parts:
                if differing := self._part(part):
                    found.parts[part] = differing
        if values:
            self._measure()

    def _find_only(self) -> None:
        for name, one, other in (("A", self.a, self.b), ("B", self.b, self.a)):
            only = self.found.only[name]
            for what in ("sites", "steps", "points"):
                if more := [each for each in getattr(one, what) if each not in getattr(other, what)]:
                    only[what] = ", ".join(map(str, more))
            if one.traced is not None and other.traced is None:
                only["traces"] = f"of {one.traced.text()}"
            if one.n_images > other.n_images:
                only["images"] = f"{other.n_images} to {one.n_images - 1}"
            if one.chunk_images == other.chunk_images:
                more_parts = set(one.committed_parts) - set(other.committed_parts)
                known = [part for part in more_parts if part < other.meta.n_parts]
                if known:
                    only["committed parts"] = spans([(part, part) for part in known], "part").split(" ", 1)[1]

    def _part(self, part: int) -> list[Costs]:
        """What differs in a part, of what both stores have."""
        here, there = self.a.commit(part), self.b.commit(part)
        if here == there:
            return []
        if here.get("mixed") != there.get("mixed"):
            self.found.metadata[f"{part_name(part)}.mixed"] = here.get("mixed"), there.get("mixed")
        images = self.a.meta.part_images(part)
        span = (images.start, min(images.stop, self.images) - 1)
        both = [name for name in here["files"] if name in there["files"]]
        odd = [costs_of(name, None, span) for name in both if here["files"][name] != there["files"][name]]
        costs = dict.fromkeys(each for each in odd if each.what != "statistics" or self.same_arrays)
        if any(_leaf(here, key) != _leaf(there, key) for key in self.keys):
            costs[Costs("statistics", span)] = None
        return list(costs)

    def _measure(self) -> None:
        """Read what differs in both stores, and measure how far it is apart."""
        wanted = {key: self._ranges(key) for key in self.keys}
        images = sum(last - first for ranges in wanted.values() for first, last in ranges)
        with tqdm(total=images, unit="image", unit_scale=True, desc="diff", mininterval=0.5) as bar:
            for key, ranges in wanted.items():
                if ranges:
                    self.found.values[key] = self._obstacle(key) or self._gap(key, ranges, bar.update)
        if self.parts and len(self.parts) == self.a.meta.n_parts == self.b.meta.n_parts:
            here, there = (store.prompts().slice(0, self.images) for store in (self.a, self.b))
            names = dict.fromkeys([*here.column_names, *there.column_names])
            self.found.columns = [name for name in names if not _same_column(here, there, name)]

    def _ranges(self, key: Key) -> list[tuple[int, int]]:
        """The images of an array that both have, and that may differ."""
        if self.found.incomparable is None:
            place = (str(key[0]),), (key[1],), (key[2],)
            of_part = {
                part: [each for each in costs if each.what in OF_VALUES] for part, costs in self.found.parts.items()
            }
            odd = (
                each for costs in of_part.values() for each in costs if (each.sites, each.steps, each.points) == place
            )
            return sorted({(each.images[0], each.images[1] + 1) for each in odd if each.images})
        have = [_committed(store, self.images) for store in (self.a, self.b)]
        step = max(self.a.chunk_images, self.b.chunk_images)
        ranges = ((first, min(first + step, self.images)) for first in range(0, self.images, step))
        return [each for each in ranges if all(set(range(*each)) <= images for images in have)]

    def _obstacle(self, key: Key) -> str | None:
        """Why two arrays cannot be compared value by value."""
        site, step, _ = key
        if self.a.meta.d_model != self.b.meta.d_model:
            return f"{self.a.meta.d_model} channels in A and {self.b.meta.d_model} in B"
        policies = [store.meta.tokens[site.stream] for store in (self.a, self.b)]
        if policies[0].kept != policies[1].kept:
            return f"{policies[0].kept} tokens are kept in A and {policies[1].kept} in B"
        for first, last in () if all(policy.all_kept for policy in policies) else self._ranges(key):
            here, there = (store.tokens(site.stream, step, first, last) for store in (self.a, self.b))
            if not np.array_equal(here, there):
                return "other tokens are kept in A than in B"
        return None

    def _gap(self, key: Key, ranges: list[tuple[int, int]], advance: Callable[[int], object]) -> Gap:
        greatest = squares = of_a = 0.0
        for first, last in ranges:
            here, there = (to_float32(store.read(*key, first, last)).astype(np.float64) for store in (self.a, self.b))
            empty = np.isnan(here) & np.isnan(there)
            apart = np.where(empty, 0.0, np.abs(here - there))
            apart = np.where(np.isnan(apart), math.inf, apart)
            greatest = max(greatest, float(apart.max(initial=0.0)))
            squares += float(np.square(apart).sum())
            of_a += float(np.square(np.nan_to_num(here)).sum())
            advance(last - first)
        relative = math.sqrt(squares / of_a) if of_a else (math.inf if squares else 0.0)
        return Gap(greatest, relative, sum(last - first for first, last in ranges))


def _leaf(commit: dict[str, Any], key: Key) -> Any:
    return commit["statistics"][str(key[0])][str(key[1])][key[2]]


def _committed(store: Store, images: int) -> set[int]:
    return {image for part in store.committed_parts for image in store.meta.part_images(part) if image < images}


def _same_column(a: pa.Table, b: pa.Table, name: str) -> bool:
    return name in a.column_names and name in b.column_names and bool(a.column(name).equals(b.column(name)))


def _text(found: Difference, settings: DiffSettings) -> str:
    lines = [f"A is {settings.a}", f"B is {settings.b}"]
    for key, (here, there) in list(found.metadata.items())[:SHOWN]:
        lines.append(f"metadata: {key} is {_short(here)} in A and {_short(there)} in B")
    if len(found.metadata) > SHOWN:
        lines.append(f"metadata: and {len(found.metadata) - SHOWN:,} more keys")
    for name, only in found.only.items():
        lines += [f"only in {name}: {what} {which}" for what, which in only.items()]
    if found.incomparable is not None:
        lines.append(f"files: not compared; {found.incomparable}{'' if found.values else ' (--values reads them)'}")
    if found.parts:
        costs = costs_text((each for costs in found.parts.values() for each in costs), SHOWN)
        lines.append(f"files: {spans([(part, part) for part in found.parts], 'part')}: {costs}")
    lines += [
        f"values: {site} step {step} {point}: {_gap_text(gap)}" for (site, step, point), gap in found.values.items()
    ]
    if found.columns:
        lines.append(f"values: the prompt tables differ in {', '.join(found.columns)}")
    return "\n".join([*lines, "A and B differ" if found else f"A and B are equal{BY_SEAL if found.by_seal else ''}"])


def _gap_text(gap: Gap | str) -> str:
    if isinstance(gap, str):
        return f"not compared: {gap}"
    if gap.greatest == 0:
        return f"equal in {gap.images:,} images"
    return f"greatest difference {gap.greatest:.4g}, relative RMS {gap.relative_rms:.3g}, over {gap.images:,} images"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
