"""A store's step k is one pass of the transformer: schedulers with which it is not are refused before weights are read."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest

from harvest import HarvestSettings
from harvest.models.architectures import FLUX, FLUX2, SD3, Architecture
from harvest.models.loading import load_frame, load_weights
from harvest.models.pipelines import refuse_scheduler
from harvest.planning import plan as planning
from harvest.planning.choosing import asked_layers
from harvest.planning.plan import make_outline, make_plan
from harvest.sample import Sampler
from harvest.settings import SCHNELL
from store.errors import GranaryError, UsageError
from tests import small_models

OK = ""
FITS: list[tuple[Architecture, str, dict[str, Any], str]] = [
    (SD3, "FlowMatchEulerDiscreteScheduler", {}, OK),
    (SD3, "FlowMatchHeunDiscreteScheduler", {}, "of order 2: it runs the transformer more than once a step"),
    (SD3, "DDIMScheduler", {}, "knows no sigmas of its own"),
    (SD3, "EulerDiscreteScheduler", {}, OK),
    (FLUX, "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, OK),
    (FLUX, "FlowMatchHeunDiscreteScheduler", {}, "FluxPipeline is a FlowMatchHeunDiscreteScheduler of order 2"),
    (FLUX, "DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, OK),
    (FLUX, "DPMSolverMultistepScheduler", {}, "knows no sigmas, by which noise levels are set"),
    (FLUX2, "EulerDiscreteScheduler", {}, "knows no mu, by which"),
]


@pytest.mark.parametrize(("family", "name", "options", "message"), FITS)
def test_schedulers_that_a_pipeline_cannot_drive_step_by_step_are_refused(
    family: Architecture, name: str, options: dict[str, Any], message: str
) -> None:
    pipe = SimpleNamespace(scheduler=getattr(diffusers, name)(**options))
    if message == OK:
        refuse_scheduler(pipe, family)
    else:
        with pytest.raises(UsageError, match=f"{message}.*give a folder whose scheduler is a FlowMatchEuler"):
            refuse_scheduler(pipe, family)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.sd3(tmp_path_factory.mktemp("scheduled") / "sd3", with_t5=False, dual=())


def test_a_scheduler_of_second_order_is_refused_before_weights_are_read(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "heun", ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchHeunDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    diffusers.FlowMatchHeunDiscreteScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(UsageError, match="of order 2"):
        make_plan(HarvestSettings(plan=True, model=str(folder), images=2, resolution=32, threads=1))


def test_a_pipeline_that_ends_more_steps_than_it_was_asked_for_is_not_harvested(model: Path) -> None:
    settings = HarvestSettings(plan=True, model=str(model))
    frame = load_frame(settings)
    pipe = load_weights(settings, frame, "float32", frame.parts)
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    pipe.scheduler.order = 1  # one that says nothing of it
    sampler = Sampler(pipe, (), 32, 32, 3, 16, 0.0, False)
    with pytest.raises(GranaryError, match="ended 5 steps where 3 were asked for"):
        sampler.draw(["red circle"], [0], lambda *_: None)


def test_single_blocks_of_a_model_with_rounded_activations_are_refused_before_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "load_frame", lambda *_: pytest.fail("the model was looked at"))
    options: dict[str, Any] = {"plan": True, "model": SCHNELL, "images": 2, "weights": "none"}
    asked = HarvestSettings(**options, layers="all,single:all", quantize="int8")
    for plan in (make_plan, make_outline):
        with pytest.raises(UsageError, match=r"--quantize int8 rounds activations too.*leave the single blocks out"):
            plan(asked)
    assert set(asked_layers(HarvestSettings(**options, layers="all", quantize="int8"))) == {"double"}
    assert "single" in asked_layers(HarvestSettings(**options, layers="single:all", quantize="nf4"))


@pytest.mark.parametrize(("flag", "value"), [("steps", "7"), ("parts", "1")])
def test_a_number_that_is_not_there_is_said_with_its_flag(flag: str, value: str) -> None:
    options: dict[str, Any] = {"plan": True, "model": SCHNELL, "images": 2, flag: value}
    settings = HarvestSettings(**options)
    with pytest.raises(UsageError, match=f"^--{flag} {value}: there is no {flag[:-1]} {value}"):
        settings.parts_of(make_outline(settings).meta.n_parts)
