"""What a run of `graph` will take is said before it begins, and what it reads and holds is about that."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyze.circuits import frozen, planning, terms
from analyze.circuits.command import GraphsMade, run
from analyze.circuits.frozen import FrozenModel
from analyze.circuits.inquiry import open_inquiry
from analyze.circuits.settings import GraphSettings
from analyze.circuits.terms import reckoned_bytes
from analyze.circuits.trace import STREAMS, Trace, stored_trace
from analyze.circuits.transcoders import frozen_transcoders
from store import Site, Store, open_store
from store.sizes import human_size
from tests.circuit_oracle import hand_made, random_transcoders


@pytest.fixture
def options(traced_flux: Path, tmp_path: Path) -> Callable[..., GraphSettings]:
    """Settings of a small graph, in tmp_path/g."""

    def make(**changes: Any) -> GraphSettings:
        places: dict[str, Any] = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
        usual: dict[str, Any] = {"nodes": 6, "batch": 3, "page": False, "image": 1, "step": 3, "out": tmp_path / "g"}
        return GraphSettings(**{**places, **usual, **changes})

    return make


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is read of traces from now on: what, of which block, how many bytes."""
    found: list[tuple[str, int, int]] = []
    block, weights = Store.trace_block, Store.trace_weights

    def heard(what: str, layer: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found.append((what, layer, sum(each.nbytes for each in arrays.values())))
        return arrays

    def block_heard(self: Store, image: int, step: int, layer: int) -> dict[str, np.ndarray]:
        return heard("block", layer, block(self, image, step, layer))

    def weights_heard(self: Store, layer: int) -> dict[str, np.ndarray]:
        return heard("weights", layer, weights(self, layer))

    monkeypatch.setattr(Store, "trace_block", block_heard)
    monkeypatch.setattr(Store, "trace_weights", weights_heard)
    return found


def test_a_plan_says_what_it_would_take_and_writes_nothing(
    options: Callable[..., GraphSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(options(target=("img_2:max:3", "txt_2:max:7"), plan=True))
    assert isinstance(made, GraphsMade) and made.made == ()
    assert not (tmp_path / "g").exists()
    said = capsys.readouterr().out
    assert "plan: 2 graphs" in said
    assert "about 2 GB held" in said
    assert "about 6 sweeps of 3 nodes" in said  # of each graph the target, then 3 nodes, then 2
    assert "TFLOP" in said
    little = options(target=("img_2:max:3",), plan=True, memory="1KB")
    run(little)
    least = human_size(planning._least(open_inquiry(little)))
    said = capsys.readouterr().out
    assert f"note: --memory 1KB is less than one block and one node of this trace take: about {least} are used" in said
    assert f"about {least} held of trace and gradients" in said


@pytest.mark.parametrize(("memory", "least", "most"), [("2GB", 0.9, 1.1), ("1KB", 1.0, 2.5)])
def test_a_plan_reckons_about_the_bytes_that_are_read(
    options: Callable[..., GraphSettings], read: list[tuple[str, int, int]], memory: str, least: float, most: float
) -> None:
    settings = options(target=("img_2:max:3",), memory=memory)
    inquiry = open_inquiry(settings)
    (sweeps,) = planning._sweeps(inquiry).values()
    reckoned = planning._bytes(inquiry, 3, sweeps)
    read.clear()
    run(settings)
    assert least <= reckoned / sum(size for _, _, size in read) <= most


def test_only_blocks_up_to_the_highest_target_and_the_one_above_are_read_once_each(
    options: Callable[..., GraphSettings], read: list[tuple[str, int, int]]
) -> None:
    made = run(options(target=("img_0:max:3", "txt_0:max:7")))
    assert all(each.new for each in made.made)
    assert Counter((what, layer) for what, layer, _ in read) == {("block", 0): 1, ("block", 1): 1, ("weights", 0): 1}


def test_what_leaves_the_last_block_that_matters_is_what_enters_the_next(traced_flux: Path) -> None:
    source = stored_trace(open_store(traced_flux / "store"), 1, 3)
    below, whole = Trace(source, n_blocks=2), Trace(source)
    found, expected = below.entering(2), whole.entering(2)
    assert found is not None and expected is not None
    assert below.n_blocks == 2 and whole.n_blocks == 3
    assert all(torch.equal(found[stream], expected[stream]) for stream in STREAMS)
    replay, every = FrozenModel(below, {}).replay_error(), FrozenModel(whole, {})
    assert replay == every.replay_error(1)
    assert every.replay_error()["attention"] >= replay["attention"] > 0


def test_what_is_reckoned_for_a_block_is_about_what_it_takes(traced_flux: Path) -> None:
    trace = Trace(stored_trace(open_store(traced_flux / "store"), 1, 3), torch.float32)
    model = FrozenModel(
        trace,
        frozen_transcoders(
            traced_flux / "dictionaries", [Site("double", layer, stream) for layer in range(3) for stream in STREAMS]
        ),
    )
    block = model._block(1)
    directions = sum(len(side.features.distinct) for side in block.sides.values())
    kept = sum(side.products.kept_bytes for side in block.sides.values())  # these only where there is room
    reckoned = reckoned_bytes(sum(model.tokens.values()), model.d_model, 4, directions)
    assert 0.7 < reckoned / (block.size_bytes - kept) < 1.4


def test_little_memory_is_taken_for_as_much_as_a_block_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    source, given = hand_made(1, n_blocks=2), []
    prepare = terms.prepare

    def heard(*arguments: Any) -> terms.Block:
        given.append(arguments[-2:])
        return prepare(*arguments)

    monkeypatch.setattr(frozen, "prepare", heard)
    model = FrozenModel(Trace(source, torch.float64), random_transcoders(1, 2, 12), 1)
    model.replay_error()
    least = reckoned_bytes(11, 12, 8) // 8
    assert given == [(least, least)] * 2


def test_an_error_of_the_replay_that_is_no_number_stays_one() -> None:
    source = hand_made(1, n_blocks=3)
    source.blocks[1]["attn.txt"][0, 0] = np.nan
    found = FrozenModel(Trace(source), {}).replay_error()
    assert np.isnan(found["attention"]) and np.isnan(found["residual"])
