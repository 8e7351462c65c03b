"""The parts of a model without their weights: how many parameters each has, and what it holds while a batch goes through it.

Modules are built on torch's `meta` device from the configuration of a published model (`harvest.models.published`), or from the files
of a folder or of the hub's cache.  Nothing is loaded and nothing downloaded.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harvest.models.model import DTYPES, locate_model
from harvest.models.pipelines import MODEL_INDEX
from harvest.models.published import FILES_IN, PUBLISHED, Configuration
from harvest.planning.live_memory import META, peak_bytes
from harvest.planning.volume import as_pinned
from harvest.quiet import quiet
from harvest.settings import HarvestSettings
from harvest.staging import batch_of
from store.errors import UsageError
from store.format import StoreMeta

QUANTISED_BITS = {"nf4": 4 + 32 / 64, "int8": 8.0, "int8wo": 8.0, "float8wo": 8.0}
"""bits of a weight of a linear layer: nf4 has a float32 scale for 64 weights; the scales of the others, one a row, are few"""
WEIGHTS_FILE = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")
"""the name of a file that is loaded when no variant is asked for"""
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""as safetensors calls them"""


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: its sizes, told by a module that has no values."""

    name: str
    module: nn.Module

    @property
    def parameters(self) -> int:
        """How many parameters it has, each counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def in_linear(self) -> int:
        """How many of them are weights of linear layers, which are those that can be quantised."""
        return sum(each.weight.numel() for each in self.module.modules() if isinstance(each, nn.Linear))

    def weights(self, dtype: str, quantize: str = "none") -> int:
        """Bytes of its weights in a dtype, the linear layers quantised where asked."""
        size = DTYPES[dtype].itemsize
        if quantize == "none":
            return self.parameters * size
        return (self.parameters - self.in_linear) * size + round(self.in_linear * QUANTISED_BITS[quantize] / 8)

    @property
    def largest_layer(self) -> int:
        """Parameters of its largest layer: what sequential offloading has on the device at a time."""
        return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in self.module.modules())

    @property
    def blocks(self) -> list[int]:
        """Parameters of the blocks of its lists, in order: what group offloading moves."""
        lists = [child for child in self.module.children() if isinstance(child, nn.ModuleList)]
        return [sum(p.numel() for p in block.parameters()) for each in lists for block in each]

    def pinned(self, dtype: str) -> int:
        """Bytes that group offloading pins: each matrix of the blocks by itself, in memory of its own."""
        lists = [child for child in self.module.children() if isinstance(child, nn.ModuleList)]
        size = DTYPES[dtype].itemsize
        return sum(as_pinned(p.numel() * size) for each in lists for block in each for p in block.parameters())


def parts_of_model(settings: HarvestSettings) -> tuple[Part, ...]:
    """The parts of the pipeline that `settings` name; `UsageError` for a model whose configuration is neither known nor here."""
    found = PUBLISHED.get(settings.model) or configurations_of(settings)
    with quiet(), META:
        return tuple(Part(name, _built(*configuration)) for name, configuration in found.items())


def _built(library: str, kind: str, config: dict[str, Any]) -> nn.Module:
    made = getattr(import_module(library), kind)
    module: nn.Module = (
        made.from_config(config) if library == "diffusers" else made(made.config_class.from_dict(config))
    )
    return module.eval()


def file_dtypes(settings: HarvestSettings, parts: tuple[Part, ...]) -> dict[str, str | None]:
    """{part: dtype of its files' tensors, `mixed` for several, None where they are neither here nor known}."""
    name, local = locate_model(settings.model)
    found: dict[str, str | None] = {}
    for part in parts:
        config = _path_of(name, local, settings.revision, f"{part.name}/config.json")
        files = [] if config is None or not config.exists() else sorted(config.parent.iterdir())
        held = {dtype for file in files if WEIGHTS_FILE.fullmatch(file.name) for dtype in _dtypes_in(file)}
        found[part.name] = "mixed" if len(held) > 1 else next(iter(held), FILES_IN.get(settings.model))
    return found


def _dtypes_in(file: Path) -> set[str]:
    """The floating-point dtypes of a safetensors file, by its header; none of one that cannot be read."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        kinds = {each["dtype"] for name, each in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return set()
    return {FLOATS[kind] for kind in kinds if kind in FLOATS}


def _path_of(name: str, local: bool, revision: str | None, file: str) -> Path | None:
    """A file of a folder, or of the hub's cache; None where it is not there."""
    if local:
        return Path(name) / file
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def configurations_of(settings: HarvestSettings) -> dict[str, Configuration]:
    """{part: library, class, configuration} from the files of a model that is here; `UsageError` where they are not."""
    name, local = locate_model(settings.model)

    def read(file: str) -> Any:
        path = _path_of(name, local, settings.revision, file)
        try:
            return None if path is None else json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None

    index = read(MODEL_INDEX) or {}
    kinds = {part: value for part, value in index.items() if isinstance(value, list) and value[0] is not None}
    found = {part: (*kind, config) for part, kind in kinds.items() if (config := read(f"{part}/config.json"))}
    if "transformer" not in found:
        known = ", ".join(PUBLISHED)
        raise UsageError(
            f"what {settings.model} takes cannot be told: its configuration is not here. Known without it are {known}; "
            "of others, download the model or give a folder that holds its model_index.json and config.json files"
        )
    return found


def in_dtype(parts: tuple[Part, ...], dtype: str) -> None:
    """Give all parts a dtype; on `meta` that moves nothing."""
    with quiet():
        for part in parts:
            part.module.to(DTYPES[dtype])


@dataclass(frozen=True)
class Held:
    """Bytes that a batch holds at its height, beside the weights, in each of the three phases of drawing it."""

    encoding: int
    denoising: int | None
    """None for a family whose transformer cannot be called without its pipeline"""
    decoding: int


def held_by_a_batch(parts: tuple[Part, ...], meta: StoreMeta, dtype: str) -> Held:
    """What a batch of `meta` holds in each phase, its modules run on `meta` tensors in a dtype."""
    in_dtype(parts, dtype)
    modules = {part.name: part.module for part in parts}
    batch = batch_of(meta)
    encoders = [module for name, module in modules.items() if name.startswith("text_encoder")]

    def encode(encoder: Any) -> Callable[[], object]:
        most = getattr(encoder.config, "max_position_embeddings", None) or meta.max_sequence_length
        return lambda: encoder(torch.empty(batch, min(most, meta.max_sequence_length), dtype=torch.long))

    transformer, vae = modules["transformer"], modules.get("vae")
    call = _CALLS.get(type(transformer).__name__)
    with shortened(transformer, *encoders):
        encoding = max((peak_bytes(encode(encoder), encoder) for encoder in encoders), default=0)
        run = (lambda: call(transformer, meta, batch, DTYPES[dtype])) if call is not None else None
        denoising = None if run is None else peak_bytes(run, transformer)
    return Held(
        encoding=encoding,
        denoising=denoising,
        decoding=0 if vae is None or meta.pictures == "none" else _decoding(vae, meta, batch, DTYPES[dtype]),
    )


@contextmanager
def shortened(*modules: nn.Module) -> Iterator[None]:
    """While it lasts, no more than two equal blocks of a list follow each other.

    A block's tensors are gone when the next but one runs, so that the height is the same, and is found in a tenth of the time.
    """
    lists = {each: each._modules for module in modules for each in module.modules() if isinstance(each, nn.ModuleList)}
    try:
        for each, blocks in lists.items():
            kept: list[tuple[int, nn.Module]] = []
            for block in filter(None, blocks.values()):
                size = sum(parameter.numel() for parameter in block.parameters())
                if [before for before, _ in kept[-2:]] != [size, size]:
                    kept.append((size, block))
            each._modules = {str(place): block for place, (_, block) in enumerate(kept)}
        yield
    finally:
        for each, blocks in lists.items():
            each._modules = blocks


def _decoding(vae: Any, meta: StoreMeta, batch: int, dtype: torch.dtype) -> int:
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (batch, vae.config.latent_channels, meta.height // scale, meta.width // scale)
    return peak_bytes(lambda: vae.decode(torch.empty(shape, dtype=dtype), return_dict=False), vae)


def _flux(transformer: Any, meta: StoreMeta, batch: int, dtype: torch.dtype) -> object:
    config, images, texts = transformer.config, meta.grid[0] * meta.grid[1], meta.max_sequence_length
    return transformer(
        hidden_states=torch.empty(batch, images, config.in_channels, dtype=dtype),
        timestep=torch.empty(batch, dtype=dtype),
        guidance=torch.empty(batch) if config.guidance_embeds else None,
        pooled_projections=torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        encoder_hidden_states=torch.empty(batch, texts, config.joint_attention_dim, dtype=dtype),
        txt_ids=torch.empty(texts, 3, dtype=dtype),
        img_ids=torch.empty(images, 3, dtype=dtype),
        return_dict=False,
    )


def _sd3(transformer: Any, meta: StoreMeta, batch: int, dtype: torch.dtype) -> object:
    config, rows = (
        transformer.config,
        batch * (2 if meta.guidance > 1 else 1),
    )  # the half without the prompt is drawn beside
    scale = meta.pixels_per_token // config.patch_size
    texts = meta.tokens["txt"].total if "txt" in meta.tokens else meta.max_sequence_length
    return transformer(
        hidden_states=torch.empty(rows, config.in_channels, meta.height // scale, meta.width // scale, dtype=dtype),
        timestep=torch.empty(rows, dtype=dtype),
        pooled_projections=torch.empty(rows, config.pooled_projection_dim, dtype=dtype),
        encoder_hidden_states=torch.empty(rows, texts, config.joint_attention_dim, dtype=dtype),
        return_dict=False,
    )


def _flux2(transformer: Any, meta: StoreMeta, batch: int, dtype: torch.dtype) -> object:
    config, images, texts = transformer.config, meta.grid[0] * meta.grid[1], meta.max_sequence_length
    axes = len(config.axes_dims_rope)
    return transformer(
        hidden_states=torch.empty(batch, images, config.in_channels, dtype=dtype),
        timestep=torch.empty(batch, dtype=dtype),
        encoder_hidden_states=torch.empty(batch, texts, config.joint_attention_dim, dtype=dtype),
        txt_ids=torch.empty(texts, axes, dtype=dtype),
        img_ids=torch.empty(images, axes, dtype=dtype),
        guidance=torch.empty(batch) if config.guidance_embeds else None,
        return_dict=False,
    )


_CALLS: dict[str, Callable[[Any, StoreMeta, int, torch.dtype], object]] = {
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "Flux2Transformer2DModel": _flux2,
}
