"""Eight lambdas on one read of a pack, against eight trainings that each read it: what sharing the read saves, and when.

A read costs the disk, a checksum and a look at every value, the gathering of batches and their conversion to float32, and with
recomputed targets the MLP of the site, 16 * d_model^2 operations a row.  A model costs 12 * d_model * n_features.  So narrow
dictionaries on a cold disk or with recomputed targets are bound by reading, wide ones by their steps.  Rows are as wide as
tiny-flux's.  Starting Python and drawing the pictures at the end are left out of both.
"""

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.planted import packs_of, planted_store
from bench.timing import Comparison
from store.shards import Pack
from tests.toy_stores import toy_store
from train.distributed import Ranks
from train.settings import TrainSettings
from train.trainer import Training, thread_count

D_MODEL, ROWS, TOKENS = 128, 262_144, 256
LAMBDAS = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
CASES = ((1, True, 1.0), (8, True, 1.0), (32, False, 0.25))
"""features for each channel, whether the cache is cold, and the share of the rows: narrow, the demo's, wide"""
ROUNDS = 2


def comparisons() -> Iterator[Comparison]:
    """Narrow dictionaries and the demo's from a cold disk, wide ones from the page cache; each with stored and recomputed targets."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored, _ = packs_of(planted_store(folder / "store", ROWS, D_MODEL), folder / "stored")
        shutil.rmtree(folder / "store")
        toy_store(
            folder / "store", ROWS // TOKENS, ("img_0",), (0,), D_MODEL, TOKENS, chunk_images=64, mlp=True, targets="recomputed"
        )  # fmt: skip
        recomputed, _ = packs_of(folder / "store", folder / "recomputed")
        shutil.rmtree(folder / "store")
        for expansion, cold, share in CASES:
            for pack in (stored, recomputed):
                yield compare(pack, expansion, cold, share, folder / "out")


def compare(pack: Pack, expansion: int, cold: bool, share: float, out: Path) -> Comparison:
    """One line: seconds of one training of all lambdas, and of as many trainings of one each; the best of two by turns."""
    rows = int(share * pack.rows(pack.sites[0]))
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for index, runs in enumerate(([LAMBDAS], [(l1,) for l1 in LAMBDAS])):
            best[index] = min(best[index], sum(_seconds(pack, l1, expansion, cold, rows, out) for l1 in runs))
    size = share * sum(shard.path.stat().st_size for shard in pack.shards(pack.sites[0]))
    return Comparison(
        f"{expansion * D_MODEL:,} features, {'cold' if cold else 'warm'}, {pack.targets}", best[0], "eight trainings that each read",
        best[1], f"8 x {rows:,} rows, {size / 1e6:.0f} MB read once or eight times",
    )  # fmt: skip


def _seconds(pack: Pack, l1: tuple[float, ...], expansion: int, cold: bool, rows: int, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    if cold:
        forget(pack)
    settings = TrainSettings(
        pack=pack.path,
        out=out,
        l1=l1,
        expansion=expansion,
        rows=rows,
        time_embed_dim=None,
        autocast="auto",
        device="cpu",
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), thread_count(settings.threads):
        training = Training(settings, Ranks())
        begun = time.perf_counter()
        training.run()
    return time.perf_counter() - begun


def forget(pack: Pack) -> None:
    """Drop the files of a pack from the page cache."""
    for name in pack.files:
        descriptor = os.open(pack.path / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def main() -> None:
    for comparison in comparisons():
        print(comparison.line(), flush=True)
    print("goal: at most 0.7 where reading binds")


if __name__ == "__main__":
    main()
