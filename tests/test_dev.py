"""FLUX.1[dev]'s ways, on a tiny pipeline of its shape: guidance embedding, many steps of which few are kept, a shifted schedule."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyze.circuits.command import run as graph
from analyze.circuits.graph import Graph
from analyze.circuits.settings import GraphSettings
from analyze.pictures.settings import SheetSettings
from analyze.pictures.sheets import run as sheet
from analyze.scan.discovery import run as scan
from analyze.scan.settings import ScanSettings
from analyze.scoring.scores import run as scores
from analyze.scoring.settings import ScoresSettings
from analyze.steering.command import run as steer
from analyze.steering.settings import SteerSettings
from harvest import HarvestSettings
from harvest import run as harvest
from harvest.models.defaults import defaults_of, guidance_of, steps_of
from harvest.settings import DEV, SCHNELL, TINY_FLUX
from store import Site, Store, UsageError, open_store
from store.care.verify import verify
from store.info import describe
from store.pack import PackSettings
from store.pack import run as pack
from tests.small_models import flux_dev
from tests.test_traces import replayed
from train import TrainSettings
from train import run as train
from train.dictionaries.checkpoint import load_dictionary

STEPS, KEPT, GUIDANCE = 20, (3, 13, 19), 3.5
DRAW: dict[str, Any] = {
    "prompts": "builtin:shapes", "images": 24, "resolution": 32, "max_sequence_length": 16, "threads": 1, "batch_size": 12,
    "num_inference_steps": STEPS, "steps": "3,13,19", "guidance": GUIDANCE,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_dev(tmp_path_factory.mktemp("dev") / "model")


@pytest.fixture(scope="module")
def store(model: Path) -> Store:
    """24 images at 32 pixels, of which two are traced."""
    out = model.parent / "store"
    harvest(HarvestSettings(out=out, model=str(model), **DRAW, trace=True, trace_images="1-2"))
    return open_store(out)


@pytest.fixture(scope="module")
def dictionaries(store: Store) -> Path:
    """Transcoders of the four sites, trained from a pack of the store."""
    folder = Path(store.path).parent
    assert pack(PackSettings(store=store.path, out=folder / "pack", memory="200MB")) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.trainer.sweep.save", lambda _out: [])  # pictures of the training, which nobody looks at
        train(TrainSettings(pack=folder / "pack", out=folder / "d", k=8, activation="topk", expansion=4, batch=256))
    return folder / "d"


def shifted(height: int, width: int) -> np.ndarray:
    """Sigmas of 20 steps by hand: the more image tokens, the longer the schedule stays where there is much noise."""
    tokens = (height // 8) * (width // 8)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    even = [1 - step / STEPS for step in range(STEPS)]  # 1, 0.95, … 0.05
    return np.array([math.exp(mu) / (math.exp(mu) + 1 / sigma - 1) for sigma in even])


def sigmas(store: Store) -> np.ndarray:
    return np.array(store.prompt_columns("sigma").column("sigma").to_pylist())


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_sigma_as_received_is_the_schedule_shifted_for_the_resolution(
    size: tuple[int, int], store: Store, model: Path, tmp_path: Path
) -> None:
    if size != (32, 32):
        other = {**DRAW, "images": 1, "resolution": None, "height": size[0], "width": size[1], "layers": "0"}
        harvest(HarvestSettings(out=tmp_path / "s", model=str(model), **other))
        store = open_store(tmp_path / "s")
    expected = shifted(*size)
    np.testing.assert_allclose(sigmas(store), np.tile(expected, (store.n_images, 1)), rtol=2e-6)
    assert np.abs(expected - shifted(512, 512)).max() > 0.02  # or the resolution would say nothing
    assert f"schedule shifted for {size[0] * size[1] // 64} image tokens" in describe(store)


def test_in_bfloat16_sigma_is_what_the_rounded_timestep_gave(model: Path, tmp_path: Path) -> None:
    harvest(HarvestSettings(out=tmp_path / "s", model=str(model), **{**DRAW, "images": 1, "dtype": "bfloat16"}))
    rounded = torch.tensor(shifted(32, 32) * 1000, dtype=torch.float32).bfloat16() / 1000
    found = sigmas(open_store(tmp_path / "s"))[0]
    np.testing.assert_array_equal(found.astype(np.float32), rounded.float().numpy())
    assert np.abs(found - shifted(32, 32)).max() > 1e-4


def test_chosen_steps_alone_are_kept_and_the_store_is_whole(store: Store) -> None:
    assert (store.steps, store.meta.num_inference_steps, store.meta.guidance) == (KEPT, STEPS, GUIDANCE)
    assert sigmas(store).shape == (24, STEPS)
    assert verify(store.path).ok
    folders = {path.name for path in (Path(store.path) / "activations/double.00/img").iterdir() if path.is_dir()}
    assert folders == {f"step.{step}" for step in KEPT}
    assert "20 steps of FlowMatchEulerDiscreteScheduler, guidance 3.5, schedule shifted" in describe(store)
    assert "steps kept: 3, 13, 19" in describe(store)


def embedded(transformer: Any, sigma: float, guidance: float, pooled: torch.Tensor) -> torch.Tensor:
    """temb by hand: the sinusoids of 1000 sigma and of 1000 guidance, each through its own MLP, and the pooled text through its own."""

    def sinusoids(value: float) -> torch.Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = torch.tensor(value, dtype=torch.float32) * frequencies
        return torch.cat([angles.cos(), angles.sin()])

    def mlp(layers: Any, values: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(layers.linear_1.weight @ values + layers.linear_1.bias)
        return layers.linear_2.weight @ hidden + layers.linear_2.bias  # type: ignore[no-any-return]

    of = transformer.time_text_embed
    times = mlp(of.timestep_embedder, sinusoids(1000 * sigma))
    return times + mlp(of.guidance_embedder, sinusoids(1000 * guidance)) + mlp(of.text_embedder, pooled)


def test_traced_modulations_are_those_of_an_embedding_with_guidance_and_blocks_replay(
    store: Store, model: Path
) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    prompt = store.prompts()["prompt"][1].as_py()
    with torch.inference_mode():
        _, pooled, _ = pipe.encode_prompt(prompt, None, device="cpu", max_sequence_length=16)
        for step in KEPT:
            made = {
                guidance: embedded(pipe.transformer, sigmas(store)[1, step], guidance, pooled[0])
                for guidance in (GUIDANCE, 0.0)
            }
            for block, stream in ((0, "img"), (1, "txt")):
                held = store.trace_block(1, step, block)
                norm = pipe.transformer.transformer_blocks[block]
                norm = norm.norm1 if stream == "img" else norm.norm1_context
                names = [f"{n}_{m}.{stream}" for m in ("msa", "mlp") for n in ("shift", "scale", "gate")]
                traced = np.concatenate([held[name] for name in names])
                with_guidance, without = (
                    (norm.linear.weight @ torch.nn.functional.silu(temb) + norm.linear.bias).numpy()
                    for temb in made.values()
                )
                np.testing.assert_allclose(traced, with_guidance, rtol=1e-4, atol=1e-4)
                assert np.abs(traced - without).max() > 0.01  # a trace without guidance would not do
                for name, values in replayed(held, store.trace_weights(block)).items():
                    if not name.startswith("resid"):
                        np.testing.assert_allclose(values, held[name], rtol=0, atol=5e-6 * np.abs(held[name]).max())
    assert max(store.replay_errors().values()) < 5e-6


def test_scores_sheets_over_steps_temporal_scans_graphs_and_steering_follow(
    store: Store, dictionaries: Path, model: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"store": Path(store.path), "dictionaries": dictionaries}
    assert scores(ScoresSettings(**given, out=tmp_path / "a")).computed == 4 * len(KEPT)
    dictionary, site = load_dictionary(dictionaries / "transcoder_img_1"), Site.parse("img_1")
    rows = store.read(site, 13, "mlp_in", 1, 2)[0].astype(np.float32)
    sigma = torch.full((len(rows),), float(sigmas(store)[1, 13]))
    with torch.no_grad():
        feature = int(dictionary.encode(torch.from_numpy(rows), sigma).amax(0).argmax())
    drawn = sheet(
        SheetSettings(**given, out=tmp_path / "a", sites="img_1", features=str(feature), images="1", over_steps=True)
    )
    assert len(drawn) == 1 and drawn[0].stat().st_size > 1000
    best = scan(ScanSettings(**given, out=tmp_path / "a", kind="temporal"))[0]
    assert {f"step_{step}" for step in KEPT} <= best.keys() and best["step"] in KEPT

    target = (f"img_1:max:{feature}",)
    asked = GraphSettings(**given, out=tmp_path / "g", image=1, step=13, target=target, nodes=6, check=True, page=False)
    (made,) = graph(asked).made
    assert made.check is not None and not made.check.worst
    facts = Graph.read(tmp_path / "g").facts
    assert facts["step"] == 13 and facts["sigma"] == pytest.approx(shifted(32, 32)[13])

    amplified = {
        "images": "1",
        "edit": (f"amplify:8 img_1:{feature} @steps=3,13",),
        "model": str(model),
        "clip": "none",
    }
    steer(SteerSettings(**given, out=tmp_path / "s", **amplified))
    drawing = (tmp_path / "s" / "experiment.yaml").read_text()
    assert "guidance: 3.5" in drawing and "num_inference_steps: 20" in drawing


def test_steps_and_guidance_are_by_default_those_of_the_models_own_pipeline(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (str(model), DEV):
        asked = HarvestSettings(plan=True, model=name)
        assert (steps_of(asked), guidance_of(asked)) == (28, 3.5)
        assert guidance_of(HarvestSettings(plan=True, model=name, guidance=0.0)) == 0.0
    for name in (SCHNELL, TINY_FLUX, "someone/else"):
        assert (defaults_of(name).num_inference_steps, defaults_of(name).guidance) == (4, 0.0)
    few = {**DRAW, "images": 2, "num_inference_steps": None, "guidance": None, "steps": "27"}
    harvest(HarvestSettings(plan=True, model=str(model), **few))
    shown = capsys.readouterr().out
    assert "in 28 steps (kept: 27), guidance 3.5" in shown
    assert "--num-inference-steps 28 and --guidance 3.5, as this model's own pipeline has it" in shown
    with pytest.raises(UsageError, match="step 28"):
        harvest(HarvestSettings(plan=True, model=str(model), **{**few, "steps": "28"}))


def test_a_harvest_that_is_resumed_has_the_steps_that_it_was_begun_with(model: Path, tmp_path: Path) -> None:
    few = {**DRAW, "images": 1, "num_inference_steps": None, "guidance": None, "steps": "0", "layers": "0"}
    harvest(HarvestSettings(out=tmp_path / "s", model=str(model), **few))
    saved = json.loads((tmp_path / "s.runs" / "settings.json").read_text())
    assert (saved["num_inference_steps"], saved["guidance"]) == (28, 3.5)
    harvest(HarvestSettings(resume=tmp_path / "s"))
    assert open_store(tmp_path / "s").meta.guidance == 3.5
