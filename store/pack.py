"""Makes a pack: every row of one split of a store, shuffled once, so that training reads in order.

1. The rows of a stream are its kept (image, step, token) slots.  One seeded permutation gives each its
   destination; all sites of the stream share it, so their rows stay aligned.
2. Destinations are cut into equal shards of at most `--shard-mb`.
3. Site by site, as many shards as fit into `--memory` are filled in one reading of the site, chunk by
   chunk, and published; more shards mean more readings.  The first reading also sums the means.
4. A journal names what is published, for a killed pack to go on from; the manifest comes last.

Equal store and settings give equal bytes, whatever the memory and however often the pack was killed.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import safetensors.numpy
import tyro
from tqdm import tqdm

from store import open_store
from store.errors import DamagedError, MismatchError, StoreError, UsageError
from store.files import is_temporary, json_bytes, read_self_checked, self_checked, sha256_bytes, write_bytes, write_json
from store.reader import Store
from store.shards import (
    FORMAT,
    FORMAT_VERSION,
    JOURNAL,
    MANIFEST,
    METADATA_KEY,
    Pack,
    columns_of,
    crc32c_hex,
    crc32c_of,
    means_file,
    open_pack,
    shard_file,
    weights_name,
)
from store.shuffle import Means, Order
from store.sites import POINTS, Point, Site, Stream, choose_sites
from store.sizes import human_size, parse_size
from store.split import Split

WEIGHTS_FILE = r"sha256-[0-9a-f-]+\.safetensors"


@dataclass(frozen=True)
class PackSettings:
    """Shuffle one split of a store into shards that training reads in order."""

    store: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """the store to pack, a folder or a URL (s3://, hf://, https://)"""
    out: Path
    """folder of the pack"""
    sites: str = "all"
    """sites to pack, such as img_0-3,txt_6"""
    split: Split = "train"
    """train, or val for held-out prompts"""
    points: str = "all"
    """what to pack: all that the store has, mlp_in, mlp_out or both; mlp_out alone makes a pack for SAEs, of half the
    size. Of a store with recomputed targets mlp_in is packed, and the MLP of each site with it"""
    memory: str = "2GB"
    """bound on the arrays held at once (Python and its libraries come on top: about 150 MB); less memory means more
    readings of the store, and the same bytes"""
    shard_mb: int = 256
    """greatest size of a shard in MB (10^6 bytes)"""
    seed: int = 0
    """decides the order of the rows"""

    def __post_init__(self) -> None:
        odd = [point for point in self.points.split(",") if point not in POINTS and self.points != "all"]
        if odd:
            raise UsageError(f"--points {self.points!r}: {odd[0]!r} is no point; there are {', '.join(POINTS)}")
        if self.split not in get_args(Split):
            raise UsageError(f"--split {self.split!r} is not one of {', '.join(get_args(Split))}")
        if self.shard_mb < 1:
            raise UsageError(f"--shard-mb {self.shard_mb} must be at least 1")
        parse_size(self.memory)


class Packing:
    """One run of `pack`: what is to be written, and what is written already."""

    def __init__(self, store: Store, settings: PackSettings) -> None:
        self.store, self.settings, self.out = store, settings, settings.out
        self.memory = parse_size(settings.memory)
        wanted = choose_sites(settings.sites, store.sites, str(settings.store))
        self.sites = tuple(site for site in store.sites if site in wanted)
        self.points = self._points()
        self.weights = self._weights()
        splits = store.prompts().column("split").to_pylist()
        if settings.split not in splits:
            raise UsageError(
                f"none of the {len(splits)} images of {settings.store} is in the split {settings.split!r} (5 % of all "
                "prompts are val, by a hash of their text): harvest more prompts"
            )
        self.dtype = np.dtype(store.meta.carrier.logical).type
        self.plan = {
            "store": store.id, "model": store.meta.model, "split": settings.split, "seed": settings.seed,
            "shard_mb": settings.shard_mb, "points": list(self.points), "sites": [str(site) for site in self.sites],
            "steps": list(store.steps), "d_model": store.meta.d_model, "dtype": np.dtype(self.dtype).name,
            "targets": store.meta.targets, "weights": self.weights,
        }  # fmt: skip
        self.key = sha256_bytes(json_bytes(self.plan))
        self.files: dict[str, dict[str, Any]] = {}

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
    def orders(self) -> dict[Stream, Order]:
        streams = dict.fromkeys(site.stream for site in self.sites)
        return {stream: Order(self.store, stream, self.settings.split, self.settings.seed) for stream in streams}

    def row_bytes(self, stream: Stream) -> int:
        columns = columns_of(stream, self.points, self.dtype)
        return sum(
            np.dtype(t).itemsize * (self.store.meta.d_model if name in POINTS else 1) for name, t in columns.items()
        )

    def cuts(self, stream: Stream) -> np.ndarray:
        """Where shards begin, and at last where they end: equal shards, but for one row."""
        rows = self.orders[stream].rows
        count = -(-rows * self.row_bytes(stream) // (self.settings.shard_mb * 10**6))
        return np.linspace(0, rows, max(count, 1) + 1).astype(np.int64)

    @property
    def total_bytes(self) -> int:
        rows = sum(self.orders[site.stream].rows * self.row_bytes(site.stream) for site in self.sites)
        return rows + sum(self.weights_bytes.values())

    def shards_at_once(self, stream: Stream) -> int:
        """How many shards fit into the memory beside all else; `UsageError` when not even one does."""
        store, order = self.store, self.orders[stream]
        shard = int(np.diff(self.cuts(stream)).max()) * self.row_bytes(stream)
        index = sum(o.destination.size * 24 for o in self.orders.values())  # tokens, destinations, masks, sorting
        row = store.meta.d_model * np.dtype(self.dtype).itemsize
        chunk = 10 * store.chunk_images * order.tokens.shape[2] * row  # as read, twice in float32, selected
        fixed = index + chunk + shard  # the shard that is being published exists twice
        if self.memory < fixed + shard:
            raise UsageError(
                f"--memory {self.settings.memory} is too little for stream {stream}: the row order "
                f"takes {human_size(index)}, a chunk of the store {human_size(chunk)}, a shard twice "
                f"{human_size(2 * shard)}; use --memory {-(-(fixed + shard) // 10**6)}MB or more, "
                "a smaller --shard-mb, or fewer images"
            )
        return max(int(self.memory - fixed) // max(shard, 1), 1)

    def announce(self) -> None:
        """Print what will be written; refuse a disk that is too small."""
        parts = []
        for stream, order in self.orders.items():
            sites, shards = sum(site.stream == stream for site in self.sites), len(self.cuts(stream)) - 1
            readings = -(-shards // self.shards_at_once(stream))
            parts.append(f"{sites} {stream} sites of {order.rows:,} rows in {shards} shards each ({readings} readings)")
        if self.weights:
            of_mlps = human_size(sum(self.weights_bytes.values()))
            parts.append(f"targets recomputed: mlp_in and {len(self.weights_bytes)} MLPs ({of_mlps})")
        print(f"plan: {human_size(self.total_bytes)} for {self.settings.split}: " + "; ".join(parts), flush=True)
        left = self.total_bytes - sum(entry["bytes"] for entry in self.files.values())
        free = shutil.disk_usage(
            next(parent for parent in (self.out, *self.out.absolute().parents) if parent.exists())
        ).free
        if free < left:
            raise StoreError(
                f"{self.out}: {human_size(left)} are to be written and {human_size(free)} are free on that disk: "
                "make room, or choose another --out"
            )

    def write(self) -> None:
        """Publish what is missing, the manifest last."""
        self._journal()
        done = sum(entry["bytes"] for entry in self.files.values())
        with tqdm(total=self.total_bytes, initial=done, unit="B", unit_scale=True, desc="pack", mininterval=0.5) as bar:
            for site in self.sites:
                bar.set_postfix_str(str(site))
                self._copy_weights(site, bar)
                for first, last in self._passes(site):
                    self._pass(site, first, last, bar)
        streams = {
            stream: {"rows": order.rows, "shards": np.diff(self.cuts(stream)).tolist(), "images": len(order.image)}
            | ({"real_rows": int(order.real.sum())} if stream == "txt" else {})
            for stream, order in self.orders.items()
        }
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "plan": self.plan,
            "streams": streams,
        }
        write_json(self.out / MANIFEST, self_checked({**content, "files": self.files}))
        (self.out / JOURNAL).unlink()

    def _copy_weights(self, site: Site, bar: "tqdm[Any]") -> None:
        """Copy the MLP of a site, for recomputed targets."""
        if not self.weights or weights_name(self.weights[str(site)]) in self.files:
            return
        data = self.store.weights_file(site)
        assert data is not None
        self._publish(weights_name(self.weights[str(site)]), data)
        bar.update(len(data))

    def _passes(self, site: Site) -> Iterator[tuple[int, int]]:
        """Runs of missing shards, each small enough for one reading of the site."""
        count, most = len(self.cuts(site.stream)) - 1, self.shards_at_once(site.stream)
        first = 0
        while first < count:
            if shard_file(site, first) in self.files:
                first += 1
                continue
            last = first
            while last < min(first + most, count) and shard_file(site, last) not in self.files:
                last += 1
            yield first, last
            first = last

    def _pass(self, site: Site, first: int, last: int, bar: "tqdm[Any]") -> None:
        order, cuts = self.orders[site.stream], self.cuts(site.stream)
        low, high = int(cuts[first]), int(cuts[last])
        columns: dict[str, np.ndarray] = {
            point: np.empty((high - low, self.store.meta.d_model), self.dtype) for point in self.points
        }
        means = None if means_file(site) in self.files else Means(order, self.store.meta.d_model)
        for step_index, step in enumerate(order.steps):
            for point in self.points:
                for values, places in self._chunks(site, step_index, step, point):
                    destination = order.destination[places, step_index]
                    inside = (destination >= low) & (destination < high)
                    columns[point][destination[inside] - low] = values[inside]
                    if means is not None:
                        means.add(values, places, step_index, point)
        if means is not None:
            self._publish(means_file(site), safetensors.numpy.save(means.result()))
        provenance = order.provenance(low, high)
        for index in range(first, last):
            rows = slice(int(cuts[index]) - low, int(cuts[index + 1]) - low)
            about = json_bytes({"pack": self.key, "site": str(site), "shard": index}).decode()
            shard = {name: column[rows] for name, column in (columns | provenance).items()}
            self._publish(shard_file(site, index), safetensors.numpy.save(shard, {METADATA_KEY: about}))
            bar.update(sum(column.nbytes for column in shard.values()))

    def _chunks(self, site: Site, step_index: int, step: int, point: Point) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Activations (image, slot, d_model) of the split's images and their places, a chunk of the store at a time."""
        store, member = self.store, self.orders[site.stream].member
        for start in range(0, store.n_images, store.chunk_images):
            stop = min(start + store.chunk_images, store.n_images)
            places = member[start:stop]
            if (places >= 0).any():
                values = store.read(site, step, point, start, stop)
                yield (values if (places >= 0).all() else values[places >= 0]), places[places >= 0]

    def _publish(self, name: str, data: bytes) -> None:
        write_bytes(self.out / name, data)
        self.files[name] = {"bytes": len(data), "crc32c": crc32c_hex(data)}
        self._journal()

    def _journal(self) -> None:
        write_json(self.out / JOURNAL, self_checked({"key": self.key, "plan": self.plan, "files": self.files}))

    def resume(self) -> bool:
        """Take over what an earlier run published; whether the pack is complete. `UsageError` for another pack."""
        if (self.out / MANIFEST).exists():
            self._refuse_other(open_pack(self.out).manifest["plan"])
            (self.out / JOURNAL).unlink(missing_ok=True)
            return True
        if (self.out / JOURNAL).exists():
            journal = read_self_checked(self.out / JOURNAL)
            self._refuse_other(journal["plan"])
            for leftover in self.out.glob("**/.*.tmp"):
                leftover.unlink()
            for name, entry in journal["files"].items():
                path = self.out / name
                if path.exists() and path.stat().st_size == entry["bytes"] and crc32c_of(path) == entry["crc32c"]:
                    self.files[name] = entry
        elif self.out.exists() and (
            not self.out.is_dir() or any(not is_temporary(file) for file in self.out.iterdir())
        ):
            raise UsageError(f"{self.out} exists and is not a pack: choose another --out, or remove it")
        return False

    def _refuse_other(self, there: dict[str, Any]) -> None:
        odd = [key for key in self.plan if there.get(key) != self.plan[key]]
        lines = [f"  {key}: there {_short(there.get(key))}, asked for {_short(self.plan[key])}" for key in odd]
        if not lines:
            return
        text = f"{self.out} holds another pack; it differs in\n" + "\n".join(lines)
        if there.get("store") != self.plan["store"]:
            raise MismatchError(f"{text}\nIt was made from another store: choose another --out, or remove it.")
        raise UsageError(f"{text}\nChoose another --out, or remove it.")


def _short(value: Any) -> str:
    return repr(value["id"] if isinstance(value, dict) and "id" in value else value)


def run(settings: PackSettings) -> Pack:
    """The pack at `settings.out`: made, finished from where it was killed, or already complete."""
    store = open_store(settings.store)
    if store.place.local is not None and settings.out.resolve().is_relative_to(store.place.local.resolve()):
        raise UsageError(
            f"--out {settings.out} lies in the store: choose a folder beside it, a store holds nothing else"
        )
    packing = Packing(store, settings)
    if packing.resume():
        print(f"{settings.out} is complete already: the same pack, nothing to do")
    else:
        packing.announce()
        packing.write()
    return open_pack(settings.out)
