"""What is drawn with, settled before a model is loaded: which model, in which dtype, how large, in how many steps.

A store says all of it; a model without a store has the defaults of a harvest.  Two runs with equal `Canvas`, batch size and
kind of device draw equal bytes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch

from harvest.models.model import DTYPES, locate_model, tensors_hash
from store import Store
from store.errors import DamagedError, MismatchError, UsageError
from store.sites import Stream
from train.dictionaries.provenance import SHOWN, model_name

TINY_FLUX = "tiny-flux"
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
"""of a FluxPipeline that have weights"""
COMPARED = (
    "patch_size", "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "pooled_projection_dim", "guidance_embeds",
)  # fmt: skip
"""what a transformer's configuration must have in common with the store's, which can be told without its weights"""
CHOSEN = ("dtype", "height", "width", "num_inference_steps", "max_sequence_length", "guidance", "threads")
"""what an experiment may choose"""
FACTS = ("weights_dtype", "pixels_per_token", "n_blocks", "d_model")
"""what follows from the model"""
COUNTS = ("height", "width", "num_inference_steps", "max_sequence_length", "threads")
MOST, MOST_TEXT_TOKENS = 1 << 20, 512
READ_AHEAD = 1 << 30
"""bytes of weights that are read to compare them before the model is loaded"""


@dataclass(frozen=True)
class Canvas:
    """How pictures are drawn: everything that decides their bytes but prompt, seed, intervention, batch and device."""

    model: str
    """`tiny-flux`, a folder here, or an id of the Hugging Face hub"""
    revision: str | None
    weights: Mapping[str, str]
    """part -> SHA-256 of its weights as the store has them; empty where no store says"""
    known_as: Mapping[str, Any]
    """what a store says of its model, for messages and for comparing dictionaries; empty without one"""
    weights_dtype: str
    """what the weights are loaded and compared in"""
    dtype: str
    """`float32`, `bfloat16` or `float16`: what the model computes in"""
    height: int
    width: int
    pixels_per_token: int
    num_inference_steps: int
    max_sequence_length: int
    guidance: float
    n_blocks: int
    """double blocks"""
    d_model: int
    threads: int
    """CPU threads of the model"""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        return self.height // self.pixels_per_token, self.width // self.pixels_per_token

    @property
    def tokens(self) -> dict[Stream, int]:
        """How many tokens each stream has."""
        return {"img": self.grid[0] * self.grid[1], "txt": self.max_sequence_length}

    @property
    def model_name(self) -> str:
        """What the model is called wherever it lies: its id, or its folder's name."""
        if isinstance(known := self.known_as.get("id"), str):
            return known
        return Path(self.model).resolve().name if Path(self.model).exists() else self.model

    def document(self) -> dict[str, Any]:
        """As an experiment file carries it: what `canvas_of_document` reads."""
        found: dict[str, Any] = {"model": self.model_name, "revision": self.revision}
        found |= {name: getattr(self, name) for name in (*CHOSEN, *FACTS)}
        return {**found, "weights_sha256": {part: self.weights[part] for part in PARTS if part in self.weights}}

    def changed(self, values: Mapping[str, Any], where: str) -> "Canvas":
        """The same with what an experiment file says of how to draw; `UsageError` for what cannot be.

        A size or a number of steps may differ from the store's; a fact about the model may not (`MismatchError`).
        """
        unknown = sorted(map(str, set(values) - {*CHOSEN, *FACTS, "model", "revision", "weights_sha256", "batch_size"}))
        if unknown:
            raise UsageError(
                f"{where}: {unknown[0]!r} says nothing of how to draw; there are {', '.join(CHOSEN)} and batch_size"
            )
        for name in FACTS:
            if name in values and values[name] != getattr(self, name):
                raise MismatchError(
                    f"{where} was made with a model whose {name} is {values[name]!r}, {self.model_name} has {getattr(self, name)!r}: "
                    "draw with the model that it was made with"
                )
        _check_hashes(where, values.get("weights_sha256"), self.weights)
        canvas = replace(self, **_typed(values, where))
        canvas.check(where)
        return canvas

    def check(self, where: str) -> None:
        """`UsageError` for sizes that cannot be drawn."""
        for name in COUNTS:
            if not 1 <= getattr(self, name) <= MOST:
                raise UsageError(f"{where}: {name} is {getattr(self, name)}; it must be a whole number from 1 on")
        for name in ("height", "width"):
            if getattr(self, name) % self.pixels_per_token:
                raise UsageError(
                    f"{where}: {name} {getattr(self, name)} is no whole number of tokens: write a multiple of {self.pixels_per_token}"
                )
        if self.dtype not in DTYPES:
            raise UsageError(f"{where}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.max_sequence_length > MOST_TEXT_TOKENS:
            raise UsageError(
                f"{where}: max_sequence_length is {self.max_sequence_length}; FLUX takes at most {MOST_TEXT_TOKENS} text tokens"
            )
        if not 0 <= self.guidance < math.inf:
            raise UsageError(f"{where}: guidance is {self.guidance!r}; it must be a number, 0 or more")
        takes = (self.known_as.get("transformer") or {}).get("guidance_embeds")
        if self.guidance and takes is False:
            raise UsageError(
                f"{where}: guidance is {self.guidance!r}, and {self.model_name} has no guidance embedding: leave it at 0"
            )


def canvas_of_store(store: Store, model: str | None = None, dtype: str | None = None) -> Canvas:
    """How the pictures of a store were drawn; `model` is a folder with the same model where its id does not lead to it.

    Errors: `UsageError` for a store that does not say what drew it (of imported activations), `MismatchError` for a folder whose
    configuration is another model's; that the weights are the same is checked when they are loaded.
    """
    from harvest.models.model import cpu_threads
    from harvest.models.pipelines import refuse_steering

    meta = store.meta
    refuse_steering(meta.model, str(store.path))
    name = model or meta.model.get("id")
    blocks = (meta.model.get("transformer") or {}).get("num_layers")
    if not isinstance(name, str) or not name or not isinstance(blocks, int):
        raise UsageError(
            f"{store.path} does not say which model drew it, as a store of imported activations does not: nothing can be drawn "
            "with it; give a store that python -m harvest made, of the same model"
        )
    _refuse_lost_folder(str(store.path), name, model)
    name, here = locate_model(name)
    if here:
        _compare(Path(name), meta.model, store.path)
    hashes = meta.model.get("weights_sha256")
    return Canvas(
        model=model or str(meta.model["id"]),
        revision=None if model is not None else meta.model.get("revision"),
        weights=dict(hashes) if isinstance(hashes, dict) else {} if hashes is None else {"transformer": str(hashes)},
        known_as=meta.model,
        weights_dtype=meta.dtype,
        dtype=dtype or meta.dtype,
        height=meta.height,
        width=meta.width,
        pixels_per_token=meta.pixels_per_token,
        num_inference_steps=meta.num_inference_steps,
        max_sequence_length=meta.max_sequence_length,
        guidance=float(meta.guidance),
        n_blocks=blocks,
        d_model=meta.d_model,
        threads=meta.threads or cpu_threads(None),
    )


def canvas_of_model(model: str, dtype: str | None = None, device: str | None = None) -> Canvas:
    """How a model draws by default (512 pixels, tiny-flux 64; four steps, no guidance), where no store says.

    Errors: `UsageError` for what is no FluxPipeline folder here, and for a model of the hub whose sizes are not known before it
    is loaded.
    """
    from harvest.models.defaults import defaults_of
    from harvest.models.model import KNOWN_SHAPES, choose_device, cpu_threads
    from harvest.models.pipelines import family_in, refuse_steering

    name, here = locate_model(model)
    known_as: dict[str, Any] = {}
    if not here and name not in KNOWN_SHAPES:
        raise UsageError(f"the sizes of {name} are not known here: give --store, a store that was harvested from it")
    family = family_in(_json(Path(name) / "model_index.json"), name) if here else KNOWN_SHAPES[name].family
    refuse_steering({"id": model, "architecture": family.name}, name)
    if here:
        config, vae = _config(Path(name), "transformer"), _config(Path(name), "vae")
        known_as = {"transformer": config}
        d_model, blocks = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
        pixels = 2 * 2 ** (len(vae["block_out_channels"]) - 1)
    else:
        shape = KNOWN_SHAPES[name]
        d_model, blocks, pixels = shape.d_model, shape.double_blocks, shape.pixels_per_token
    defaults = defaults_of(model)
    dtype = dtype or ("bfloat16" if choose_device(device).type == "cuda" else "float32")
    return Canvas(
        model=model,
        revision=None,
        weights={},
        known_as=known_as,
        weights_dtype=dtype,
        dtype=dtype,
        height=defaults.resolution,
        width=defaults.resolution,
        pixels_per_token=pixels,
        num_inference_steps=defaults.num_inference_steps,
        max_sequence_length=defaults.max_sequence_length,
        guidance=defaults.guidance,
        n_blocks=int(blocks),
        d_model=int(d_model),
        threads=cpu_threads(None),
    )


def canvas_of_document(values: Mapping[str, Any], where: str, model: str | None = None) -> Canvas:
    """How an experiment was drawn, from what its file says of it, where it says all; `model` is a folder with the same model.

    Errors: `UsageError` for what is missing or cannot be, and for a model that was a folder and is not here.
    """
    missing = [name for name in ("model", *CHOSEN, *FACTS) if name not in values]
    if missing:
        raise UsageError(
            f"{where} does not say all of how it was drawn ({', '.join(missing)} missing): give --store as well"
        )
    for name in ("pixels_per_token", "n_blocks", "d_model"):
        if type(values[name]) is not int or not 1 <= values[name] <= MOST:
            raise UsageError(f"{where}: {name} is {values[name]!r}; it must be a whole number from 1 on")
    name, revision, hashes = values["model"], values.get("revision"), values.get("weights_sha256") or {}
    if not isinstance(name, str) or not isinstance(revision, str | None) or not isinstance(hashes, dict):
        raise UsageError(f"{where}: model {name!r}, revision {revision!r} name no model")
    if values["weights_dtype"] not in tuple(DTYPES):
        raise UsageError(f"{where}: weights_dtype {values['weights_dtype']!r} is not one of {', '.join(DTYPES)}")
    _refuse_lost_folder(where, name, model)
    locate_model(model or name)
    canvas = Canvas(
        model=model or name,
        revision=None if model is not None else revision,
        weights={str(part): str(value) for part, value in hashes.items()},
        known_as={"id": name, "weights_sha256": dict(hashes)},
        **_typed(values, where),
        **{key: values[key] for key in FACTS},
    )
    return canvas.changed(values, where)


def _typed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a file chooses of how to draw; `UsageError` for a text where a number is meant, and the other way round."""
    found = {name: values[name] for name in CHOSEN if name in values}
    for name, value in found.items():
        if name in COUNTS and type(value) is not int:
            raise UsageError(f"{where}: {name} is {value!r}; it must be a whole number from 1 on")
        if name == "guidance" and type(value) not in (int, float):
            raise UsageError(f"{where}: guidance is {value!r}; it must be a number, 0 or more")
        if name == "dtype" and value not in tuple(DTYPES):
            raise UsageError(f"{where}: dtype {value!r} is not one of {', '.join(DTYPES)}")
    return found | ({"guidance": float(found["guidance"])} if "guidance" in found else {})


def _refuse_lost_folder(where: str, name: str, model: str | None) -> None:
    """`UsageError` for a model that was a folder on another machine, unless `model` says where it is."""
    if model is None and name != TINY_FLUX and "/" not in name and not Path(name).exists():
        raise UsageError(
            f"the model of {where} was a folder named {name!r}, which is not here: say where it is with --model FOLDER"
        )


def _check_hashes(where: str, wanted: Any, known: Mapping[str, str]) -> None:
    if wanted is None or not known:
        return
    for part in PARTS:
        if isinstance(wanted, dict) and part in wanted and part in known and wanted[part] != known[part]:
            raise MismatchError(
                f"{where} was made with another model: its {part} has weights {str(wanted[part])[:SHOWN]}…, here they are "
                f"{known[part][:SHOWN]}…; draw with the model that it was made with"
            )


def transformer_of_files(canvas: Canvas) -> str | None:
    """SHA-256 of the transformer's weights in their dtype, as `harvest.models.model.weights_hash` says of the loaded ones.

    None where that takes loading the model: one of the hub, one in several or in large files.
    """
    name, here = locate_model(canvas.model)
    found = sorted((Path(name) / "transformer").glob("*.safetensors")) if here else []
    if len(found) != 1 or found[0].stat().st_size > READ_AHEAD:
        return None
    try:
        tensors = safetensors.torch.load_file(found[0])
    except (OSError, safetensors.SafetensorError):
        return None  # which loading it tells
    return tensors_hash({name: tensor.to(DTYPES[canvas.weights_dtype]) for name, tensor in tensors.items()})


def check_weights(canvas: Canvas, found: Mapping[str, str]) -> None:
    """`MismatchError` unless the loaded weights, part -> SHA-256, are those that the store names."""
    for part in PARTS:
        wanted = canvas.weights.get(part)
        if wanted is not None and found.get(part) != wanted:
            raise MismatchError(
                f"the {part} of {canvas.model} has weights {str(found.get(part))[:SHOWN]}…, the store was drawn by "
                f"{model_name(dict(canvas.known_as))}, {part} {wanted[:SHOWN]}…: give the model that the store was harvested from"
            )


def _compare(folder: Path, model: Mapping[str, Any], where: str) -> None:
    """`MismatchError` for a folder whose transformer has other sizes than the store's model."""
    here, there = _config(folder, "transformer"), model["transformer"]
    for key in COMPARED:
        if key in there and key in here and here[key] != there[key]:
            raise MismatchError(
                f"{folder} is another model than {model_name(dict(model))}, which drew {where}: {key} is {here[key]}, "
                f"expected {there[key]}; give the model that the store was harvested from"
            )


def _config(folder: Path, part: str) -> dict[str, Any]:
    return _json(folder / part / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({error}): give a complete FluxPipeline folder") from None
    if not isinstance(found, dict):
        raise DamagedError(f"{path} holds no configuration: give a complete FluxPipeline folder")
    return found
