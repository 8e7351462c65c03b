"""Rows of a store's activations, at any point: mlp_out is read, or computed from mlp_in where the store leaves it out."""

import threading
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Int

from store import Store
from store.sites import Point, Site
from train.rows.recompute import SiteMLP, mlp_of, points_given
from train.rows.tensors import to_torch

Chosen: TypeAlias = Bool[np.ndarray, "image token"] | tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]
"""which rows: a mask, or the image (counted from the first) and the slot of each"""


class StoreRows:
    """Reads rows of one store, several threads at once if need be; holds the MLP of the site that was last computed."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._mlp: tuple[Site, SiteMLP] | None = None
        self._lock = threading.Lock()

    @property
    def points(self) -> tuple[Point, ...]:
        """The points that can be had."""
        return points_given(self.store.points, self.store.recomputed)

    def read(
        self, site: Site, step: int, points: Iterable[Point], start: int, stop: int, chosen: Chosen
    ) -> dict[Point, np.ndarray]:
        """The chosen rows (row, d_model) of images `start` to `stop` at each point: as stored, or float32 where computed."""
        found: dict[Point, np.ndarray] = {}
        for point in sorted(points):  # mlp_in first, for it may be what mlp_out is computed from
            if point in self.store.points:
                found[point] = self.store.read(site, step, point, start, stop)[chosen]
            else:
                x = found.get("mlp_in")
                x = self.store.read(site, step, "mlp_in", start, stop)[chosen] if x is None else x
                found[point] = self._of(site).mlp_out(to_torch(x).float()).numpy()
        return found

    def _of(self, site: Site) -> SiteMLP:
        with self._lock:
            if self._mlp is None or self._mlp[0] != site:
                self._mlp = None  # let go of the old one before the new one is read
                content = self.store.weights_file(site)
                self._mlp = site, mlp_of(content, site, self.store.meta.d_model, self.store.path)
            return self._mlp[1]
