"""Traces hold what the model did, and a harvest with them is the harvest without them beside its traces."""

import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from harvest import HarvestSettings, run
from harvest.planning.budget import images_within
from harvest.planning.estimate import Disk, announce, refuse_what_does_not_fit, volume_of
from harvest.planning.plan import make_plan
from harvest.trace_writing import BlockTrace, TraceWriter
from harvest.tracing import non_finite, replay_errors
from store import Site, Store, UsageError, layout, open_store
from store.care.verify import verify
from store.errors import GranaryError, Interrupted, LostLeaseError
from store.sites import POINTS
from store.traces import TRACE_STREAMS, trace_files
from store.writer import StoreWriter
from tests.test_store import tree
from tests.trace_oracle import Oracle

SMALL: dict[str, Any] = {
    "images": 5, "batch_size": 3, "layers": "0-1", "threads": 1, "pictures": "none", "num_inference_steps": 2,
    "height": 48, "width": 64, "weights": "none",
}  # fmt: skip
TRACE: dict[str, Any] = {"trace": True, "trace_images": "1,3-4", "trace_steps": "1"}


def harvest(out: Path, **options: Any) -> Store:
    run(HarvestSettings(out=out, **{**SMALL, **options}))
    return open_store(out)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return harvest(tmp_path_factory.mktemp("traced") / "store", **TRACE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return harvest(tmp_path_factory.mktemp("plain") / "store")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Computed in bfloat16, so that MLP values lie with the activations."""
    return harvest(tmp_path_factory.mktemp("half") / "store", **TRACE, dtype="bfloat16")


def test_activations_are_the_same_bytes_with_traces_and_without(traced: Store, plain: Store) -> None:
    without, there = tree(Path(plain.path)), tree(Path(traced.path))
    same = ("activations/", "prompts/", "statistics/")
    assert without.keys() <= there.keys()
    assert all(there[name] == data for name, data in without.items() if name.startswith(same))
    more = {name for name in there.keys() - without.keys() if not name.startswith("weights/")}
    assert more == set(trace_files(traced.meta, range(5)))
    assert b"traces" not in without["zarr.json"]
    assert verify(traced.place).ok


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({"tokens": "7"}, {"mlp_in.txt", "mlp_out.txt"}),
        ({"text_tokens": "real"}, {"mlp_in.img", "mlp_out.img"}),
        ({"targets": "recomputed", "weights": "copy"}, {"mlp_in.img", "mlp_in.txt"}),
        ({"store_dtype": "fp8-e4m3"}, set()),
    ],
)
def test_traces_hold_every_token_and_point_whatever_the_store_keeps(
    plain: Store, tmp_path: Path, options: dict[str, str], shared: set[str]
) -> None:
    file = tmp_path / "prompts.txt"  # the same ones: of builtin prompts, `real` would count the tokens of all
    file.write_text("\n".join(plain.prompts().column("prompt").to_pylist()[:2]))
    few = {"prompts": str(file), "images": 2, "steps": "1"}
    without = tree(Path(harvest(tmp_path / "without", **few, **options).path))
    store = harvest(tmp_path / "store", **few, **options, trace=True, trace_images="1", trace_dtype="bfloat16")
    there = tree(Path(store.path))
    assert all(there[n] == data for n, data in without.items() if n.startswith(("activations/", "tokens/", "prompts/")))
    own = store._trace(1, 1, 0)[1]
    found = store.trace_block(1, 1, 0)
    everything = {f"{point}.{stream}" for point in POINTS for stream in TRACE_STREAMS}
    assert everything - own.keys() == shared
    for name in sorted(everything):
        point, stream = name.split(".")
        site = Site("double", 0, stream)  # type: ignore[arg-type]
        exact = plain.read(site, 1, point, 1, 2)[0]  # type: ignore[arg-type]  # all tokens of both points, bfloat16
        assert len(found[name]) == {"img": 48, "txt": 16}[stream]
        np.testing.assert_allclose(found[name].astype(np.float32), exact.astype(np.float32), rtol=0.01, atol=1e-3)
        if name in shared:
            there_too = store.read(site, 1, point, 1, 2)[0]  # type: ignore[arg-type]
            np.testing.assert_array_equal(found[name], there_too)


@pytest.mark.parametrize("image", [1, 4])
def test_traces_are_what_the_plain_pipeline_did(traced: Store, image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Oracle(monkeypatch, traced, image)
    for block in (0, 1):
        found = traced.trace_block(image, 1, block)
        for name, values in seen.blocks[block].items():
            if block == 1 or not name.startswith("resid_out"):
                np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-3)
        for name, values in zip("qk", seen.joint[block], strict=True):
            np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-3)


def replayed(found: dict[str, np.ndarray], w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The block from its trace in float64, written out head by head and token by token."""
    t = {name: values.astype(np.float64) for name, values in found.items()}
    w = {name: values.astype(np.float64) for name, values in w.items()}
    values, out = [], {}
    for s, name in (("txt", "add_v_proj"), ("img", "to_v")):
        centred = t[f"resid.{s}"] - t[f"resid.{s}"].mean(1, keepdims=True)
        n1 = centred * t[f"r1.{s}"][:, None] * (1 + t[f"scale_msa.{s}"]) + t[f"shift_msa.{s}"]
        values.append(n1 @ w[f"{name}.weight"].T + w[f"{name}.bias"])
    tokens, heads, d_head = t["q"].shape
    v = np.concatenate(values).reshape(tokens, heads, d_head)
    joined = np.empty_like(v)
    for head in range(heads):
        logits = t["q"][:, head] @ t["k"][:, head].T / np.sqrt(d_head)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        joined[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head]
    flat, texts = joined.reshape(len(joined), -1), len(t["resid.txt"])
    for s, name, rows in (("txt", "to_add_out", flat[:texts]), ("img", "to_out.0", flat[texts:])):
        out[f"attn.{s}"] = rows @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        middle = t[f"resid.{s}"] + t[f"gate_msa.{s}"] * t[f"attn.{s}"]
        centred = middle - middle.mean(1, keepdims=True)
        out[f"mlp_in.{s}"] = centred * t[f"r2.{s}"][:, None] * (1 + t[f"scale_mlp.{s}"]) + t[f"shift_mlp.{s}"]
        out[f"resid.{s}"] = middle + t[f"gate_mlp.{s}"] * t[f"mlp_out.{s}"]
    return out


@pytest.mark.parametrize(("kind", "least", "most"), [("traced", 0.0, 5e-6), ("half", 1e-4, 0.05)])
def test_a_block_follows_from_its_trace_within_the_error_that_the_trace_states(
    kind: str, least: float, most: float, request: pytest.FixtureRequest
) -> None:
    store: Store = request.getfixturevalue(kind)
    for block in (0, 1):
        found, stated = store.trace_block(3, 1, block), store.trace_facts(3, 1, block)["replay"]
        for name, values in replayed(found, store.trace_weights(block)).items():
            held = found[name] if not name.startswith("resid") else _leaving(store, block, name)
            held = held.astype(np.float64)
            error = np.abs(values - held).max() / np.abs(held).max()
            assert error <= most
            if kind == "half":
                assert stated[name] == pytest.approx(error, rel=0.02)
            elif name.startswith("resid"):  # the model's own additions again
                assert stated[name] == 0
            else:  # the rounding of one float32 computation against another's
                assert error / 8 < stated[name] < error * 8
    worst = store.replay_errors()
    assert set(worst) == {"attn", "mlp_in", "resid"}
    assert all(least <= error <= most for error in worst.values())


def _leaving(store: Store, block: int, name: str) -> np.ndarray:
    stream = name.partition(".")[2]
    if block == 1:
        return store.trace_block(3, 1, 1)[f"resid_out.{stream}"]
    return store.trace_block(3, 1, block + 1)[f"resid.{stream}"]


@pytest.mark.parametrize(
    "name",
    ["q", "k", "resid.txt", "r1.img", "shift_msa.txt", "scale_msa.img", "gate_msa.txt", "attn.img", "r2.txt",
     "shift_mlp.img", "scale_mlp.txt", "gate_mlp.img", "mlp_in.txt", "mlp_out.img", "resid_out.txt"],
)  # fmt: skip
def test_what_does_not_follow_is_stated_whichever_tensor_is_off(traced: Store, name: str) -> None:
    found = {each: values.astype(np.float32) for each, values in traced.trace_block(3, 1, 1).items()}
    found[name] *= 1 + 0.1 * np.random.default_rng(0).normal(size=found[name].shape).astype(np.float32)
    matrices = traced.trace_weights(1)
    expected = {}
    for each, values in replayed(found, matrices).items():
        held = found[each.replace("resid", "resid_out")].astype(np.float64)
        expected[each] = np.abs(values - held).max() / np.abs(held).max()
    assert max(expected.values()) > 1e-3
    tensors = ({key: torch.from_numpy(np.array(each)) for key, each in both.items()} for both in (found, matrices))
    stated = replay_errors(*tensors)
    for each, error in expected.items():
        assert stated[each] == pytest.approx(error, rel=0.02, abs=2e-6)


def test_a_number_that_is_none_is_named_and_great_ones_are_none() -> None:
    great = torch.full((3,), 3e38)
    assert non_finite({"a": torch.ones(2), "b": great}) is None
    assert non_finite({"a": great, "b": torch.tensor([1.0, float("nan")])}) == "b"
    assert non_finite({"a": torch.tensor([float("inf")], dtype=torch.bfloat16), "b": -great}) == "a"
    assert non_finite({"a": torch.tensor([float("inf")]), "b": torch.tensor([-float("inf")])}) == "a"


# written beside the model


def captured(name: str) -> BlockTrace:
    return BlockTrace(name, {"x": torch.ones(2)}, "{}", {})


def test_a_block_is_written_while_the_next_is_computed_and_never_two() -> None:
    going, seen = threading.Event(), []

    def keep(name: str, content: bytes, _replay: Any) -> dict[str, Any]:
        assert going.wait(20), "written where it was handed over"
        seen.append(name)
        return {"bytes": len(content)}

    with TraceWriter(keep) as writer:
        writer.put([captured("a"), captured("b")])
        assert not seen
        going.set()
        writer.put([captured("c")])
        assert seen[:2] == ["a", "b"]
    assert list(writer.entries) == seen == ["a", "b", "c"]


def test_what_fails_while_a_trace_is_written_is_raised_and_hides_nothing() -> None:
    def keep(_name: str, _content: bytes, _replay: Any) -> dict[str, Any]:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), TraceWriter(keep) as writer:
        writer.put([captured("a")])
    with pytest.raises(OSError, match="full"), TraceWriter(keep) as writer:
        writer.put([captured("a")])
        writer.put([captured("b")])
        pytest.fail("went on")
    with pytest.raises(KeyError), TraceWriter(keep) as writer:
        writer.put([captured("a")])
        raise KeyError


def test_in_bfloat16_mlp_values_are_read_from_the_activations(half: Store, traced: Store) -> None:
    own = half._trace(3, 1, 0)[1].keys()
    assert not own & {f"{point}.{stream}" for point in ("mlp_in", "mlp_out") for stream in TRACE_STREAMS}
    found = half.trace_block(3, 1, 0)
    assert found.keys() == traced.trace_block(3, 1, 0).keys()
    assert found["mlp_in.txt"].dtype == found["q"].dtype == ml_dtypes.bfloat16
    assert found["r1.txt"].dtype == found["gate_mlp.img"].dtype == np.float32
    assert half.trace_weights(0)["to_v.weight"].dtype == ml_dtypes.bfloat16
    sigma = half.prompts().column("sigma")[3].as_py()[1]
    assert half.trace_facts(3, 1, 0)["sigma"] == sigma


def test_a_harvest_that_dies_among_traces_goes_on_to_the_same_bytes(
    traced: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = StoreWriter.put_trace, []

    def dies(self: StoreWriter, *args: Any) -> dict[str, Any]:
        calls.append(args[1])
        if len(calls) == 4:
            raise Interrupted("killed")
        return put(self, *args)

    monkeypatch.setattr(StoreWriter, "put_trace", dies)
    with pytest.raises(Interrupted):
        harvest(tmp_path / "store", **TRACE)
    assert len(list((tmp_path / "store" / "traces").rglob("*.safetensors"))) == 3
    assert {each.kind for each in verify(tmp_path / "store").findings} == {"unfinished"}
    run(HarvestSettings(resume=tmp_path / "store"))
    assert tree(tmp_path / "store") == tree(Path(traced.path))


@pytest.mark.parametrize("which", [3, 6])
def test_a_part_that_is_lost_among_its_traces_or_at_the_last_is_drawn_again(
    which: int, traced: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, calls = StoreWriter.put_trace, []

    def loses(self: StoreWriter, *args: Any) -> dict[str, Any]:
        calls.append(args[1])
        if len(calls) == which:
            raise LostLeaseError("part-00000 was taken over by another process")
        return put(self, *args)

    monkeypatch.setattr(StoreWriter, "put_trace", loses)
    harvest(tmp_path / "store", **TRACE)
    assert tree(tmp_path / "store") == tree(Path(traced.path))
    assert "taken over" in "".join(capsys.readouterr())


# the plan and what is asked wrongly


def test_the_plan_tells_the_bytes_of_traces(traced: Store, half: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for store, options in ((traced, {}), (half, {"dtype": "bfloat16"})):
        plan = make_plan(HarvestSettings(plan=True, **SMALL, **TRACE, **options))  # type: ignore[arg-type]
        planned = volume_of(plan).by_kind(1, new=True)
        assert planned["traces"] == pytest.approx(store.trace_bytes, rel=0.05)
        held = sum(file.stat().st_size for file in (Path(store.path) / "weights").iterdir())
        assert planned["weights"] == pytest.approx(held, rel=0.02)
    run(HarvestSettings(plan=True, **SMALL, **TRACE))
    shown = capsys.readouterr().out
    assert "images 1,3-4 at step 1, blocks 0-1, float32; 3 images now" in shown
    assert "attention matrices of traced blocks: 2 of" in shown


def test_files_and_folders_of_traces_are_planned_as_they_are_written(traced: Store) -> None:
    volume = volume_of(make_plan(HarvestSettings(plan=True, **SMALL, **TRACE)))
    below = list(Path(traced.path).rglob("*"))
    assert volume.files(1, new=True) == sum(each.is_file() for each in below)
    assert volume.folders + volume.trace_folders(1) == sum(each.is_dir() for each in below) + 1
    held = sum(-(-each.stat().st_size // 4096) * 4096 for each in below if each.is_file())
    assert volume.on_disk(1, True, 4096) == pytest.approx(held, rel=0.1)


def test_traces_are_charged_to_the_parts_that_have_them() -> None:
    plan = make_plan(HarvestSettings(plan=True, **{**SMALL, **TRACE, "images": 256, "trace_images": "1,130-139"}))
    volume = volume_of(plan)
    assert volume.traced == (1, 0, 10, 0)
    assert volume_of(plan, [2, 3]).traced == (10, 0)
    differences = [volume.on_disk(parts + 1, True, 1) - volume.on_disk(parts, True, 1) for parts in range(6)]
    assert differences[1] == differences[3] == differences[5] < differences[0] < differences[2]
    assert differences[2] - differences[1] == 10 * (differences[0] - differences[1])
    for parts in range(7):
        size = volume.on_disk(parts, True, 512)
        assert [volume.parts_within(size + more, True, 512) for more in (-1, 0)] == [max(parts - 1, 0), parts]
        assert volume.trace_folders(parts) == (0, 3, 3, 23, 23, 23, 23)[parts]


def test_a_budget_holds_the_parts_whose_traces_fit_and_names_traces_where_none_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = {**SMALL, **TRACE, "images": 640, "trace_images": "0-639", "trace_steps": "all"}
    plan = make_plan(HarvestSettings(plan=True, **asked))
    for parts in (1, 3):
        size = volume_of(plan).on_disk(parts, True, 1)
        assert images_within(plan, size) == 64 * parts and images_within(plan, size - 1) == 64 * (parts - 1)
    run(HarvestSettings(plan=True, budget="30MB", **asked))
    words = "fewer --trace-images, fewer --trace-steps, or --trace-dtype bfloat16"
    assert words in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(GranaryError, match=f"of that are traces of 640 images: {words}"):
        refuse_what_does_not_fit(volume_of(plan), Disk(Path("/"), 10**8, None, 4096), 10, True)


def test_an_extension_says_that_none_of_its_images_are_traced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {**SMALL, **TRACE, "images": 128, "trace_images": "1-2"}
    plan = make_plan(HarvestSettings(plan=True, **asked))
    announce(plan, tmp_path, [1], measure=False)
    assert "traces    of images 1-2, none of those now" in capsys.readouterr().out
    (tmp_path / "commits").mkdir()
    (tmp_path / layout.part_commit(0)).touch()
    announce(plan, tmp_path, [1], measure=False)
    assert "traces    images 1-2 are traced already; none of the new ones" in capsys.readouterr().out
    announce(plan, tmp_path, [0], measure=False)
    assert "none of" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_extended_harvest_is_the_one_that_was_made_at_once(tmp_path: Path) -> None:
    small = {"height": 32, "width": 32, "num_inference_steps": 1, "layers": "0", "batch_size": 32}
    options = {**small, "trace": True, "trace_images": "1,3"}
    harvest(tmp_path / "once", **{**options, "images": 128})
    harvest(tmp_path / "grown", **{**options, "images": 64})
    before = tree(tmp_path / "grown")
    run(HarvestSettings(extend=tmp_path / "grown", images=128))
    after = tree(tmp_path / "grown")
    assert after != before and after == tree(tmp_path / "once")


@pytest.mark.parametrize("way", ["resume", "extend", "out"])
def test_a_store_without_traces_cannot_get_them(plain: Store, way: str) -> None:
    settings = dict(SMALL) if way == "out" else {"images": 64} if way == "extend" else {}
    with pytest.raises(UsageError, match=r"was begun without traces and cannot get them: .* of their own with --out$"):
        run(HarvestSettings(**{way: Path(plain.path)}, **settings, trace=True, trace_images="0"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leave out --trace, --seed"):
        run(HarvestSettings(resume=Path(plain.path), seed=1, trace=True))


def test_matrices_of_traces_are_no_difference_of_their_own(traced: Store) -> None:
    with pytest.raises(UsageError, match=r"traces\.blocks: there") as caught:
        harvest(Path(traced.path), **{**TRACE, "trace_blocks": "0"})
    assert "traces.weights" not in str(caught.value)
