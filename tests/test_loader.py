"""Batches are decided by (seed, epoch, number) alone, whoever reads them, ahead or not, and wherever reading stopped."""

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch.utils.data import DataLoader

import train.rows.loader
import train.rows.read_ahead
import train.rows.reading
from store.errors import UsageError
from store.shards import Pack
from tests.toy_stores import mlp_in_numpy, mlp_of_site
from tests.written_pack import SITE, telling_rows, written_pack
from train.rows.loader import Batch, Loader, stable_order
from train.rows.recompute import SiteMLP

ROWS, BATCH = (300, 250, 275, 260), 64
"""rows of the four shards, of which 4, 3, 4 and 4 batches come"""
BOTH = ("mlp_in", "mlp_out")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return written_pack(tmp_path_factory.mktemp("pack"), [telling_rows(i, rows) for i, rows in enumerate(ROWS)])


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    shards = [{"mlp_in": telling_rows(i, rows)["mlp_in"]} for i, rows in enumerate(ROWS)]
    return written_pack(tmp_path_factory.mktemp("pack"), shards, bytes(safetensors.numpy.save(mlp_of_site(SITE, 4))))


def loader(pack: Pack, **changes: Any) -> Loader:
    options = {"pack": pack, "site": SITE, "points": BOTH, "batch": BATCH, "seed": 3} | changes
    return Loader(**options)


def by_the_definition(seed: int, epoch: int) -> list[list[tuple[int, int]]]:
    """(shard, row) of every row of every batch of an epoch, computed as the documentation says."""
    batches = []
    for shard, rows in enumerate(ROWS):
        digest = hashlib.sha256(f"granary-batches-1:{seed}:{epoch}:{shard}".encode()).digest()
        keys = np.random.Philox(key=np.frombuffer(digest[:16], "<u8")).random_raw(rows)
        order = sorted(range(rows), key=lambda row: (keys[row], row))
        batches += [[(shard, row) for row in order[at : at + BATCH]] for at in range(0, rows - BATCH + 1, BATCH)]
    return batches


def told(batch: Batch) -> list[tuple[int, int]]:
    """(shard, row) of every row of a batch, from both of its points."""
    x = batch.at("mlp_in")
    assert torch.equal(x, -batch.at("mlp_out")) and x.dtype == torch.float32 and len(batch) == len(x)
    return [(int(shard) - 1, int(128 * high + low)) for shard, high, low, _ in x.tolist()]


def all_told(batches: Any, count: int) -> list[list[tuple[int, int]]]:
    return [told(batch) for batch in itertools.islice(batches, count)]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read shard")]


def wait_for_readers() -> None:
    for thread in readers():
        thread.join()


def test_the_rows_of_a_batch_are_those_of_the_documented_permutation_in_whatever_order_it_is_asked_for(
    pack: Pack,
) -> None:
    ours, expected = loader(pack), [by_the_definition(3, epoch) for epoch in range(3)]
    assert len(ours) == len(expected[0]) == 15
    assert all_told(ours.batches(0, 45), 99) == [batch for epoch in expected for batch in epoch]
    for epoch, k in ((2, 14), (0, 0), (1, 7), (1, 3), (1, 4), (2, 0)):
        assert told(ours.batch(epoch, k)) == expected[epoch][k]
    assert told(loader(pack, seed=4).batch(0, 0)) == by_the_definition(4, 0)[0] != expected[0][0]
    for epoch, k in ((0, 15), (0, -1), (-1, 0)):
        with pytest.raises(IndexError, match="an epoch has batches 0 to 14"):
            ours.batch(epoch, k)


def test_rows_with_equal_keys_stay_as_they_stand() -> None:
    rng = np.random.default_rng(0)
    for keys in (rng.integers(0, 50, 3000, np.uint64), rng.permutation(3000).astype(np.uint64), np.zeros(1, np.uint64)):
        assert stable_order(keys).tolist() == sorted(range(len(keys)), key=lambda row: (keys[row], row))


@pytest.mark.parametrize("world", [2, 3, 20])
def test_ranks_take_every_batch_once_and_rank_r_those_of_numbers_k_times_w_plus_r(pack: Pack, world: int) -> None:
    everything = [batch for epoch in range(3) for batch in by_the_definition(3, epoch)]
    for rank in range(world):
        ours = loader(pack, rank=rank, world=world)
        numbers = [number for number in range(4, 41) if number % world == rank]
        assert all_told(ours.batches(4, 41), 99) == [everything[number] for number in numbers]
    with pytest.raises(UsageError, match="rank 2 of 2: ranks are counted from 0 to 1"):
        loader(pack, rank=2, world=2)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_iterating_goes_on_exactly_where_the_saved_state_stood(pack: Pack, rank: int, world: int) -> None:
    whole = all_told(loader(pack, rank=rank, world=world), 30)
    for stopped in (0, 1, 7, 15, 23):
        first = loader(pack, rank=rank, world=world)
        assert all_told(first, stopped) == whole[:stopped]
        state = json.loads(json.dumps(first.state_dict()))
        assert state == {"seed": 3, "epoch": stopped * world // 15, "batch": stopped * world % 15}
        second = loader(pack, rank=rank, world=world, seed=99)
        second.load_state_dict(state)
        assert all_told(second, 30 - stopped) == whole[stopped:]
        assert all_told(first, 30 - stopped) == whole[stopped:]
    with pytest.raises(UsageError, match="is no state of this loader, whose epochs have 15 batches"):
        second.load_state_dict({"seed": 0, "epoch": 0, "batch": 15})


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("workers", "start"), [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_a_torch_dataloader_gives_the_same_batches_in_the_same_order(
    pack: Pack, recomputed: Pack, workers: int, start: str | None
) -> None:
    ours = loader(pack, rank=1, world=2)
    ours.load_state_dict({"seed": 5, "epoch": 0, "batch": 6})
    next(iter(ours))  # a fork finds a shard in RAM, and perhaps a thread that is not there
    options: dict[str, Any] = {"batch_size": None, "num_workers": workers, "multiprocessing_context": start}
    batches = iter(DataLoader(pickle.loads(pickle.dumps(ours)) if workers == 0 else ours, **options))
    assert all_told(batches, 20) == all_told(loader(pack, seed=5, rank=1, world=2).batches(8, 48), 20)
    del batches
    computed = next(iter(DataLoader(loader(recomputed), **options)))
    expected = loader(recomputed).batch(0, 0)
    for point in BOTH:
        assert torch.equal(computed.at(point), expected.at(point))  # type: ignore[arg-type]
    assert len(pickle.dumps(computed)) < 20_000, "neither pack nor MLP travel with a batch"


def test_workers_do_not_fill_a_cuda_device(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.rows.loader, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(UsageError, match="make the Loader with device='cpu'"):
        next(iter(loader(pack, device="cuda")))


class Seen:
    """What the thread reads and into what, while `train.rows.read_ahead` goes on as it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shards: list[int] = []
        self.whole: list[bool] = []
        self.buffers: list[weakref.ref[np.ndarray]] = []
        read_shard, buffer_for = train.rows.read_ahead.read_shard, train.rows.read_ahead.buffer_for

        def reads(shard: Any, points: Any, buffer: Any, whole: bool, stop: Any) -> Any:
            self.shards.append(shard.index)
            self.whole.append(whole)
            return read_shard(shard, points, buffer, whole, stop)

        def makes(size: int) -> np.ndarray:
            self.buffers.append(weakref.ref(made := buffer_for(size)))
            return made

        monkeypatch.setattr(train.rows.read_ahead, "read_shard", reads)
        monkeypatch.setattr(train.rows.read_ahead, "buffer_for", makes)

    @property
    def held(self) -> int:
        """Bytes of the buffers that live."""
        return sum(
            buffer.nbytes - train.rows.reading.ALIGNMENT for ref in self.buffers if (buffer := ref()) is not None
        )


def test_reading_ahead_holds_two_shards_within_the_bound_and_one_where_two_do_not_fit(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    greatest = max(entry["bytes"] for entry in pack.files.values())
    for ahead, held in ((2 * greatest, 2 * greatest), (2 * greatest - 1, greatest), (0, greatest)):
        seen = Seen(monkeypatch)
        ours = loader(pack, ahead=ahead)
        for number, _ in enumerate(ours.batches(0, 30)):
            wait_for_readers()
            upcoming = 1 if held > greatest and number < 26 else 0
            shard = number // 15 * 4 + ours._shard_of(number)
            assert seen.shards == [index % 4 for index in range(min(shard + 1 + upcoming, 8))]
            assert seen.held <= held
        assert seen.held == held and len(seen.buffers) == held // greatest
        ours.release()
        assert seen.held == 0
        monkeypatch.undo()


def test_the_shards_of_a_small_pack_stay_in_ram(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shards in (1, 2):
        small = written_pack(tmp_path / str(shards), [telling_rows(i, 100) for i in range(shards)])
        seen = Seen(monkeypatch)
        assert len(list(loader(small).batches(0, 10 * shards))) == 10 * shards
        assert seen.shards == list(range(shards))
        monkeypatch.undo()


def test_one_point_of_two_is_read_whole_the_first_time_and_alone_after_that(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    found = [batch.at("mlp_out") for batch in loader(pack, points=("mlp_out",)).batches(0, 30)]
    assert all(
        torch.equal(one, batch.at("mlp_out")) for one, batch in zip(found, loader(pack).batches(0, 30), strict=True)
    )
    assert seen.whole[:8] == [True] * 4 + [False] * 4 and all(seen.whole[8:])


def waits(*_: Any, stop: threading.Event) -> dict[str, torch.Tensor]:
    """A reading from a disk that does not answer."""
    assert stop.wait(20)
    raise train.rows.reading.Stopped


@pytest.mark.parametrize("end", ["close", "release", "error"])
def test_no_thread_is_left_when_the_batches_are_closed(pack: Pack, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    read_shard = train.rows.read_ahead.read_shard
    monkeypatch.setattr(
        train.rows.read_ahead,
        "read_shard",
        lambda shard, *rest, stop: (waits if shard.index else read_shard)(shard, *rest, stop=stop),
    )
    ours = loader(pack)
    batches = ours.batches(0, 15)
    next(batches)
    (thread,) = readers()
    assert thread.daemon
    if end == "close":
        batches.close()  # type: ignore[attr-defined]
    elif end == "release":
        ours.release()
    else:
        with pytest.raises(RuntimeError, match="of the caller"):
            batches.throw(RuntimeError("of the caller"))  # type: ignore[attr-defined]
    thread.join(5)  # it no longer touches the buffer, and is about to end
    assert not readers()


def test_an_interrupt_ends_the_waiting_for_a_shard_at_once(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.rows.read_ahead, "read_shard", waits)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), 2))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(loader(pack).batches(0, 15))
    timer.join()
    for thread in readers():  # one that was told to stop may still be about to
        thread.join(5)
    assert time.monotonic() - begun < 5 and not readers()


def test_a_point_is_converted_or_recomputed_once_for_all_who_ask(
    pack: Pack, recomputed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, mlp_out = [], SiteMLP.mlp_out
    monkeypatch.setattr(SiteMLP, "mlp_out", lambda self, x: calls.append(len(x)) or mlp_out(self, x))
    batch = loader(recomputed).batch(1, 2)
    assert batch.columns.keys() == {"mlp_in"} and not calls
    for point in BOTH:
        assert batch.at(point) is batch.at(point)  # type: ignore[arg-type]
    assert calls == [BATCH]
    assert np.allclose(batch.at("mlp_out").numpy(), mlp_in_numpy(SITE, batch.at("mlp_in").numpy()), atol=1e-5)
    assert batch.columns["mlp_in"].dtype == torch.bfloat16 and batch.sigma.dtype == torch.float32
    with pytest.raises(UsageError, match="rows read for mlp_out do not give mlp_in"):
        loader(pack, points=("mlp_out",)).batch(0, 0).at("mlp_in")


def test_a_batch_greater_than_a_shard_is_refused(pack: Pack) -> None:
    with pytest.raises(UsageError, match="--batch 251 is more than the 250 rows of a shard"):
        loader(pack, batch=251)


def test_the_loader_imports_no_zarr() -> None:
    code = "import sys, train.rows.loader, train.rows.mixing; sys.exit(any(m in sys.modules for m in ('zarr', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def batches_of(pack: Pack, device: str) -> Iterator[Batch]:
    return loader(pack, device=device).batches(0, 30)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pack", "recomputed"])
def test_batches_on_a_cuda_device_are_those_on_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    pack = request.getfixturevalue(name)
    for there, here in zip(batches_of(pack, "cuda"), batches_of(pack, "cpu"), strict=True):
        assert there.sigma.is_cuda and torch.equal(there.at("mlp_in").cpu(), here.at("mlp_in"))
        torch.testing.assert_close(there.at("mlp_out").cpu(), here.at("mlp_out"), rtol=2e-3, atol=2e-3)
