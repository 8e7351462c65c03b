"""What a pack costs, against a plain copy of the same bytes: read, write, fsync, in blocks of 16 MB.

Both start cold: every file of the source is dropped from the page cache before each turn (`posix_fadvise` DONTNEED after a
sync).  Least work, with N in the store: the copy moves 2N, a pack of a site that fits into memory 2N, one that goes
through scratch files 4N; each file that is read or published has a CRC-32C.  The goal is 0.40 of the copy's speed, with the
memory that `--memory` says.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench.lines import Line, Need, Peer, Size
from bench.timing import files_below, forget
from store.format import StoreMeta, StreamTokens
from store.sizes import human_size
from store.writer import StoreWriter
from tests.small_store import small_meta, small_part
from tests.toy_stores import toy_store

ROOT = Path(__file__).parent.parent
BLOCK = 16 << 20
GOAL = 1 / 0.40


@dataclass(frozen=True)
class Sizes:
    """How much is packed, and how often."""

    images: int
    grid: int
    """tokens along each side of the picture"""
    channels: int
    cases: tuple[int, ...]
    rounds: int

    @property
    def tokens(self) -> int:
        return self.grid**2


STEPS = 4
SIZES = {
    "tiny": Sizes(8, 2, 8, (0,), 1),
    "quick": Sizes(24, 32, 3072, (0, 1), 2),
    "full": Sizes(24, 32, 3072, (0, 1, 2), 3),
}
CHILD = """
import contextlib, io, json, sys, time
from pathlib import Path
from store.pack import PackSettings, run
from store.packing.cluster import ClusterCrew
from store.packing.crew import peak_memory
store, out, memory, workers = sys.argv[1:]
idle = 0.0
def timed(method):
    def call(*words):
        global idle
        begun = time.perf_counter()
        found = method(*words)
        idle += time.perf_counter() - begun
        return found
    return call
ClusterCrew.__enter__, ClusterCrew.__exit__ = timed(ClusterCrew.__enter__), timed(ClusterCrew.__exit__)
if __name__ == "__main__":
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(PackSettings(store=store, out=Path(out), memory=memory, workers=int(workers)))
    print(json.dumps({"seconds": time.perf_counter() - begun, "idle": idle, "peak": peak_memory()}))
"""
"""Packs, and says its seconds, those in which workers started and stopped, and its peak memory."""


def make_store(path: Path, sizes: Sizes) -> StoreMeta:
    """One site of real width, 50 MB an image unless it is tiny; every image is of the split."""
    tokens = StreamTokens("all", sizes.tokens, sizes.tokens)
    meta = small_meta(
        n_images=sizes.images, sites=("img_0",), steps=tuple(range(STEPS)), d_model=sizes.channels, image_tokens=tokens,
        chunk_images=4, pictures="none",
    )  # fmt: skip
    meta = replace(meta, height=8 * sizes.grid, width=8 * sizes.grid, num_inference_steps=STEPS)
    writer = StoreWriter.open_or_create(path, meta)
    rng = np.random.default_rng(0)
    few = rng.standard_normal((4, sizes.tokens, sizes.channels), np.float32).astype(meta.carrier.logical)
    keys = [(site, step, point) for site in meta.site_objects for step in meta.steps for point in meta.points]
    for part in writer.missing():
        images = meta.part_images(part)
        content = small_part(replace(meta, sites=()), part, {}, ["p"] * sizes.images)
        sigma = pa.array([[1.0, 0.75, 0.5, 0.25]] * len(images), pa.list_(pa.float32()))
        table = content.prompts.drop_columns(["sigma", "scheduler_sigma", "split"]).append_column("sigma", sigma)
        table = table.append_column("scheduler_sigma", sigma).append_column("split", pa.array(["train"] * len(images)))
        values = {key: np.roll(few, part + index, axis=1) for index, key in enumerate(keys)}
        writer.write_part(part, replace(content, activations=values, prompts=table))
    assert writer.seal()
    return meta


def copy(source: Path, target: Path) -> float:
    """Copy the activations, file by file, each synced as the pack's are; seconds."""
    block = bytearray(BLOCK)
    begun = time.perf_counter()
    for file in sorted((source / "activations").rglob("c.*")):
        there = target / file.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb", buffering=0) as reading, there.open("wb", buffering=0) as writing:
            while count := reading.readinto(block):
                writing.write(memoryview(block)[:count])
            os.fsync(writing.fileno())
    return time.perf_counter() - begun


def pack(source: Path, target: Path, memory: str, workers: int) -> dict[str, float]:
    """Pack in a process of its own; its seconds, and its greatest memory before and after."""
    words = [sys.executable, "-c", CHILD, str(source), str(target), memory, str(workers)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"packing {source} failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def fresh(folder: Path, source: Path) -> Iterator[Path]:
    """A target that is not there yet, the source dropped from the page cache; the target is removed at the end."""
    forget(files_below(source))
    yield folder / "target"
    shutil.rmtree(folder / "target")


def timed(folder: Path, source: Path, work: Callable[[Path], float]) -> float:
    """Seconds of one cold turn."""
    with fresh(folder, source) as target:
        return work(target)


def _base(folder: Path) -> float:
    """The peak memory of a process that packs next to nothing."""
    small = toy_store(folder / "small", sites=("img_0",))
    return pack(small, folder / "small-pack", "100MB", 1)["peak"]


def lines(size: Size) -> Iterator[Line]:
    """Packs of one store, each against the copy, by turns."""
    sizes = SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "store"
        amount = make_store(source, sizes).bytes_per_image * sizes.images
        base = _base(folder)
        cases = (
            ("fits into memory", int(amount * 1.3), 1, 1),
            ("memory of a quarter", amount // 4, 1, 2),
            ("memory of a half, 2 workers", amount // 2, 2, 2),
        )
        for case in sizes.cases:
            what, memory, workers, times = cases[case]
            needs = (Need("read", times * amount), Need("write", times * amount), Need("crc32c", 2 * amount))
            ours, its, found = _timed_case(folder, source, f"{max(memory // 10**6, 100)}MB", workers, sizes.rounds)
            note = (
                f"peak {human_size(found['peak'])}, of which Python {human_size(base)}; --memory {human_size(memory)}"
            )
            if workers > 1:
                note = f"workers start and stop in {found['idle']:.1f} s more; --memory {human_size(memory)}"
            yield Line(f"{human_size(amount)}, {what}", ours, (Peer("copy, fsync, cold", its, GOAL),), needs, note)


def _timed_case(
    folder: Path, source: Path, memory: str, workers: int, rounds: int
) -> tuple[tuple[float, ...], tuple[float, ...], dict[str, float]]:
    """Seconds of ours and of the copy, by turns, and what the last pack said."""
    ours, its, found = [], [], {}
    for _ in range(rounds):
        its.append(timed(folder, source, lambda target: copy(source, target)))
        with fresh(folder, source) as target:
            found = pack(source, target, memory, workers)
        ours.append(found["seconds"] - found["idle"])
    return tuple(ours), tuple(its), found
