"""Packs of small stores, made whole or as if the memory held only a few units, and what is in them."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from store import Site
from store.pack import PackSettings, run
from store.packing.budget import Budget, Share, _runs
from store.shards import Pack


def make(store: Path, out: Path, **changes: Any) -> Pack:
    pack = run(PackSettings(**{"store": store, "out": out, "seed": 1, **changes}))
    assert pack is not None
    return pack


@contextlib.contextmanager
def in_runs(count: int) -> Iterator[None]:
    """As if the memory held a site only in about so many runs; 0: as it is."""
    share = Budget._share

    def small(self: Budget, stream: Any) -> Share:
        units, whole = self.units(stream), share(self, stream)
        return replace(whole, whole=False, runs=_runs(units, max(int(units.sum()) // count, int(units.max()))))

    with mock.patch.object(Budget, "_share", small) if count else contextlib.nullcontext():
        yield


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def whole(pack: Pack, site: Site) -> dict[str, np.ndarray]:
    shards = [shard.columns() for shard in pack.shards(site)]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
