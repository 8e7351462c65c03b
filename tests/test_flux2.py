"""FLUX.2's double and single blocks are harvested: what is captured equals a forward written by hand, and the whole line runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyze import everything
from analyze.settings import AllSettings
from harvest import HarvestSettings, run
from harvest.capture import Captured
from harvest.models.loading import load_pipeline
from harvest.sample import Sampler
from store import Site, Store, open_store
from store.errors import UsageError
from store.pack import PackSettings
from store.pack import run as pack
from tests import small_models
from tests.flux2_by_hand import flux2_mlps
from train import TrainSettings
from train import run as train

PROMPTS = ["a small red circle on a blue background", "green cross"]
SITES = tuple(Site.parse(f"{stream}_{layer}") for stream in ("img", "txt", "joint") for layer in (0, 1))
LENGTH, STEPS = 40, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.flux2_klein(tmp_path_factory.mktemp("flux2") / "klein")


def harvest(model: Path, out: Path, **options: Any) -> Store:
    defaults: dict[str, Any] = {
        "prompts": "builtin:shapes", "images": 6, "resolution": 32, "num_inference_steps": STEPS, "layers": "all,single:all",
        "max_sequence_length": LENGTH, "batch_size": 4, "threads": 1, "pictures": "none",
    }  # fmt: skip
    run(HarvestSettings(out=out, model=str(model), **{**defaults, **options}))
    return open_store(out)


def test_what_is_captured_is_a_forward_written_by_hand(model: Path) -> None:
    pipe = load_pipeline(HarvestSettings(out=Path("unused"), model=str(model)), torch.device("cpu"), "float32")
    seen: list[Captured] = []
    sampler = Sampler(pipe, SITES, 32, 24, STEPS, LENGTH, 0.0, False)
    drawn = sampler.draw(PROMPTS, [0, 1], lambda _step, captured: seen.append(captured))
    for step, captured in enumerate(seen):
        assert captured.inputs is not None
        with torch.no_grad():
            expected = flux2_mlps(pipe.transformer, captured.inputs)
        assert set(expected) == {(str(site), point) for site, point in captured.values}
        for (site, point), values in captured.values.items():
            torch.testing.assert_close(values, expected[str(site), point], atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(drawn.sigma[:, step], drawn.scheduler_sigma[:, step], rtol=1e-5)


def test_the_text_is_the_chat_and_its_pieces_can_be_read(model: Path, tmp_path: Path) -> None:
    store = harvest(model, tmp_path / "store", images=2, text_tokens="real", pictures="png")
    assert store.meta.model["architecture"] == "flux2" and store.picture(1) is not None
    for row in store.prompts().to_pylist():
        said = "".join(row["text_pieces"]).replace("▁", " ")
        assert said == f"<|im_start|>user↵{row['prompt']}<|im_end|>↵<|im_start|>assistant↵"
        assert len(row["text_ids"]) == row["text_length"] == len(row["text_pieces"])


@pytest.mark.slow
def test_the_whole_line_runs(model: Path, tmp_path: Path) -> None:
    store = harvest(model, tmp_path / "store", images=40, batch_size=20, text_tokens="real+2", layers="1,single:1")
    assert store.sites == tuple(Site.parse(f"{stream}_1") for stream in ("img", "txt", "joint"))
    for split in ("train", "val"):
        pack(PackSettings(store=store.path, out=tmp_path / split, split=split))
    train(
        TrainSettings(
            pack=tmp_path / "train", val=tmp_path / "val", out=tmp_path / "d", sites="img_1,joint_1", activation="topk", k=8,
            expansion=2, batch=512, epochs=1, lr=5e-3, threads=1, time_embed_dim=16,
        )
    )  # fmt: skip
    found = everything.run(
        AllSettings(store=Path(store.path), dictionaries=tmp_path / "d", out=tmp_path / "a", images="all")
    )
    assert found.scores.computed == 2 * STEPS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"targets": "recomputed"}, "the MLPs of a Flux2KleinPipeline are gated"),
        ({"guidance": 4.0}, "harvested without guidance"),
        ({"trace": True}, "circuits know only FLUX.1's double blocks"),
    ],
)
def test_what_it_has_not_is_refused_before_its_weights_are_read(
    model: Path, tmp_path: Path, asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harvest.planning.plan.load_weights", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(UsageError, match=message):
        harvest(model, tmp_path / "store", **asked)
