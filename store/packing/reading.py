"""Pass 1: reads units of a site into memory, each byte once, with their sums by step, point and group.

A unit is a chunk of images at one step; those without a row of the split are left out and not counted.  Its sums are taken
row after row and kept apart until all are there, then added in the order of the units: so the means depend on the store
alone, not on how much is read at once, or by whom.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from store.errors import NonFiniteError
from store.format import to_float32
from store.packing.budget import SUM_VALUES
from store.packing.plan import PackPlan
from store.packing.rows import Rows, Unit
from store.packing.sink import Advance
from store.shards import mean_name
from store.sites import Point, Site
from store.strata import CODES, GROUPS, Group


class Reading:
    """Consecutive units of a site, in memory: where each row goes, its token, its activations."""

    def __init__(
        self, plan: PackPlan, site: Site, units: tuple[int, int], room: Callable[[int], np.ndarray], advance: Advance
    ) -> None:
        """`room(bytes)` gives the memory for the activations, which is used again for the next run."""
        self.plan, self.site, self.advance = plan, site, advance
        self.rows: Rows = plan.rows[site.stream]
        every = self.rows.unit_rows.reshape(-1)
        self.numbers = np.flatnonzero(every)[units[0] : units[1]]
        self.starts = np.concatenate([[0], np.cumsum(every[self.numbers])])
        total, d_model = int(self.starts[-1]), plan.store.meta.d_model
        self.destinations = np.empty(total, np.int64)
        self.tokens = np.empty(total, np.int32)
        self.activations = columns_in(room, plan.points, total, d_model, plan.dtype)
        self.sums = np.zeros((len(self.numbers), len(plan.points), len(GROUPS[site.stream]), d_model))

    def fill(self, readers: int) -> None:
        """Read everything, `readers` units at once.  `NonFiniteError` names the first row of a unit that is not finite."""
        if readers == 1:
            for index in range(len(self.numbers)):
                self._unit(index)
            return
        with ThreadPoolExecutor(readers) as pool:
            try:
                for _ in pool.map(self._unit, range(len(self.numbers))):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _unit(self, index: int) -> None:
        chunk, step = divmod(int(self.numbers[index]), len(self.rows.steps))
        unit, span = self.rows.unit(chunk, step), slice(int(self.starts[index]), int(self.starts[index + 1]))
        self.destinations[span], self.tokens[span] = unit.destinations, unit.tokens
        for column, point in enumerate(self.plan.points):
            values = self.activations[point][span]
            self._read(chunk, step, point, unit, values)
            self.sums[index, column] = found = sums_of(values, unit.codes, self.rows.kinds)
            if not np.isfinite(found).all():
                self._refuse(step, point, unit, values)

    def _read(self, chunk: int, step: int, point: Point, unit: Unit, values: np.ndarray) -> None:
        """The kept rows of the split's images, in their order, into `values`."""
        store, images = self.plan.store, self.plan.store.meta.part_images(chunk)
        there = (len(images), self.rows.kept)
        where = (self.site, self.rows.steps[step], point, images.start, images.stop)
        if unit.kept.shape == there and unit.kept.all():
            store.read(*where, out=values.reshape(*there, -1))
        else:
            every = store.read(*where).reshape(-1, values.shape[1])
            places = self.rows.image[unit.first : unit.first + len(unit.kept)] - images.start
            slots = (places[:, None] * self.rows.kept + np.arange(self.rows.kept))[unit.kept]
            width = values.itemsize * values.shape[1]
            np.take(
                every.view(np.uint8).reshape(-1, width), slots, axis=0, out=values.view(np.uint8).reshape(-1, width),
                mode="clip",
            )  # fmt: skip
        self.advance(store.chunk_images * self.rows.kept * store.meta.row_bytes)

    def _refuse(self, step: int, point: Point, unit: Unit, values: np.ndarray) -> None:
        row = next(row for row in range(len(values)) if not np.isfinite(to_float32(values[row])).all())
        place, token = unit.row_at(row)
        image, store = int(self.rows.image[place]), self.plan.store
        raise NonFiniteError(
            f"{store.path}: {self.site} {point}, step {self.rows.steps[step]}, image {image}, token {token} is NaN or infinite; "
            f"a pack holds finite rows alone. Make part {image // store.chunk_images} again: python -m store rm "
            f"{store.path} --parts {image // store.chunk_images}, then the command that made the store"
        )


def sums_of(rows: np.ndarray, codes: np.ndarray | None, kinds: Sequence[Group]) -> np.ndarray:
    """Float64 sums (group, d_model) of `rows` (row, d_model), added row after row; those of several `kinds` apart, by `codes`."""
    parts = np.zeros((len(kinds), rows.shape[1]))
    at_once = max(SUM_VALUES // rows.shape[1], 1)
    wide = np.empty((min(at_once, len(rows)), rows.shape[1]), np.uint32)
    for first in range(0, len(rows), at_once):
        exact = _widened(rows[first : first + at_once], wide)
        for place, kind in enumerate(kinds):
            chosen = exact if codes is None else exact[codes[first : first + at_once] == CODES[kind]]
            parts[place] += np.add.reduce(chosen, axis=0, dtype=np.float64)
    if codes is None:
        return parts
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return np.stack([total, *parts])


def _widened(rows: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """What `to_float32` gives, in memory that is there already: fresh pages would cost more than the sum."""
    if rows.dtype != ml_dtypes.bfloat16:
        return to_float32(rows)
    part = wide[: len(rows)]
    np.copyto(part, rows.view(np.uint16))
    np.left_shift(part, 16, out=part)
    return part.view(np.float32)


def columns_in(
    room: Callable[[int], np.ndarray], points: Sequence[Point], rows: int, d_model: int, dtype: Any
) -> dict[Point, np.ndarray]:
    """Uninitialised activations (row, d_model) of each point, one after another in `room`."""
    each = rows * d_model * np.dtype(dtype).itemsize
    memory = room(len(points) * each)
    return {
        point: memory[index * each : (index + 1) * each].view(dtype).reshape(rows, d_model)
        for index, point in enumerate(points)
    }


class Means:
    """The means of a site, from the sums of its units, which must come in order."""

    def __init__(self, plan: PackPlan, site: Site) -> None:
        self.plan, self.site, self.rows = plan, site, plan.rows[site.stream]
        shape = (len(plan.points), len(GROUPS[site.stream]), plan.store.meta.d_model)
        self.totals = np.zeros((len(self.rows.steps), *shape))
        self._steps = iter(np.flatnonzero(self.rows.unit_rows.reshape(-1)) % len(self.rows.steps))

    def add(self, sums: np.ndarray) -> None:
        """Add the sums (unit, point, group, d_model) of the next units that have rows."""
        for unit in sums:
            self.totals[next(self._steps)] += unit

    def result(self) -> Mapping[str, np.ndarray]:
        """Means by name, without those of groups that have no row."""
        return {
            mean_name(point, step, group): self.totals[i, p, g] / count
            for i, step in enumerate(self.rows.steps)
            for p, point in enumerate(self.plan.points)
            for g, group in enumerate(GROUPS[self.site.stream])
            if (count := self.rows.count(i, group))
        }
