"""The CLIP model that embeds pictures: from a folder or the Hugging Face hub, prepared as its own preprocessor says.

`transformers` with its PIL image processor, so that torchvision is not needed and the same pixels come out with and without it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from store import Store
from store.errors import ForeignError, UsageError
from train.dictionaries.hub import fetch, may_be_on_hub, on_hub

TINY_FLUX = "tiny-flux"
TINY_FLUX_CLIP = Path(__file__).parents[2] / "harvest" / "tiny_flux" / "weights" / "clip"
MODEL_TYPES = ("clip", "clip_vision_model")
INDEX = "model.safetensors.index.json"
"""names the files of weights that are divided into several"""
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")
SMALL_FILES = ("config.json", "preprocessor_config.json")
ARCHITECTURE = ("hidden_act", "image_size", "patch_size", "num_attention_heads", "layer_norm_eps", "projection_dim")
PREPARATION = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_convert_rgb",
)  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """A CLIP image encoder, ready to embed."""

    model: Any
    processor: Any
    name: str
    """what it was asked for by: a path or an id; for people only"""
    identity: str
    """SHA-256 of its weights in float32 and of what decides how it sees a picture: equal wherever it lies and in whichever file"""

    def embed(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "image dim"]:
        """The projected image embeddings, float32, as the model gives them: not normalised."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = self.model(pixel_values=pixels.to(self.model.device)).image_embeds
        return np.asarray(found.float().cpu().numpy())


def clip_for(store: Store, name: str | None) -> str:
    """Which CLIP model is meant for a store's pictures; `UsageError` when none is named and the store has none of its own."""
    if name is not None:
        return name
    model = store.meta.model.get("id")
    if model != TINY_FLUX:
        raise UsageError(
            f"which CLIP model is to embed the pictures of {model}? Say --clip openai/clip-vit-base-patch32 (fetched once from the "
            "Hugging Face hub), --clip FOLDER, or --embeddings FILE with embeddings that you have"
        )
    if not TINY_FLUX_CLIP.exists():
        raise UsageError(
            f"tiny-flux's own CLIP model is not in {TINY_FLUX_CLIP}: say --clip FOLDER, or --embeddings FILE"
        )
    return str(TINY_FLUX_CLIP)


def load_clip(name: str, device: str | None = None) -> Clip:
    """The image encoder in a folder or on the hub (`OWNER/NAME`, `hf://OWNER/NAME`), in float32.

    `UsageError` for a place where nothing lies and a device that is not there, `ForeignError` for what is no CLIP model with an image
    encoder and a preprocessor, `UnreachableError` when the hub does not answer.
    """
    target = _device(device)
    folder = _folder(name)
    _refuse_others(folder, name)
    with _quiet():
        from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

        try:
            model, loading = CLIPVisionModelWithProjection.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, weights_only=True, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except Exception as error:  # transformers raises nearly anything at files that are damaged
            reason = " ".join(str(error).split())[:300]
            raise ForeignError(f"--clip {name}: the CLIP model cannot be read ({reason}): {_WANTED}") from None
    if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise ForeignError(f"--clip {name}: the image encoder is not whole, {missing[0]} is missing: {_WANTED}")
    identity = _identity(model, processor)
    return Clip(model.to(target).eval().requires_grad_(False), processor, name, identity)


_WANTED = "name a folder with a whole CLIP model (config.json, preprocessor_config.json, model.safetensors), or give --embeddings FILE"


def _device(asked: str | None) -> torch.device:
    if asked is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise UsageError(f"--device {asked}: expected cpu, cuda or cuda:N, the number of a GPU")
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {asked}: {str(error).splitlines()[0]}") from None
    return device


def _folder(name: str) -> Path:
    """The local folder of a model, fetched from the hub where it is meant to be there."""
    path = Path(name)
    if path.is_dir():
        return path
    if not (on_hub(name) or may_be_on_hub(name)):
        raise UsageError(f"--clip {name}: there is no such folder, and it is no id of the hub (OWNER/NAME) either")
    place = name if on_hub(name) else f"hf://{name}"
    for file in WEIGHTS:
        folder = fetch(place, (*SMALL_FILES, file))
        if (folder / file).exists():
            break
    return fetch(place, (*SMALL_FILES, INDEX, *_shards(folder, name))) if file == INDEX else folder


def _shards(folder: Path, name: str) -> list[str]:
    """The files that the index of divided weights names."""
    try:
        return sorted({str(file) for file in json.loads((folder / INDEX).read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ForeignError(f"--clip {name}: its {INDEX} names no weights ({error!r}): {_WANTED}") from None


def _refuse_others(folder: Path, name: str) -> None:
    for file in SMALL_FILES:
        if not (folder / file).is_file():
            raise ForeignError(f"--clip {name} is no CLIP model: it has no {file}; {_WANTED}")
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise ForeignError(f"--clip {name} is no CLIP model: it has no weights ({', '.join(WEIGHTS)}); {_WANTED}")
    divided = not (folder / WEIGHTS[0]).is_file() and (folder / INDEX).is_file()
    if lost := [file for file in (_shards(folder, name) if divided else ()) if not (folder / file).is_file()]:
        raise ForeignError(f"--clip {name}: {lost[0]}, which its {INDEX} names, is not there: {_WANTED}")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ForeignError(f"--clip {name}: its config.json is not the one of a model ({error}): {_WANTED}") from None
    if kind not in MODEL_TYPES:
        raise ForeignError(
            f"--clip {name} is a model of type {kind!r}, expected {' or '.join(map(repr, MODEL_TYPES))}: {_WANTED}"
        )


def _identity(model: Any, processor: Any) -> str:
    prepared = processor.to_dict()
    facts = {
        "architecture": {key: getattr(model.config, key) for key in ARCHITECTURE},
        "preparation": {key: prepared[key] for key in PREPARATION if key in prepared},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=dict).encode())
    for key, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().numpy().reshape(-1)
        digest.update(f"{key} {values.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values)
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """While the context lasts, transformers logs errors only and draws no bars: the text half of the weights is left out on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
