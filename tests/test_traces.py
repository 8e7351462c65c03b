"""Traces hold what the model did, and a harvest with them is the harvest without them beside its traces."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor

from harvest import HarvestSettings, run
from harvest.estimate import volume_of
from harvest.model import TINY_FLUX_FOLDER
from harvest.plan import make_plan
from harvest.runs import restored
from harvest.settings import OF_TRACES
from store import Store, UsageError, open_store
from store.care.verify import verify
from store.errors import Interrupted, LostLeaseError
from store.traces import TRACE_STREAMS, trace_files
from store.writer import StoreWriter
from tests.test_harvest import command
from tests.test_store import tree

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
def half(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Computed in bfloat16, so that MLP values lie with the activations."""
    return harvest(tmp_path_factory.mktemp("half") / "store", **TRACE, dtype="bfloat16")


def test_activations_are_the_same_bytes_with_traces_and_without(traced: Store, tmp_path: Path) -> None:
    harvest(tmp_path / "store")
    plain, there = tree(tmp_path / "store"), tree(Path(traced.path))
    same = ("activations/", "prompts/", "statistics/")
    assert plain.keys() <= there.keys()
    assert all(there[name] == data for name, data in plain.items() if name.startswith(same))
    more = {name for name in there.keys() - plain.keys() if not name.startswith("weights/")}
    assert more == set(trace_files(traced.meta, range(5)))
    assert b"traces" not in plain["zarr.json"]
    assert verify(traced.place).ok


class Oracle:
    """What plain diffusers did in one run, read where it happens and not by our hooks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store, image: int) -> None:
        from diffusers import FluxPipeline

        self.joint: list[tuple[Tensor, Tensor]] = []
        self.blocks: list[dict[str, Tensor]] = []
        dispatch, forward = transformer_flux.dispatch_attention_fn, transformer_flux.FluxTransformerBlock.forward

        def attend(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
            self.joint.append((query[0].clone(), key[0].clone()))
            return dispatch(query, key, value, **rest)  # type: ignore[no-any-return]

        def block(
            module: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any
        ) -> tuple[Tensor, Tensor]:
            out = forward(module, hidden_states, encoder_hidden_states, **rest)
            seen = {"resid.img": hidden_states, "resid.txt": encoder_hidden_states}
            seen |= {"resid_out.txt": out[0], "resid_out.img": out[1]}
            self.blocks.append({name: value[0].clone() for name, value in seen.items()})
            return out  # type: ignore[no-any-return]

        monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", attend)
        monkeypatch.setattr(transformer_flux.FluxTransformerBlock, "forward", block)
        dtype = torch.bfloat16 if store.meta.dtype == "bfloat16" else torch.float32
        pipe = FluxPipeline.from_pretrained(TINY_FLUX_FOLDER, dtype=dtype, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        row = store.prompts().slice(image, 1).to_pylist()[0]
        pipe(
            row["prompt"], height=48, width=64, num_inference_steps=2, guidance_scale=0.0, max_sequence_length=16,
            generator=torch.Generator("cpu").manual_seed(row["seed"]), output_type="latent",
        )  # fmt: skip
        doubles, singles = len(pipe.transformer.transformer_blocks), len(pipe.transformer.single_transformer_blocks)
        self.joint, self.blocks = self.joint[doubles + singles :], self.blocks[doubles:]  # those of step 1


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
            assert error <= most and abs(error - stated[name]) < max(0.02 * error, 1e-6)
    worst = store.replay_errors()
    assert set(worst) == {"attn", "mlp_in", "resid"}
    assert all(least <= error <= most for error in worst.values())


def _leaving(store: Store, block: int, name: str) -> np.ndarray:
    stream = name.partition(".")[2]
    if block == 1:
        return store.trace_block(3, 1, 1)[f"resid_out.{stream}"]
    return store.trace_block(3, 1, block + 1)[f"resid.{stream}"]


def test_in_bfloat16_mlp_values_are_read_from_the_activations(half: Store, traced: Store) -> None:
    own = set(half._tensors("x", half._trace_data(3, 1, 0)[1])[0])
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


def test_a_part_that_is_lost_among_its_traces_is_drawn_again(
    traced: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, calls = StoreWriter.put_trace, []

    def loses(self: StoreWriter, *args: Any) -> dict[str, Any]:
        calls.append(args[1])
        if len(calls) == 3:
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trace_images": "3-5"}, "--trace-images 3-5: there is no image 5: there are 5.*--images"),
        ({"trace_images": "x"}, "--trace-images x: 'x' .*is no image"),
        ({"trace_steps": "2"}, "--trace-steps 2: there is no step 2"),
        ({"trace_steps": "0-1", "steps": "1"}, r"--trace-steps 0-1: step 0 is not harvested, only 1 are \(--steps\)"),
        ({"trace_blocks": "1-2"}, "--trace-blocks 1-2: .*from 0 without a gap: write --trace-blocks 0-2"),
        ({"trace_blocks": "0-40"}, "--trace-blocks 0-40: there is no block .*tiny-flux has double blocks 0 to"),
        ({"trace_blocks": "single:0-3"}, "only double blocks can be traced"),
        ({"layers": "single:0"}, "single-stream blocks are not harvested yet"),
    ],
)
def test_what_cannot_be_traced_is_said_before_anything_is_written(
    tmp_path: Path, options: dict[str, str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        harvest(tmp_path / "store", **{**TRACE, **options})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", OF_TRACES)
def test_flags_of_traces_want_trace(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} says what to trace: give --trace as well"):
        HarvestSettings(plan=True, **{name: "float32" if name == "trace_dtype" else "0"})  # type: ignore[arg-type]


def test_the_command_line_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", str(tmp_path / "store"), "--trace-images", "0") == 2
    assert "give --trace as well" in capsys.readouterr().err


def test_blocks_beyond_the_layers_can_be_traced_and_defaults_are_written_down(tmp_path: Path) -> None:
    store = harvest(
        tmp_path / "store", images=2, layers="0", streams="img", steps="1", trace=True, trace_blocks="0-1",
        trace_dtype="bfloat16",
    )  # fmt: skip
    assert store.traced is not None
    assert store.traced.text() == "images 0-1 at step 1, blocks 0-1, bfloat16"
    found = store.trace_block(1, 1, 1)
    assert found["mlp_in.txt"].shape[0] == 16 and found["mlp_in.img"].shape[0] == 48
    again = restored(HarvestSettings(resume=tmp_path / "store"))
    assert (again.trace, again.trace_images, again.trace_blocks) == (True, "0-1", "0-1")
    facts = json.loads((tmp_path / "store" / "zarr.json").read_bytes())["attributes"]["granary"]["traces"]
    assert (facts["images"], facts["steps"], facts["blocks"], facts["dtype"]) == ("0-1", [1], [0, 1], "bfloat16")
