"""The pipelines of the families: which one a model is, told before its weights are loaded, how it is loaded, and its sizes.

`model_index.json` names the pipeline's class and its components.  What the class has not can so be refused before gigabytes are
read; and SD3 may come without its T5 encoder, whose places the pipeline then fills with zeros.
"""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from harvest.models.architectures import (
    ARCHITECTURES,
    FLUX,
    SD3,
    Architecture,
    architecture_named,
    architecture_of_pipeline,
)
from harvest.settings import HarvestSettings
from store.errors import UsageError

MODEL_INDEX = "model_index.json"
OPTIONAL = ("image_encoder", "feature_extractor")
"""components that diffusers itself leaves out"""


def index_of(name: str, local: bool, revision: str | None = None) -> dict[str, Any]:
    """The content of a model's `model_index.json`, from its folder or the hub; `OSError` or `ValueError` where it cannot be had."""
    return json_of(name, local, revision, MODEL_INDEX)


def json_of(name: str, local: bool, revision: str | None, file: str) -> dict[str, Any]:
    """The JSON object in a file of a model, from its folder or the hub; `OSError` or `ValueError` where it cannot be had."""
    if local:
        path = Path(name) / file
    else:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name, file, revision=revision))
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"its {file} is no JSON object")
    return found


def family_in(index: Mapping[str, Any], name: str) -> Architecture:
    """The family of the pipeline that a model's index names; `UsageError` for one that Granary does not harvest."""
    pipeline = str(index.get("_class_name", FLUX.pipeline))
    row = architecture_of_pipeline(pipeline)
    if row is None:
        known = ", ".join(row.pipeline for row in ARCHITECTURES.values())
        raise UsageError(f"{name} is a {pipeline}; Granary harvests a {known}")
    return row


def refuse_incomplete(index: Mapping[str, Any], architecture: Architecture, name: str, local: bool) -> None:
    """`UsageError` where a model's index lacks a part, or its folder what the index names.

    Without its files transformers makes a tokenizer that knows no word, and says nothing.
    """
    for part in (*architecture.parts, *tokenizers_of(architecture), "scheduler"):
        kind, encoder = index.get(part), part.replace("tokenizer", "text_encoder")
        lacking = all(index.get(each) in (None, [None, None]) for each in (part, encoder))
        if lacking and encoder in architecture.may_lack:
            continue
        if not (isinstance(kind, list) and len(kind) == 2 and all(isinstance(word, str) for word in kind)):
            raise UsageError(
                f"the {MODEL_INDEX} of {name} names no {part} (it says {json.dumps(kind)}), and Granary harvests a "
                f"{architecture.pipeline} as a whole: add the part, or fetch the model again"
            )
        files = [file.name for file in (Path(name) / part).glob("*")] if local else None
        if files == [] or (files and "tokenizer" in part and not any(map(_is_vocabulary, files))):
            what = "no vocabulary is" if files else "nothing is"
            raise UsageError(
                f"{name} has a {part} by its {MODEL_INDEX}, and {what} in {Path(name) / part}: fetch the model again"
            )


def tokenizers_of(architecture: Architecture) -> tuple[str, ...]:
    """The components that cut text into tokens: one an encoder."""
    return tuple(part.replace("text_encoder", "tokenizer") for part in architecture.parts if "text_encoder" in part)


def _is_vocabulary(file: str) -> bool:
    return file == "tokenizer.json" or file.startswith("vocab") or file.endswith((".model", ".tiktoken"))


def refuse_unfit(settings: HarvestSettings, architecture: Architecture) -> None:
    """`UsageError` for what is asked of a model whose family does not have it; needs no weights."""
    model, pipeline = settings.model, architecture.pipeline
    if settings.trace and not architecture.traceable:
        raise UsageError(
            f"--trace: {model} is a {pipeline}, and circuits know only FLUX.1's double blocks; leave --trace out"
        )
    if settings.targets == "recomputed":
        streams = settings.streams.split(",") if settings.streams is not None else architecture.streams
        gated = [
            name for name in architecture.streams if name in streams and not architecture.streams[name].recomputable
        ]
        if gated:
            raise UsageError(
                f"--targets recomputed: the MLPs of a {pipeline} are gated, and mlp_out is recomputed only of MLPs with one "
                f"input layer and GELU; leave --targets at stored"
            )
    guidance = settings.guidance or 0.0
    if guidance and architecture.name == "flux2":
        raise UsageError(
            f"--guidance {guidance:g}: a {pipeline} is harvested without guidance (it would run its transformer a second time "
            "for it, without the prompt); leave --guidance at 0"
        )


def refuse_steering(model: Mapping[str, Any], where: str) -> None:
    """`UsageError` unless the model that a store's metadata names is of the family whose blocks interventions know."""
    row = architecture_named(model.get("architecture"))
    if not row.traceable:
        raise UsageError(
            f"{where} is of {model.get('id')}, a {row.pipeline}: only FLUX.1's models are drawn again (steering, guided "
            "steering, faithfulness, validation, explore). Its dictionaries can be trained, scored and looked at all the same"
        )
    if "quantized" in model:
        raise UsageError(
            f"{where} is of {model.get('id')} quantised ({model['quantized'].get('as')}), and only models as they were trained are "
            "drawn again. Its dictionaries can be trained, scored and looked at all the same"
        )


def open_pipeline(name: str, local: bool, revision: str | None, settings: HarvestSettings, **options: Any) -> Any:
    """The pipeline of diffusers that a model's index names, loaded with `options`; a component that the model lacks is None.

    `UsageError` for a pipeline that Granary does not harvest, and for what `settings` ask of it in vain, before its weights are
    read; else whatever diffusers raises.
    """
    import diffusers

    index = index_of(name, local, revision)
    architecture = family_in(index, name)
    refuse_unfit(settings, architecture)
    lacking = {part: None for part, value in index.items() if value == [None, None] and part not in OPTIONAL}
    pipeline = getattr(diffusers, architecture.pipeline)
    return pipeline.from_pretrained(name, revision=revision, local_files_only=local, **{**lacking, **options})


def refuse_scheduler(pipe: Any, architecture: Architecture) -> None:
    """`UsageError` for a scheduler under which a denoising step is not one pass of the transformer, or that its pipeline cannot drive."""
    scheduler = pipe.scheduler
    name, order = type(scheduler).__name__, getattr(scheduler, "order", 1)
    remedy = "give a folder whose scheduler is a FlowMatchEulerDiscreteScheduler, as the published models have it"
    if order != 1:
        raise UsageError(
            f"the scheduler of this {architecture.pipeline} is a {name} of order {order}: it runs the transformer more than once a "
            f"step, and what is kept of step k would not be step k's; {remedy}"
        )
    config, takes = scheduler.config, signature(scheduler.set_timesteps).parameters
    if architecture.gives_sigmas:
        needed = {"mu"} | (set() if config.get("use_flow_sigmas") else {"sigmas"})
    else:
        needed = {"mu"} if config.get("use_dynamic_shifting") else set()
    lacking = sorted(needed - set(takes)) + ([] if hasattr(scheduler, "sigmas") else ["sigmas of its own"])
    if lacking:
        raise UsageError(
            f"the scheduler of this {architecture.pipeline} is a {name}, and that knows no {' and no '.join(lacking)}, by which "
            f"noise levels are set and kept; {remedy}"
        )


def sizes_of(pipe: Any) -> dict[str, Any]:
    """The fields of a loaded pipeline's `Shape`; `UsageError` for one whose text has other places than its family's."""
    architecture = architecture_of_pipeline(type(pipe).__name__) or FLUX
    config = pipe.transformer.config
    if architecture is SD3 and pipe.tokenizer_max_length != SD3.text_before:
        raise UsageError(
            f"the CLIP tokenizer of this {SD3.pipeline} has {pipe.tokenizer_max_length} places, expected {SD3.text_before}"
        )
    width = config.num_attention_heads * config.attention_head_dim
    if width < 1:
        raise UsageError(
            f"the configuration of this {architecture.transformer} has {config.num_attention_heads} attention heads of "
            f"{config.attention_head_dim} channels: both must be at least 1"
        )
    # FLUX packs 2 x 2 latents into a token outside its transformer
    patch = config.patch_size if architecture is SD3 else 2
    token = patch * pipe.vae_scale_factor
    return {
        "d_model": width,
        "double_blocks": config.num_layers,
        "single_blocks": config.get("num_single_layers", 0),
        "pixels_per_token": token,
        "takes_guidance": architecture.guided_half or (architecture is FLUX and bool(config.guidance_embeds)),
        "architecture": architecture.name,
        "longest_side": token * config.pos_embed_max_size if architecture is SD3 else None,
    }
