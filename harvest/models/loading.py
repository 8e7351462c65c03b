"""Loads a pipeline, the same way for every command: first what it is, then its weights, then where they lie.

1. `load_frame`: configurations, tokenizers and scheduler, with transformer and VAE that have sizes and no weights.  Everything
   that a harvest can refuse is refused against it.
2. `load_weights`: the weights, on the host, in the dtype asked for or quantised.  A file in that dtype is mapped and not copied.
3. `place`: on the device, or offloaded.  Hashes and copies of weights are taken before, while the weights are where they belong.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from harvest.models.model import DTYPES, KNOWN_SHAPES, REASON_CHARACTERS, locate_model
from harvest.models.pipelines import family_in, index_of, json_of, open_pipeline, refuse_incomplete, refuse_scheduler
from harvest.models.quantizing import quantization
from harvest.quiet import quiet
from harvest.settings import TINY_FLUX, HarvestSettings
from store.errors import GranaryError, UsageError

Offload = Literal["none", "model", "sequential", "group"]
SIZED = ("transformer", "vae")
"""parts whose sizes decide what is stored"""
BROKEN = (
    OSError, ValueError, ImportError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError, AssertionError
)  # fmt: skip
"""what diffusers and transformers raise at files that are missing, damaged or not theirs"""


@dataclass(frozen=True)
class Frame:
    """A pipeline without its weights: transformer and VAE on the meta device, text encoders None, all else as it is."""

    pipe: Any
    parts: tuple[str, ...]
    """the parts that have weights, in the order in which its family names them"""

    @property
    def encoders(self) -> tuple[str, ...]:
        """The parts that text goes through."""
        return tuple(part for part in self.parts if part not in SIZED)


def load_frame(settings: HarvestSettings) -> Frame:
    """What a pipeline is, and none of its weights.

    `UsageError` when the model cannot be had, with the remedy, and for a pipeline that Granary does not harvest.
    """
    name, local = locate_model(settings.model)
    with _told(name, local):
        index = index_of(name, local, settings.revision)
        family = family_in(index, name)
        refuse_incomplete(index, family, name, local)
        sized = {part: _sized(name, local, settings.revision, part, index[part]) for part in SIZED}
        encoders = dict.fromkeys(part for part in family.parts if part not in SIZED)
        pipe = open_pipeline(name, local, settings.revision, settings, **sized, **encoders)
        refuse_scheduler(pipe, family)
    return Frame(pipe, tuple(part for part in family.parts if tuple(index.get(part) or (None, None)) != (None, None)))


def _sized(name: str, local: bool, revision: str | None, part: str, kind: Sequence[str]) -> nn.Module:
    """A part of diffusers as its configuration says, on the meta device."""
    found = getattr(import_module(kind[0]), kind[1])
    config = json_of(name, local, revision, f"{part}/config.json")
    with torch.device("meta"):
        module: nn.Module = found.from_config(config)
    return module.eval()


def load_weights(settings: HarvestSettings, frame: Frame, dtype: str, only: Sequence[str]) -> Any:
    """The pipeline with the weights of the parts in `only` on the host, in `dtype`, its other parts None; quantised where asked.

    Tokenizers and scheduler are the frame's.  Errors as of `load_frame`.
    """
    name, local = locate_model(settings.model)
    kept = {name: part for name, part in frame.pipe.components.items() if name not in frame.parts and part is not None}
    options = {**kept, **dict.fromkeys(part for part in frame.parts if part not in only), "dtype": DTYPES[dtype]}
    if "transformer" in only:
        options |= quantization(settings.quantize, DTYPES[dtype])
    with _told(name, local):
        pipe = open_pipeline(name, local, settings.revision, settings, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(settings: HarvestSettings, device: torch.device, dtype: str) -> Any:
    """The whole pipeline in `dtype`, placed on `device` as `--offload` says, its own progress bar off; errors as of the steps."""
    frame = load_frame(settings)
    return place(load_weights(settings, frame, dtype, frame.parts), device, settings.offload)


def place(pipe: Any, device: torch.device, offload: Offload = "none") -> Any:
    """The pipeline, its weights on the device or where offloading keeps them; `GranaryError` where they do not fit."""
    try:
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        elif offload == "group":
            _group(pipe, device)
        else:
            pipe.to(device)
    except RuntimeError as error:  # torch's out of memory is one
        remedy = " Try --offload group, --quantize, or --text-encoders first." if offload == "none" else ""
        raise GranaryError(
            f"{pipe.config._name_or_path} does not fit on {device}: {str(error).splitlines()[0][:REASON_CHARACTERS]}.{remedy}"
        ) from None
    return pipe


def _group(pipe: Any, device: torch.device) -> None:
    """The transformer block by block, the next block copied while one computes; the other parts layer by layer."""
    from diffusers.hooks import apply_group_offloading

    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            whole = name == "transformer"
            apply_group_offloading(
                part,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="block_level" if whole else "leaf_level",
                num_blocks_per_group=1 if whole else None,
                use_stream=whole and device.type == "cuda",
            )


def moves_weights(pipe: Any) -> bool:
    """Whether offloading puts its weights in place while it computes; found by a look at every module."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return getattr(pipe, "_offload_device", None) is not None or any(map(_is_group_offload_enabled, parts))


def without_gradients(pipe: Any, moved: bool | None = None) -> AbstractContextManager[Any]:
    """`torch.inference_mode`, or `torch.no_grad` where weights are moved: a tensor made in the former is no parameter.

    `moved`: what `moves_weights` says of the pipeline, where it is known.
    """
    return torch.no_grad() if (moves_weights(pipe) if moved is None else moved) else torch.inference_mode()


def check_offload(offload: Offload, device: torch.device) -> None:
    """`UsageError` for offloading from a device that has no memory of its own."""
    if offload != "none" and device.type != "cuda":
        raise UsageError(
            f"--offload {offload}: on a {device.type.upper()} the weights are on the host already, and there is nowhere to "
            "offload them from; leave it out (it serves a CUDA device that is too small)"
        )


@contextmanager
def _told(name: str, local: bool) -> Iterator[None]:
    """Inside, whatever a broken or absent model makes diffusers raise becomes one sentence with a remedy."""
    try:
        with quiet():
            yield
    except (*BROKEN, SafetensorError) as error:
        if isinstance(error, GranaryError):
            raise
        raise UsageError(_cannot_load(name, local, error)) from None


def _cannot_load(name: str, local: bool, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:REASON_CHARACTERS] if str(error).strip() else type(error).__name__
    if local:
        return f"{name} cannot be loaded: {reason}"
    if "gated" in str(error).lower() or name in KNOWN_SHAPES:
        remedy = (
            f"Its weights are gated: accept the licence at https://huggingface.co/{name}, then log in with `hf auth login` "
            f"(or set HF_TOKEN), or give a folder that holds them. To try Granary without them: MODEL={TINY_FLUX} (--model {TINY_FLUX})."
        )
    else:
        remedy = f"Check the id and the network, give a folder, or say MODEL={TINY_FLUX} (--model {TINY_FLUX})."
    return f"the model {name} cannot be had: {reason}. {remedy}"
