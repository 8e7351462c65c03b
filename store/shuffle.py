"""The order of a pack's rows, and what is known of them without reading an activation.

The rows of a stream are its kept (image, step, token) slots.  A permutation drawn from (seed, split,
stream) gives each its destination; every site of the stream uses the same one.
"""

import hashlib
from functools import cached_property

import numpy as np

from store.format import to_float32
from store.reader import Store
from store.shards import GROUPS, Group, mean_name
from store.sites import Point, Stream
from store.split import Split


class Order:
    """The rows of a stream in one split: which there are, and where the shuffle sends each."""

    def __init__(self, store: Store, stream: Stream, split: Split, seed: int) -> None:
        table = store.prompts().select(["image", "split", "sigma", "text_length"])
        chosen = np.array([found == split for found in table.column("split").to_pylist()], dtype=bool)
        self.stream, self.steps = stream, store.steps
        self.member = np.full(store.n_images, -1, np.int64)
        """image -> its place among the images of the split, -1 for the other split"""
        self.member[chosen] = np.arange(chosen.sum())
        self.image = np.array(table.column("image"), np.int32)[chosen]
        sigma = np.array(table.column("sigma").to_pylist(), np.float32)
        self.sigma = sigma.reshape(len(chosen), -1)[chosen][:, list(self.steps)]
        self.text_length = np.array(table.column("text_length"), np.int32)[chosen]
        self.tokens = np.stack([store.tokens(stream, step)[chosen] for step in self.steps], axis=1)
        """(image of the split, step, slot) -> token, -1 for an empty slot"""
        self.destination = np.full(self.tokens.shape, -1, np.int64)
        """(image of the split, step, slot) -> row of the pack, -1 for an empty slot"""
        kept = self.tokens >= 0
        self.rows = int(kept.sum())
        digest = hashlib.sha256(f"granary-pack-1:{seed}:{split}:{stream}".encode()).digest()
        raw = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw(self.rows)
        self.destination[kept] = np.argsort(raw, kind="stable")  # raw output, because NumPy keeps that stream for ever

    @cached_property
    def real(self) -> np.ndarray:
        """(image, step, slot): whether a row is a real token of the prompt and not padding."""
        lengths = self.text_length[:, None, None]
        return np.asarray((self.tokens >= 0) & (self.tokens < lengths))

    def members(self, group: Group) -> np.ndarray:
        """(image, step, slot): which slots are rows of `group`."""
        kept = self.destination >= 0
        return kept if group == "all" else self.real if group == "real" else kept & ~self.real

    def provenance(self, first: int, last: int) -> dict[str, np.ndarray]:
        """The columns that say where rows `first` to `last` of the pack come from."""
        image, step, slot = np.nonzero((self.destination >= first) & (self.destination < last))
        place = self.destination[image, step, slot] - first
        sources = {
            "sigma": self.sigma[image, step],
            "image": self.image[image],
            "step": np.array(self.steps, np.int16)[step],
            "token": self.tokens[image, step, slot].astype(np.int32),
        }
        if self.stream == "txt":
            sources["real"] = self.real[image, step, slot].astype(np.uint8)
        columns = {}
        for name, source in sources.items():
            columns[name] = np.empty(last - first, source.dtype)
            columns[name][place] = source
        return columns


class Means:
    """Float64 sums of a site's rows, a step, point and group each, added chunk after chunk."""

    def __init__(self, order: Order, d_model: int) -> None:
        self.order, self.groups = order, GROUPS[order.stream]
        self.members = {group: order.members(group) for group in self.groups}
        self.sums: dict[tuple[Point, int, Group], np.ndarray] = {}
        self.d_model = d_model

    def add(self, values: np.ndarray, places: np.ndarray, step_index: int, point: Point) -> None:
        """Add activations (image, slot, d_model) of the images at `places`."""
        exact = to_float32(values)
        for group in self.groups:
            chosen = self.members[group][places, step_index]
            rows = exact.reshape(-1, self.d_model) if chosen.all() else exact[chosen]
            total = self.sums.setdefault((point, step_index, group), np.zeros(self.d_model))
            total += np.add.reduce(rows, axis=0, dtype=np.float64)

    def result(self) -> dict[str, np.ndarray]:
        """Means by name, without those of groups that have no row."""
        counts = {
            (i, group): int(self.members[group][:, i].sum())
            for i in range(len(self.order.steps))
            for group in self.groups
        }
        return {
            mean_name(point, self.order.steps[i], group): total / counts[i, group]
            for (point, i, group), total in self.sums.items()
            if counts[i, group]
        }
