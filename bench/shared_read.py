"""Eight lambdas on one read of a pack, against eight trainings that each read it: what sharing the read saves, and when.

Least work: one read of the pack, with recomputed targets the MLP of the site, 16 * d_model^2 operations a row, and for each of the
eight models 12 * d_model * n_features.  A read costs checksums, a look at every value, the gathering of batches and their conversion
to float32 besides.  So narrow dictionaries on a cold disk or with recomputed targets are bound by reading, wide ones by their steps.
Starting Python and drawing the pictures at the end are left out of both.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.lines import Line, Need, Peer, Size
from bench.planted import packs_of, planted_store
from bench.timing import files_below, forget, quiet
from store.shards import Pack
from tests.toy_stores import toy_store
from train.distributed import Ranks
from train.settings import TrainSettings
from train.stopping import thread_count
from train.trainer import Training

TOKENS = 256
LAMBDAS = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
CASES = ((1, True, 1.0), (8, True, 1.0), (32, False, 0.25))
"""features for each channel, whether the cache is cold, and the share of the rows: narrow, the demo's, wide"""
SIZES = {"tiny": (16, 16_384, 1, CASES[:1]), "quick": (128, 131_072, 1, CASES[:2]), "full": (128, 262_144, 2, CASES)}
"""d_model (tiny-flux's is 128), rows, rounds, cases"""
GOAL = 0.7


def lines(size: Size) -> Iterator[Line]:
    """Narrow dictionaries and the demo's from a cold disk, wide ones from the page cache; each with stored and recomputed targets."""
    d_model, rows, rounds, cases = SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored, _ = packs_of(planted_store(folder / "store", rows, d_model), folder / "stored")
        shutil.rmtree(folder / "store")
        toy_store(
            folder / "store", rows // TOKENS, ("img_0",), (0,), d_model, TOKENS, chunk_images=64, mlp=True, targets="recomputed"
        )  # fmt: skip
        recomputed, _ = packs_of(folder / "store", folder / "recomputed")
        shutil.rmtree(folder / "store")
        for expansion, cold, share in cases:
            for pack in (stored, recomputed):
                yield line(pack, expansion, cold, share, rounds, folder / "out")


def line(pack: Pack, expansion: int, cold: bool, share: float, rounds: int, out: Path) -> Line:
    """Seconds of one training of all lambdas, and of as many trainings of one each, by turns."""
    rows = int(share * pack.rows(pack.sites[0]))
    ours, its = [], []
    for _ in range(rounds):
        ours.append(_seconds(pack, LAMBDAS, expansion, cold, rows, out))
        its.append(sum(_seconds(pack, (l1,), expansion, cold, rows, out) for l1 in LAMBDAS))
    amount = share * sum(shard.path.stat().st_size for shard in pack.shards(pack.sites[0]))
    operations = len(LAMBDAS) * 12 * pack.d_model**2 * expansion * rows
    if pack.targets == "recomputed":
        operations += 16 * pack.d_model**2 * rows
    what = f"8 lambdas, {expansion * pack.d_model:,} features, {'cold' if cold else 'warm'}, {pack.targets}"
    peer = Peer("eight trainings that each read", tuple(its), GOAL if cold and expansion == 1 else None)
    return Line(what, tuple(ours), (peer,), (Need("read" if cold else "cached", amount), Need("bfloat16", operations)))


def _seconds(pack: Pack, l1: tuple[float, ...], expansion: int, cold: bool, rows: int, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    if cold:
        forget(files_below(pack.path))
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
    with quiet(), thread_count(settings.threads):
        training = Training(settings, Ranks())
        begun = time.perf_counter()
        training.run()
    return time.perf_counter() - begun
