"""Loads a FluxPipeline, the same way for tiny-flux, a folder and a Hugging Face id, and says what it is."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harvest.quiet import quiet
from harvest.settings import DEV, SCHNELL, TINY_FLUX, HarvestSettings
from store.errors import GranaryError, UsageError
from store.format import StoreMeta

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TINY_FLUX_FOLDER = Path(__file__).parent / "tiny_flux" / "weights"
REASON_CHARACTERS = 160
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Defaults:
    """What a model is run with when nothing else is said."""

    resolution: int
    max_sequence_length: int


FLUX_DEFAULTS = Defaults(512, 512)
TINY_FLUX_DEFAULTS = Defaults(64, 16)


def defaults_of(model: str) -> Defaults:
    """Resolution and text length of record of a model; tiny-flux draws 64 pixels from 16 text tokens."""
    tiny = model == TINY_FLUX or (Path(model).exists() and Path(model).resolve() == TINY_FLUX_FOLDER.resolve())
    return TINY_FLUX_DEFAULTS if tiny else FLUX_DEFAULTS


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
    return device


def locate_model(model: str) -> tuple[str, bool]:
    """(name or folder to load from, whether it is a folder here); `UsageError` for what can be neither."""
    name = str(TINY_FLUX_FOLDER) if model == TINY_FLUX else model
    local = Path(name).exists()
    if local and not (Path(name) / "model_index.json").is_file():
        raise UsageError(f"{name} is no FluxPipeline folder: it has no model_index.json")
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


def load_pipeline(settings: HarvestSettings, device: torch.device, dtype: str) -> "FluxPipeline":
    """The pipeline in `dtype` on `device`, its own progress bar off.  `UsageError` when it cannot be had, with the remedy."""
    name, local = locate_model(settings.model)
    try:
        with quiet():
            from diffusers import FluxPipeline

            pipe = FluxPipeline.from_pretrained(
                name, revision=settings.revision, dtype=DTYPES[dtype], local_files_only=local
            )
    except (
        OSError,
        ValueError,
        ImportError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:  # whatever a broken or absent model makes diffusers raise
        raise UsageError(_cannot_load(name, local, error)) from None
    if type(pipe) is not FluxPipeline:
        raise UsageError(f"{name} is a {type(pipe).__name__}; Granary harvests a FluxPipeline")
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe.to(device)
    except RuntimeError as error:  # torch's out of memory is one
        raise GranaryError(
            f"{name} does not fit on {device}: {str(error).splitlines()[0][:REASON_CHARACTERS]}"
        ) from None


def _cannot_load(name: str, local: bool, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:REASON_CHARACTERS] if str(error).strip() else type(error).__name__
    if local:
        return f"{name} cannot be loaded as a FluxPipeline: {reason}"
    if "gated" in str(error).lower() or name in KNOWN_SHAPES:
        remedy = (
            f"Its weights are gated: accept the licence at https://huggingface.co/{name}, then log in with `hf auth login` "
            f"(or set HF_TOKEN), or give a folder that holds them. To try Granary without them: MODEL={TINY_FLUX} (--model {TINY_FLUX})."
        )
    else:
        remedy = f"Check the id and the network, give a folder, or say MODEL={TINY_FLUX} (--model {TINY_FLUX})."
    return f"the model {name} cannot be had: {reason}. {remedy}"


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: what its configuration says."""

    d_model: int
    double_blocks: int
    single_blocks: int
    pixels_per_token: int
    takes_guidance: bool


KNOWN_SHAPES = {
    SCHNELL: Shape(24 * 128, 19, 38, 16, takes_guidance=False),
    DEV: Shape(24 * 128, 19, 38, 16, takes_guidance=True),
}
"""Published models: what a store of them takes can be told before their weights are here."""


def shape_of(pipe: "FluxPipeline") -> Shape:
    """The sizes of a loaded model."""
    config = pipe.transformer.config
    return Shape(
        d_model=config.num_attention_heads * config.attention_head_dim,
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        pixels_per_token=2 * pipe.vae_scale_factor,
        takes_guidance=bool(config.guidance_embeds),
    )


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
    defaults = defaults_of(settings.model)
    side = settings.resolution or defaults.resolution
    height, width = settings.height or side, settings.width or side
    token = shape.pixels_per_token
    if height % token or width % token:
        raise UsageError(
            f"{height}x{width} pixels is no whole number of tokens: height and width must be multiples of {token}"
        )
    return Geometry(**asdict(shape), height=height, width=width)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights in use."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and bytes in the order of their names, one tensor at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if tensor.ndim
            else tensor.cpu().numpy().tobytes()
        )
    return digest.hexdigest()


def model_facts(pipe: "FluxPipeline", settings: HarvestSettings) -> dict[str, Any]:
    """What the store says of its model: name, revision, configuration, and the hash of every part's weights in use."""
    parts = {
        name: weights_hash(getattr(pipe, name)) for name in ("transformer", "text_encoder", "text_encoder_2", "vae")
    }
    config = {key: value for key, value in dict(pipe.transformer.config).items() if not key.startswith("_")}
    name = (
        settings.model
        if settings.model == TINY_FLUX or not Path(settings.model).exists()
        else Path(settings.model).resolve().name
    )
    return {"id": name, "revision": _revision(settings), "weights_sha256": parts, "transformer": config}


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
        f"a batch of {images} images does not fit on {meta.device}: {str(error).splitlines()[0]} "
        f"Use a smaller --batch-size than {meta.batch_size}."
    )
