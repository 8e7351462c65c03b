"""The two tables of a part: prompts (one row an image) and pictures."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from harvest.models.text import Tokenized
from harvest.prompt_files import Prompt
from harvest.prompts import PromptSet
from harvest.tiny_flux import judge, scenes
from store.split import split_of

WEBP_QUALITY = 90
_FEATURES = {"id": {"dtype": "int64", "_type": "Value"}, "image": {"_type": "Image"}}
PICTURE_SCHEMA = pa.schema(
    [pa.field("id", pa.int64()), pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}}, sort_keys=True)},
)
"""What `datasets` reads pictures from, as it writes them itself."""


def prompt_table(
    images: range,
    prompts: PromptSet,
    first_seed: int,
    tokenized: Sequence[Tokenized],
    sigma: np.ndarray,
    scheduler_sigma: np.ndarray,
    truths: Sequence[str | None] | None,
    types: dict[str, pa.DataType],
) -> pa.Table:
    """One row an image of the part; `truths` adds the column `truth` for prompts whose scene is known."""
    chosen = [prompts.prompts[i] for i in images]
    words = [tokenized[i] for i in images]
    columns: dict[str, Any] = {
        "image": pa.array(images, pa.int64()),
        "prompt": pa.array([p.text for p in chosen], pa.string()),
        "seed": pa.array([prompts.seed_of(i, first_seed) for i in images], pa.int64()),
        "split": pa.array([split_of(p.text) for p in chosen], pa.string()),
        "text_ids": pa.array([w.ids for w in words], pa.list_(pa.int32())),
        "text_pieces": pa.array([w.pieces for w in words], pa.list_(pa.string())),
        "text_length": pa.array([len(w.ids) for w in words], pa.int32()),
        **_padding(words),
        "sigma": pa.array(list(sigma), pa.list_(pa.float32())),
        "scheduler_sigma": pa.array(list(scheduler_sigma), pa.list_(pa.float32())),
    }
    if truths is not None:
        columns["truth"] = pa.array(truths, pa.string())
    for name, type_ in types.items():
        values = [p.columns.get(name) for p in chosen]
        columns[name] = pa.array([str(v) if type_ == pa.string() and v is not None else v for v in values], type_)
    return pa.table(columns)


def _padding(words: Sequence[Tokenized]) -> dict[str, pa.Array]:
    """The column of padding before `text_length`; none of a model whose texts never have any there."""
    found = [w.padding for w in words if w.padding is not None]
    return {"text_padding": pa.array(found, pa.list_(pa.int32()))} if found else {}


def picture_table(images: range, pictures: Sequence[Image.Image], form: str) -> pa.Table:
    """The pictures of a part, encoded as PNG or WebP."""
    rows = [
        {"bytes": _encoded(picture, form), "path": f"{i:06d}.{form}"}
        for i, picture in zip(images, pictures, strict=True)
    ]
    return pa.Table.from_arrays(
        [pa.array(images, pa.int64()), pa.array(rows, PICTURE_SCHEMA.field("image").type)], schema=PICTURE_SCHEMA
    )


def _encoded(picture: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    if form == "png":
        picture.save(buffer, "PNG", compress_level=6)
    else:
        picture.save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
    return buffer.getvalue()


def truth_of(prompt: Prompt, picture: Image.Image | None, pixels_per_token: int) -> str | None:
    """What a caption of ours should show, as JSON, with the masks of the picture that was drawn; None for other prompts."""
    if prompt.scene is None:
        return None
    if picture is None:
        return json.dumps(scenes.truth(prompt.scene, None, None, pixels_per_token))
    verdict = judge.judge(np.asarray(picture.convert("RGB")), prompt.scene)
    masks = verdict.masks if verdict.right else None
    return json.dumps(scenes.truth(prompt.scene, masks, verdict.right, pixels_per_token))
