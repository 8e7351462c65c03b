"""What a model is run with when nothing else is said: resolution, text length, steps and guidance of its own pipeline.

They are told from the name of a published model, or from the configuration that a folder (or the cache of the Hugging Face
hub) holds: a model with a guidance embedding, as FLUX.1[dev] has, takes its pipeline's 28 steps at guidance 3.5; one that was
distilled to a few steps, as FLUX.1[schnell] was, takes 4 without guidance.  Nothing is loaded for it, and no server asked.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harvest.settings import DEV, SCHNELL, SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD35_TURBO, TINY_FLUX, HarvestSettings

TINY_FLUX_FOLDER = Path(__file__).parent.parent / "tiny_flux" / "weights"


@dataclass(frozen=True)
class Defaults:
    """What a model is run with when nothing else is said."""

    resolution: int
    max_sequence_length: int
    num_inference_steps: int = 4
    guidance: float = 0.0


FEW_STEPS = Defaults(512, 512)
"""FLUX.1[schnell]"""
GUIDED = Defaults(512, 512, num_inference_steps=28, guidance=3.5)
"""FLUX.1[dev]: steps and guidance as `FluxPipeline` has them"""
TINY_FLUX_DEFAULTS = Defaults(64, 16)
SD3 = Defaults(1024, 256, num_inference_steps=28, guidance=7.0)
"""as `StableDiffusion3Pipeline` has them"""
OF_PIPELINES: dict[str, Defaults] = {"StableDiffusion3Pipeline": SD3, "Flux2KleinPipeline": FEW_STEPS}
"""pipelines other than FLUX.1's, by their class"""
PUBLISHED = {
    SCHNELL: FEW_STEPS,
    DEV: GUIDED,
    SD3_MEDIUM: SD3,
    SD35_MEDIUM: Defaults(1024, 256, num_inference_steps=40, guidance=4.5),
    SD35_LARGE: Defaults(1024, 256, num_inference_steps=28, guidance=3.5),
    SD35_TURBO: Defaults(1024, 256),
}
"""models whose own page says how they are run"""


def defaults_of(model: str, revision: str | None = None) -> Defaults:
    """Resolution, text length, steps and guidance of record of a model; tiny-flux draws 64 pixels from 16 text tokens."""
    if model == TINY_FLUX or (Path(model).exists() and Path(model).resolve() == TINY_FLUX_FOLDER.resolve()):
        return TINY_FLUX_DEFAULTS
    if model in PUBLISHED:
        return PUBLISHED[model]
    pipeline = _configuration(model, "model_index.json", revision).get("_class_name")
    if pipeline in OF_PIPELINES:
        return OF_PIPELINES[pipeline]
    guided = bool(_configuration(model, "transformer/config.json", revision).get("guidance_embeds"))
    return GUIDED if guided else FEW_STEPS


def steps_of(settings: HarvestSettings) -> int:
    """`--num-inference-steps`, or those of the model's own pipeline."""
    return settings.num_inference_steps or defaults_of(settings.model, settings.revision).num_inference_steps


def guidance_of(settings: HarvestSettings) -> float:
    """`--guidance`, or that of the model's own pipeline."""
    asked = settings.guidance
    return defaults_of(settings.model, settings.revision).guidance if asked is None else asked


def settled(settings: HarvestSettings) -> HarvestSettings:
    """The settings with steps and guidance filled in."""
    return replace(settings, num_inference_steps=steps_of(settings), guidance=guidance_of(settings))


def remarks_of(settings: HarvestSettings) -> tuple[str, ...]:
    """What a plan says of steps and guidance that were not asked for and are not those of FLUX.1[schnell]."""
    steps, guidance = steps_of(settings), guidance_of(settings)
    taken = {
        "--num-inference-steps": (settings.num_inference_steps, steps, FEW_STEPS.num_inference_steps),
        "--guidance": (settings.guidance, guidance, FEW_STEPS.guidance),
    }
    said = [f"{flag} {value:g}" for flag, (asked, value, usual) in taken.items() if asked is None and value != usual]
    return (f"{' and '.join(said)}, as this model's own pipeline has it",) if said else ()


def _configuration(model: str, file: str, revision: str | None) -> dict[str, Any]:
    """A configuration file of a model that is here; empty where it is not, which loading the model then speaks of."""
    path: Path | None = Path(model) / file
    if not Path(model).exists():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, file, revision=revision)
        except HFValidationError:  # no such name can be a model's
            return {}
        path = Path(cached) if isinstance(cached, str) else None
    try:
        found = json.loads(path.read_bytes()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
