"""What makes a model of 12 billion parameters fit changes no byte: offloading, encoders that are gone, a VAE that is not needed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from harvest import HarvestSettings, run, runs
from harvest.capture import capture
from harvest.models.ahead import encoded_alone
from harvest.models.architectures import architecture_of, sites_of
from harvest.models.loading import load_frame, load_weights, place
from harvest.models.model import KNOWN_SHAPES, choose_device, geometry_of, tensors_hash
from harvest.models.text import encode
from harvest.models.weights import weights_files
from harvest.planning.plan import _text_length, make_plan
from harvest.sample import Sampler
from harvest.settings import SCHNELL
from store import Site, layout, open_store
from store.errors import GranaryError, UsageError
from tests.small_models import flux_dev, sd3

CPU = torch.device("cpu")
DRAW: dict[str, Any] = {
    "prompts": "builtin:shapes", "images": 6, "batch_size": 4, "resolution": 32, "max_sequence_length": 16, "threads": 1,
    "num_inference_steps": 2, "guidance": 0.0, "tokens": "5", "text_tokens": "real+1",
}  # fmt: skip
PROMPTS = ["a small red circle on a blue background", "a large green square on a white background"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_dev(tmp_path_factory.mktemp("dev") / "model")


@pytest.fixture(scope="module")
def resident(model: Path) -> Path:
    out = model.parent / "resident"
    run(HarvestSettings(out=out, model=str(model), **DRAW))
    return out


def same(one: Path, other: Path) -> bool:
    files = [{p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()} for top in (one, other)]
    return files[0] == files[1] and len(files[0]) > 10


def loaded(model: Path, **options: Any) -> Sampler:
    settings = HarvestSettings(out=Path("unused"), model=str(model), **options)
    frame = load_frame(settings)
    assert {p.device.type for part in ("transformer", "vae") for p in getattr(frame.pipe, part).parameters()} == {
        "meta"
    }
    pipe = load_weights(settings, frame, "float32", frame.parts)
    return Sampler(pipe, sites_of(architecture_of(pipe), pipe.transformer), 32, 32, 2, 16, 0.0, True)


def captured(sampler: Sampler, prompts: list[str] = PROMPTS) -> dict[Any, torch.Tensor]:
    found: dict[Any, torch.Tensor] = {}
    drawn = sampler.draw(
        prompts,
        list(range(len(prompts))),
        lambda step, taken: found.update({(step, *key): value.clone() for key, value in taken.values.items()}),
        latents=True,
    )
    assert drawn.latents is not None
    return found | {"latents": drawn.latents}


def equal(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def plain(model: Path) -> dict[Any, torch.Tensor]:
    return captured(loaded(model))


def test_encoders_that_went_first_leave_the_same_store_and_are_asked_once(
    model: Path, resident: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first: dict[str, Any] = {"out": tmp_path / "s", "model": str(model), "text_encoders": "first", **DRAW}
    run(HarvestSettings(**first))
    assert same(resident, tmp_path / "s")
    said = capsys.readouterr().out
    assert said.count("all sites") == 1 and said.index("all sites") < said.index("text embeddings, batch by batch")
    monkeypatch.setattr("harvest.models.ahead.encode", lambda *_: pytest.fail("encoded twice"))
    (tmp_path / "s" / "seal.json").unlink()
    (tmp_path / "s" / "commits" / "part-00000.json").unlink()  # a run that is killed before it commits
    run(HarvestSettings(resume=tmp_path / "s"))
    assert same(resident, tmp_path / "s")
    assert "was begun with --text-encoders first, and goes on so" in capsys.readouterr().out


def test_nothing_is_encoded_for_a_store_of_another_run_or_a_full_disk_and_nothing_is_left_beside(
    model: Path, resident: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harvest.planning.plan.encode_first", lambda *_: pytest.fail("prompts were encoded"))
    asked: dict[str, Any] = {**DRAW, "model": str(model), "text_encoders": "first"}
    with pytest.raises(UsageError, match="holds another run"):
        run(HarvestSettings(**{**asked, "seed": 9, "out": resident}))
    assert not list(layout.runs_folder(resident).glob("embeddings"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(GranaryError, match="has 1 KB free"):
        run(HarvestSettings(**asked, out=tmp_path / "s"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_holds_the_model_as_the_first_one_did_unless_it_is_told_otherwise(
    resident: Path, tmp_path: Path
) -> None:
    meta, plain = open_store(resident).meta, HarvestSettings(out=tmp_path / "s", batch_size=4)
    runs.keep_settings(replace(plain, offload="group", text_encoders="first"), meta, False)
    asked = [HarvestSettings(resume=tmp_path / "s"), HarvestSettings(resume=tmp_path / "s", offload="model")]
    again, other = map(runs.restored, asked)
    assert (again.offload, again.text_encoders, other.offload, other.text_encoders) == (
        "group",
        "first",
        "model",
        "first",
    )
    assert runs.held_as_begun(asked[0], again) == "--offload group --text-encoders first"
    assert runs.held_as_begun(asked[1], other) == "--text-encoders first"
    assert runs.as_begun(plain, meta)  # it decides no byte
    assert (again.resolution, again.max_sequence_length) == (32, 16)  # whatever the cache says of the model later


def test_a_plan_with_encoders_first_keeps_no_encoder_writes_nothing_and_says_how_much_it_takes(
    model: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"model": str(model), "text_encoders": "first", "plan": True, **DRAW}
    plan = make_plan(HarvestSettings(out=tmp_path / "s", pictures="none", **asked))
    pipe = plan.sampler.pipe
    assert (pipe.text_encoder, pipe.text_encoder_2, pipe.vae) == (None, None, None) and not list(tmp_path.iterdir())
    assert plan.remarks[-1].startswith("text embeddings, batch by batch (2 of them)")
    whole = make_plan(HarvestSettings(plan=True, model=str(model), **DRAW))
    assert plan.meta.model == whole.meta.model and set(whole.meta.model["weights_sha256"]) == {
        "transformer", "text_encoder", "text_encoder_2", "vae",
    }  # fmt: skip


def test_a_prompt_of_several_images_is_encoded_once_and_alone_either_way(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "harvest.planning.plan.encode", lambda pipe, unit, n: asked.append(tuple(unit)) or encode(pipe, unit, n)
    )
    for name in ("resident", "first"):
        several: dict[str, Any] = {**DRAW, "seeds_per_prompt": 3, "text_encoders": name}
        run(HarvestSettings(out=tmp_path / name, model=str(model), **several))
    assert len(asked) == len(set(asked)) == 2 and all(len(unit) == 1 for unit in asked)
    assert same(tmp_path / "resident", tmp_path / "first")
    assert open_store(tmp_path / "first").meta.model["text_embeddings"] == "alone"


def test_a_store_that_was_begun_with_batches_goes_on_with_batches(resident: Path) -> None:
    assert not encoded_alone(HarvestSettings(out=resident, seeds_per_prompt=2))
    assert encoded_alone(HarvestSettings(out=resident.parent / "new", seeds_per_prompt=2))
    assert encoded_alone(HarvestSettings(out=resident.parent / "new", cycle=True))
    assert not encoded_alone(HarvestSettings(out=resident.parent / "new"))


@pytest.mark.parametrize("way", ["group", "model", "layer by layer"])
def test_values_are_the_same_wherever_weights_lie_between_passes(
    way: str, model: Path, plain: dict[Any, torch.Tensor]
) -> None:
    sampler = loaded(model)
    files = weights_files(sampler.pipe.transformer, sampler.sites)
    if way == "layer by layer":  # what diffusers' sequential offload does to each part
        cpu_offload(sampler.pipe.transformer, CPU, offload_buffers=True)
        assert {p.device.type for p in sampler.pipe.transformer.parameters()} == {"meta"}
    else:
        place(sampler.pipe, CPU, way)  # type: ignore[arg-type]
    assert equal(captured(sampler), plain) and equal(captured(sampler), plain)
    assert weights_files(sampler.pipe.transformer, sampler.sites) == files


def test_values_of_compiled_blocks_are_right_pass_after_pass_and_a_block_is_not_compiled_once_a_layer() -> None:
    import torch._dynamo
    from diffusers import FluxTransformer2DModel

    from harvest.models.compiling import compile_blocks

    torch._dynamo.reset()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=8, num_layers=5, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    sites = sites_of(architecture_of(transformer), transformer)

    def passes() -> list[dict[Any, torch.Tensor]]:
        found: list[dict[Any, torch.Tensor]] = []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            with capture(transformer, sites) as taken, torch.inference_mode():
                transformer(
                    hidden_states=torch.randn(2, 6, 8), encoder_hidden_states=torch.randn(2, 3, 16), timestep=torch.rand(2),
                    pooled_projections=torch.randn(2, 8), img_ids=torch.randn(6, 3), txt_ids=torch.zeros(3, 3),
                )  # fmt: skip
            found.append(taken.take().values)  # type: ignore[arg-type]
        return found

    plain = passes()
    compile_blocks(transformer, "eager")
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        compiled = passes()
    assert len(plain[0]) == 2 * len(sites) == 22 and not equal(plain[0], plain[1])
    assert all(map(equal, plain, compiled))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_harvest_is_that_of_the_plain_model_but_for_roundings(tmp_path: Path) -> None:
    for name in ("plain", "compiled", "again"):
        asked = {**DRAW, "resolution": None, "layers": "0,3", "store_dtype": "float32", "compile": name != "plain"}
        run(HarvestSettings(out=tmp_path / name, **asked))
    plain, compiled = open_store(tmp_path / "plain"), open_store(tmp_path / "compiled")
    assert compiled.meta.model["compiled"] == "inductor" and "compiled" not in plain.meta.model
    for site in map(Site.parse, plain.meta.sites):
        one, other = (store.read(site, 1, "mlp_out", 0, 6) for store in (plain, compiled))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.nanmax(np.abs(one)))
    assert same(tmp_path / "compiled", tmp_path / "again")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"offload": "group"}, "nowhere to offload them from"),
    ({"quantize": "nf4"}, "on a CPU choose int8wo or float8wo"),
    ({"quantize": "int8wo"}, "pip install torchao"),
    ({"compile": True}, r"needs a C\+\+ compiler"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_what_cannot_be_done_here_is_refused_before_anything_is_loaded(
    asked: dict[str, Any], said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("harvest.models.quantizing.find_spec", lambda _name: None)
    monkeypatch.setattr("harvest.planning.plan.load_frame", lambda *_: pytest.fail("the model was looked at"))
    with pytest.raises(UsageError, match=said):
        make_plan(HarvestSettings(out=tmp_path / "s", model=str(model), device="cpu", **asked))
    assert not list(tmp_path.iterdir())


def indexed(**parts: Any) -> Callable[[Path], object]:
    """Changes what a model's index says of parts."""

    def change(folder: Path) -> None:
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | parts))

    return change


def without_heads(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"num_attention_heads": 0}))


def without_words(folder: Path) -> None:
    for file in (folder / "tokenizer_2").glob("[!t]*"):
        file.unlink()
    (folder / "tokenizer_2" / "tokenizer.json").unlink()


def cut_short(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda folder: shutil.rmtree(folder / "tokenizer_2"),
        "has a tokenizer_2 .* nothing is in .*: fetch the model again",
    ),
    (without_words, "no vocabulary is in .*tokenizer_2: fetch the model again"),
    (indexed(text_encoder=[None, None]), r"names no text_encoder \(it says \[null, null\]\)"),
    (indexed(tokenizer=[None, None]), "names no tokenizer "),
    (indexed(transformer=[]), r"names no transformer \(it says \[\]\)"),
    (indexed(transformer=7), r"names no transformer \(it says 7\)"),
    (indexed(vae=None), "names no vae "),
    (without_heads, "0 attention heads"),
    (cut_short, "cannot be loaded"),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's, of a model without heads
@pytest.mark.parametrize(("damage", "said"), BROKEN)
def test_a_damaged_model_folder_is_refused_in_one_message(
    damage: Callable[[Path], object], said: str, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    damage(folder)
    for encoders in ("resident", "first") if damage is cut_short else ("resident",):
        with pytest.raises(UsageError, match=said):
            make_plan(HarvestSettings(plan=True, model=str(folder), text_encoders=encoders, **DRAW))  # type: ignore[arg-type]


def test_a_device_beyond_those_that_are_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"cuda:7: torch sees 1 CUDA device here"):
        choose_device("cuda:7")
    assert choose_device("cuda:0").index == 0 and choose_device(None).type == "cuda"


def test_sizes_follow_the_revision_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {"_class_name": "StableDiffusion3Pipeline"}
    monkeypatch.setattr(
        "harvest.models.defaults._configuration", lambda _model, _file, revision: tuned if revision == "R" else {}
    )
    sizes = []
    for revision in (None, "R"):
        settings = HarvestSettings(plan=True, model="someone/tuned", revision=revision)
        sizes.append((geometry_of(KNOWN_SHAPES[SCHNELL], settings).height, _text_length(settings)))
    assert sizes == [(512, 512), (1024, 256)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"compile": True, "trace": True}, "give one of them"),
        ({"compile": True, "offload": "group"}, "which --compile joins"),
        ({"quantize": "nf4", "offload": "sequential"}, "which --quantize nf4 joins or packs"),
        ({"quantize": "int8", "weights": "ref"}, "rounds activations too"),
        ({"quantize": "int8", "targets": "recomputed"}, "rounds activations too"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        HarvestSettings(out=Path("s"), **asked)
    assert HarvestSettings(out=Path("s"), quantize="int8").weights_policy == "none"


def test_layers_that_are_not_there_are_refused_before_weights_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harvest.planning.plan.load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="double blocks 0 to 1"):
        make_plan(HarvestSettings(plan=True, model=str(model), **{**DRAW, "layers": "7"}))


def test_a_quantised_weight_is_hashed_by_what_it_is_made_of() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    numbers, scale = torch.arange(4.0), torch.full((4,), 2.0)
    found = tensors_hash({"weight": TwoTensor(numbers, scale)})
    assert found == tensors_hash({"weight.a": numbers, "weight.b": scale})
    assert found != tensors_hash({"weight": TwoTensor(numbers, scale + 1)})


def test_an_encoder_that_a_model_lacks_is_not_looked_for(tmp_path: Path) -> None:
    folder = sd3(tmp_path / "m", with_t5=False)
    asked: dict[str, Any] = {**DRAW, "images": 2, "guidance": 4.0, "model": str(folder), "layers": "0"}
    for name in ("resident", "first"):
        run(HarvestSettings(out=tmp_path / name, text_encoders=name, **asked))  # type: ignore[arg-type]
    assert same(tmp_path / "resident", tmp_path / "first")
    assert "text_encoder_3" not in open_store(tmp_path / "first").meta.model["weights_sha256"]


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_on_a_gpu_offloading_changes_no_value(offload: str, model: Path) -> None:
    cuda = torch.device("cuda")
    there, moved = loaded(model), loaded(model)
    place(there.pipe, cuda)
    place(moved.pipe, cuda, offload)  # type: ignore[arg-type]
    expected = captured(there)
    files = weights_files(there.pipe.transformer, there.sites)
    assert equal(captured(moved), expected) and equal(captured(moved), expected)
    assert weights_files(moved.pipe.transformer, moved.sites) == files
