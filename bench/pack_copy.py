"""What a pack costs, against a plain copy of the same bytes: read, write, fsync, in blocks of 16 MB.

Both start cold: every file of the source is dropped from the page cache before each turn (`posix_fadvise` DONTNEED after a
sync).  Fewest bytes, with N in the store: the copy moves 2N, a pack of a site that fits into memory 2N, one that goes
through scratch files 4N.  The goal is 0.40 of the copy's throughput, with the memory that `--memory` says.
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
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench.timing import Comparison
from store.format import StoreMeta, StreamTokens
from store.sizes import human_size
from store.writer import StoreWriter
from tests.small_store import small_meta, small_part
from tests.toy_stores import toy_store

ROOT = Path(__file__).parent.parent
IMAGES, TOKENS, CHANNELS, STEPS = 24, 1024, 3072, 4
BLOCK = 16 << 20
ROUNDS = 3
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


def make_store(path: Path, n_images: int = IMAGES) -> StoreMeta:
    """One site of real width, 50 MB an image; every image is of the split."""
    tokens = StreamTokens("all", TOKENS, TOKENS)
    meta = small_meta(
        n_images=n_images, sites=("img_0",), steps=tuple(range(STEPS)), d_model=CHANNELS, image_tokens=tokens,
        chunk_images=4, pictures="none",
    )  # fmt: skip
    meta = replace(meta, height=256, width=256, num_inference_steps=STEPS)
    writer = StoreWriter.open_or_create(path, meta)
    rng = np.random.default_rng(0)
    few = rng.normal(size=(4, TOKENS, CHANNELS)).astype(np.float32).astype(meta.carrier.logical)
    keys = [(site, step, point) for site in meta.site_objects for step in meta.steps for point in meta.points]
    for part in writer.missing():
        images = meta.part_images(part)
        content = small_part(replace(meta, sites=()), part, {}, ["p"] * n_images)
        sigma = pa.array([[1.0, 0.75, 0.5, 0.25]] * len(images), pa.list_(pa.float32()))
        table = content.prompts.drop_columns(["sigma", "scheduler_sigma", "split"]).append_column("sigma", sigma)
        table = table.append_column("scheduler_sigma", sigma).append_column("split", pa.array(["train"] * len(images)))
        values = {key: np.roll(few, part + index, axis=1) for index, key in enumerate(keys)}
        writer.write_part(part, replace(content, activations=values, prompts=table))
    assert writer.seal()
    return meta


def drop(folder: Path) -> None:
    """Forget the files of a folder: the next reading comes from the disk."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def fresh(folder: Path, source: Path) -> Iterator[Path]:
    """A target that is not there yet, the source dropped from the page cache; the target is removed at the end."""
    drop(source)
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


def comparisons() -> list[Comparison]:
    """Three packs of one store, each against the copy."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("GRANARY_BENCH_FOLDER")) as name:
        folder = Path(name)
        source = folder / "store"
        meta = make_store(source)
        size = meta.bytes_per_image * IMAGES
        lines = []
        cases = (
            ("pack, fits into memory", f"{int(size * 1.3) // 10**6}MB", 1, "2N"),
            ("pack, memory of a quarter", f"{size // 4 // 10**6}MB", 1, "4N"),
            ("pack, memory of a half, 2 workers", f"{size // 2 // 10**6}MB", 2, "4N"),
        )
        base = _base(folder)
        for what, memory, workers, moved in cases:
            ours, other, found = [], [], {}
            for _ in range(ROUNDS):
                other.append(timed(folder, source, lambda target: copy(source, target)))
                with fresh(folder, source) as target:
                    found = pack(source, target, memory, workers)
                ours.append(found["seconds"] - found["idle"])
            note = f"N {human_size(size)}, {moved}; --memory {memory}, "
            if workers == 1:
                note += f"peak {human_size(found['peak'])}, of which Python {human_size(base)}"
            else:
                note += f"workers start and stop in {found['idle']:.1f} s more"
            lines.append(Comparison(what, min(ours), "copy, fsync, cold", min(other), note))
    return lines


if __name__ == "__main__":
    for line in comparisons():
        print(f"{line.line()}   throughput {line.other / line.ours:.2f} of the copy's")
