"""What a pack is to be: its sites, points, rows, shards and bytes, and the settings that make it this pack and no other."""

import re
from functools import cached_property
from typing import Any

import numpy as np

from store.errors import DamagedError, UsageError
from store.files import json_bytes, sha256_bytes
from store.packing.rows import Rows
from store.packing.settings import PackSettings
from store.packing.shard import row_bytes
from store.reader import Store
from store.shards import weights_name
from store.shuffle import SCHEME
from store.sites import POINTS, Point, Site, Stream, choose_sites
from store.strata import Group, kinds_of

WEIGHTS_FILE = r"sha256-[0-9a-f-]+\.safetensors"
MANIFEST_GROUPS: dict[Stream, tuple[Group, ...]] = {"img": (), "txt": ("real",), "joint": kinds_of("joint")}
"""whose rows the manifest counts, beside all of them"""


class PackPlan:
    """A pack of a store under settings; its `content` decides every byte of it."""

    def __init__(self, store: Store, settings: PackSettings) -> None:
        self.store, self.settings = store, settings
        wanted = choose_sites(settings.sites, store.sites, str(settings.store))
        self.sites = tuple(site for site in store.sites if site in wanted)
        self.points = self._points()
        self.weights = self._weights()
        splits = store.prompt_columns("split").column("split").to_pylist()
        if settings.split not in splits:
            raise UsageError(
                f"none of the {len(splits)} images of {settings.store} is in the split {settings.split!r} (5 % of all "
                "prompts are val, by a hash of their text): harvest more prompts"
            )
        self.dtype = np.dtype(store.meta.carrier.logical).type
        self.content = {
            "store": store.id, "model": store.meta.model, "split": settings.split, "seed": settings.seed, "order": SCHEME,
            "shard_mb": settings.shard_mb, "points": list(self.points), "sites": [str(site) for site in self.sites],
            "steps": list(store.steps), "d_model": store.meta.d_model, "dtype": np.dtype(self.dtype).name,
            "targets": store.meta.targets, "weights": self.weights,
        }  # fmt: skip
        if (
            "joint" in self.streams
        ):  # before kinds were told apart there, a joint pack had neither column nor means of them
            self.content["strata"] = {"joint": list(kinds_of("joint"))}
        self.key = sha256_bytes(json_bytes(self.content))

    def _points(self) -> tuple[Point, ...]:
        """What becomes columns; `UsageError` for a point that the store does not hold."""
        store, asked = self.store, self.settings.points
        if asked == "all":
            return tuple(point for point in POINTS if point in store.points)
        missing = [point for point in asked.split(",") if point not in store.points]
        if missing:
            has = f"{store.path} has no {', '.join(missing)}; it has {', '.join(store.points)}"
            if store.recomputed:
                has += " and the MLPs that mlp_out is recomputed by (train does that, from a pack of mlp_in)"
            raise UsageError(f"{has}: use --points {','.join(store.points)}")
        return tuple(point for point in POINTS if point in asked.split(","))

    def _weights(self) -> dict[str, str]:
        """Site -> file of its MLP in `weights/`, for recomputed targets."""
        if not self.store.recomputed:
            return {}
        files = self.store.meta.weights.get("files", {})
        odd = [site for site in map(str, self.sites) if not re.fullmatch(WEIGHTS_FILE, str(files.get(site)))]
        if odd:  # a name that leads out of the pack's folder is among what is refused
            raise DamagedError(
                f"{self.store.path} says that mlp_out is recomputed, but names no MLP of {', '.join(odd)}: "
                "harvest it again, or take another copy"
            )
        return {str(site): files[str(site)] for site in self.sites}

    @cached_property
    def weights_bytes(self) -> dict[str, int]:
        """Name in the pack and length of the MLPs that are copied."""
        names = {weights_name(file): self.store.place for file in sorted(set(self.weights.values()))}
        return {name: place.size(name) or 0 for name, place in names.items()}

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        return tuple(dict.fromkeys(site.stream for site in self.sites))

    @cached_property
    def rows(self) -> dict[Stream, Rows]:
        """The rows of each stream."""
        return {stream: Rows(self.store, stream, self.settings.split, self.settings.seed) for stream in self.streams}

    @cached_property
    def cuts(self) -> dict[Stream, np.ndarray]:
        """Where shards begin, and at last where they end: equal shards, but for one row."""
        return {stream: self._cuts(stream) for stream in self.streams}

    def _cuts(self, stream: Stream) -> np.ndarray:
        rows = self.rows[stream].rows
        count = max(-(-rows * self.row_bytes(stream) // (self.settings.shard_mb * 10**6)), 1)
        return np.array([index * rows // count for index in range(count + 1)], np.int64)

    def shards(self, site: Site) -> int:
        """How many shards a site has."""
        return len(self.cuts[site.stream]) - 1

    def row_bytes(self, stream: Stream) -> int:
        """Bytes of a row in a shard."""
        return row_bytes(stream, self.points, self.store.meta.d_model, self.dtype)

    def site_bytes(self, site: Site) -> int:
        """Bytes of the shards of a site."""
        return self.rows[site.stream].rows * self.row_bytes(site.stream)

    def read_bytes(self, stream: Stream) -> int:
        """Bytes of activations that are read of a site: all chunks that hold an image of the split."""
        meta = self.store.meta
        chunks = int((self.rows[stream].unit_rows.sum(axis=1) > 0).sum())
        chunk = meta.chunk_images * meta.tokens[stream].kept * meta.row_bytes
        return chunks * chunk * len(meta.steps) * len(self.points)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of the pack, but for headers and means."""
        return sum(map(self.site_bytes, self.sites)) + sum(self.weights_bytes.values())

    def streams_content(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of each stream."""
        return {
            stream: {"rows": rows.rows, "shards": np.diff(self.cuts[stream]).tolist(), "images": len(rows.image)}
            | {f"{group}_rows": rows.rows_of(group) for group in MANIFEST_GROUPS[stream]}
            for stream, rows in self.rows.items()
        }
