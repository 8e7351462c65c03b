"""Says what a model is: where it lies, its sizes, and the facts that a store keeps of it."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harvest.models.architectures import ARCHITECTURES, FLUX, SD3, Architecture, architecture_of
from harvest.models.compiling import BACKEND
from harvest.models.defaults import TINY_FLUX_FOLDER as TINY_FLUX_FOLDER
from harvest.models.defaults import defaults_of
from harvest.models.pipelines import sizes_of
from harvest.models.quantizing import quantized_facts
from harvest.settings import DEV, SCHNELL, SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD35_TURBO, TINY_FLUX, HarvestSettings
from store.errors import GranaryError, UsageError
from store.format import StoreMeta
from store.sizes import many, picture_size

if TYPE_CHECKING:
    from diffusers import FluxPipeline

REASON_CHARACTERS = 160
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(asked: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one; `UsageError` for a device that is not there."""
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"--device {asked!r} is no device: write cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; leave --device out to run on the CPU")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {asked!r}: Granary runs on cpu and cuda")
    if device.type == "cuda" and (count := torch.cuda.device_count()) <= (device.index or 0):
        raise UsageError(f"--device {asked}: torch sees {many(count, 'CUDA device')} here, numbered from 0")
    return device


def locate_model(model: str) -> tuple[str, bool]:
    """(name or folder to load from, whether it is a folder here); `UsageError` for what can be neither."""
    name = str(TINY_FLUX_FOLDER) if model == TINY_FLUX else model
    local = Path(name).exists()
    if local and not (Path(name) / "model_index.json").is_file():
        raise UsageError(f"{name} is no FluxPipeline folder, nor another pipeline's: it has no model_index.json")
    if not local and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UsageError(
            f"unknown model {model!r}: it is no folder here, and a Hugging Face id looks like {SCHNELL}. Or say --model {TINY_FLUX}"
        )
    return name, local


def is_here(settings: HarvestSettings) -> bool:
    """Whether the model is a folder here, or was downloaded before as far as its index tells; asks no server."""
    if locate_model(settings.model)[1]:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(settings.model, "model_index.json", revision=settings.revision), str)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: what its configuration says."""

    d_model: int
    double_blocks: int
    single_blocks: int
    pixels_per_token: int
    takes_guidance: bool
    architecture: str = field(default=FLUX.name, kw_only=True)
    """its family, by the name that `harvest.models.architectures` knows it by"""
    longest_side: int | None = field(default=None, kw_only=True)
    """pixels that its positions reach, where they end"""

    @property
    def family(self) -> Architecture:
        """Its family."""
        return ARCHITECTURES[self.architecture]


KNOWN_SHAPES = {
    SCHNELL: Shape(24 * 128, 19, 38, 16, takes_guidance=False),
    DEV: Shape(24 * 128, 19, 38, 16, takes_guidance=True),
    SD3_MEDIUM: Shape(24 * 64, 24, 0, 16, takes_guidance=True, architecture=SD3.name, longest_side=192 * 16),
    SD35_MEDIUM: Shape(24 * 64, 24, 0, 16, takes_guidance=True, architecture=SD3.name, longest_side=384 * 16),
    SD35_LARGE: Shape(38 * 64, 38, 0, 16, takes_guidance=True, architecture=SD3.name, longest_side=192 * 16),
    SD35_TURBO: Shape(38 * 64, 38, 0, 16, takes_guidance=True, architecture=SD3.name, longest_side=192 * 16),
}
"""Published models: what a store of them takes can be told before their weights are here."""


def shape_of(pipe: "FluxPipeline") -> Shape:
    """The sizes of a loaded model."""
    return Shape(**sizes_of(pipe))


@dataclass(frozen=True)
class Geometry(Shape):
    """Sizes that follow from a model and a resolution."""

    height: int
    width: int

    @property
    def image_tokens(self) -> int:
        return (self.height // self.pixels_per_token) * (self.width // self.pixels_per_token)


def geometry_of(shape: Shape, settings: HarvestSettings) -> Geometry:
    """The sizes of a run; `UsageError` for a resolution that is no whole number of tokens."""
    defaults = defaults_of(settings.model, settings.revision)
    side = settings.resolution or defaults.resolution
    height, width = settings.height or side, settings.width or side
    token = shape.pixels_per_token
    if height % token or width % token:
        raise UsageError(
            f"{picture_size(width, height)} is no whole number of tokens: height and width must be multiples of {token}"
        )
    if shape.longest_side is not None and max(height, width) > shape.longest_side:
        raise UsageError(
            f"{picture_size(width, height)}: {settings.model} knows positions up to {shape.longest_side} pixels a side"
        )
    return Geometry(**asdict(shape), height=height, width=width)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights in use."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and bytes in the order of their names, one tensor at a time.

    A quantised tensor counts as its parts: the numbers, their scales, what else it is made of.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(plain(tensors)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if tensor.ndim
            else tensor.cpu().numpy().tobytes()
        )
    return digest.hexdigest()


def plain(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors, those of torchao taken apart."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            yield from plain({f"{name}.{part}": getattr(tensor, part) for part in parts})
        else:
            yield name, tensor


def model_facts(
    pipe: "FluxPipeline", settings: HarvestSettings, known: Mapping[str, str] | None = None, alone: bool = False
) -> dict[str, Any]:
    """What the store says of its model: name, revision, configuration, and the hash of every part's weights in use.

    `known`: hashes of parts that are gone already; `alone`: each prompt was encoded by itself.
    """
    hashes, parts = dict(known or {}), architecture_of(pipe).parts
    hashes |= {name: weights_hash(part) for name in parts if (part := getattr(pipe, name)) is not None}
    return facts_without_weights(pipe, settings, alone) | {
        "weights_sha256": {name: hashes[name] for name in parts if name in hashes}
    }


def facts_without_weights(pipe: "FluxPipeline", settings: HarvestSettings, alone: bool) -> dict[str, Any]:
    """The same but for the hashes: what can be said before weights are read."""
    architecture = architecture_of(pipe)
    left_out = {"quantization_config"}  # said in our words
    config = {k: v for k, v in dict(pipe.transformer.config).items() if not k.startswith("_") and k not in left_out}
    name = (
        settings.model
        if settings.model == TINY_FLUX or not Path(settings.model).exists()
        else Path(settings.model).resolve().name
    )
    facts: dict[str, Any] = {"id": name, "revision": _revision(settings), "weights_sha256": {}, "transformer": config}
    if architecture is not FLUX:
        facts["architecture"] = architecture.name
    if settings.quantize != "none":
        facts["quantized"] = quantized_facts(settings.quantize)
    if settings.compile:
        facts["compiled"] = BACKEND
    if alone:
        facts["text_embeddings"] = "alone"
    return facts


def _revision(settings: HarvestSettings) -> str | None:
    """The commit of a Hugging Face model, from the folder of its cached snapshot; None for a folder."""
    if settings.model == TINY_FLUX or Path(settings.model).exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(settings.model, "model_index.json", revision=settings.revision)
    return Path(cached).parent.name if isinstance(cached, str) else settings.revision


def library_versions() -> dict[str, str]:
    """Versions of the libraries that could change a byte of a store."""
    from importlib.metadata import version

    names = (
        "torch",
        "diffusers",
        "transformers",
        "tokenizers",
        "zarr",
        "numcodecs",
        "safetensors",
        "pyarrow",
        "Pillow",
        "numpy",
        "ml_dtypes",
    )
    return {name: version(name) for name in names}


def cpu_threads(asked: int | None) -> int:
    """CPU threads that the model runs with: asked for, or the cores that this process may use."""
    return asked or len(os.sched_getaffinity(0))


def too_large(meta: StoreMeta, images: int, error: torch.OutOfMemoryError) -> GranaryError:
    """What to say when a batch does not fit into the device's memory."""
    return GranaryError(
        f"a batch of {images} images does not fit on {meta.device}: {first_line(error)} "
        f"Use a smaller --batch-size than {meta.batch_size}."
    )


def first_line(error: Exception) -> str:
    """What a library says is wrong, as a sentence: its first line, with a full stop."""
    words = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
    return f"{words}."
