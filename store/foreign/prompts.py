"""The prompts that imported activations were drawn from: a table with one row a prompt, or texts that say that none are known.

A file is text, one prompt a line, or CSV, JSON Lines or Parquet with a column `prompt`, and perhaps `seed`, `text_length`,
`text_padding`, `text_ids` and `text_pieces`, which mean what they mean in a store.  Its other columns are kept as they are: numbers and
text, anything else as JSON text.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from store.errors import UsageError
from store.split import split_of
from store.strata import TEXT_COLUMNS

TAKEN: dict[str, pa.DataType] = {
    "prompt": pa.string(),
    "seed": pa.int64(),
    "text_length": pa.int32(),
    "text_padding": pa.list_(pa.int32()),
    "text_ids": pa.list_(pa.int32()),
    "text_pieces": pa.list_(pa.string()),
}
"""columns that have a meaning in a store, and their types there"""
MADE_HERE = ("image", "split", "sigma", "scheduler_sigma", "truth")
"""columns of a store that a prompt file does not decide"""


def read_prompts(path: Path) -> pa.Table:
    """The prompts of a file and what it says beside them; `UsageError` for what cannot be read or has none."""
    if not path.is_file():
        raise UsageError(f"there is no prompt file {path}")
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".csv": lambda file: _csv(file, ","), ".tsv": lambda file: _csv(file, "\t"),
        ".jsonl": pyarrow.json.read_json, ".parquet": pq.read_table,
    }  # fmt: skip
    try:
        table = readers.get(path.suffix.lower(), _lines)(path)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path} is no prompt file that can be read: {error}") from None
    if "prompt" not in table.column_names:
        raise UsageError(f"{path} has no column 'prompt'; it has {', '.join(table.column_names)}")
    if len(set(table.column_names)) < len(table.column_names):
        raise UsageError(f"{path} has two columns of one name: {', '.join(table.column_names)}")
    columns = {name: _taken(table, name, path) for name in TAKEN if name in table.column_names}
    for row, text in enumerate(columns["prompt"].to_pylist()):
        if text is None or not text.strip():
            raise UsageError(f"{path} row {row}: the prompt is {text!r}; a prompt is text that is not empty")
    for name in sorted(set(table.column_names) - {*TAKEN, *MADE_HERE}):
        columns[name] = _plain(table[name].combine_chunks(), f"{path}, column {name!r}")
    if not table.num_rows:
        raise UsageError(f"{path} holds no prompts")
    if "text_length" in columns and min(columns["text_length"].to_pylist()) < 0:
        raise UsageError(f"{path}: the column 'text_length' holds negative numbers")
    return pa.table(columns)


def made_up(name: str, images: int) -> pa.Table:
    """A prompt for each image of which none is known: one text each, or all images would be of one split."""
    return pa.table({"prompt": pa.array([f"image {image} of {name}" for image in range(images)], pa.string())})


def prompt_rows(
    prompts: pa.Table, images: range, repeats: int, text_tokens: int, sigmas: list[float], scheduled: list[float] | None
) -> pa.Table:
    """The rows of a part, with every column of a store's prompt table; image i has prompt i // `repeats`, of successive seeds.

    What is not known is null (`seed`, `scheduler_sigma`) or empty (`text_ids`, `text_pieces`); all `text_tokens` are
    real where the file does not say how many are.
    """
    chosen = prompts.take(pa.array([image // repeats for image in images], pa.int64()))
    missing: dict[str, list[Any]] = {
        "seed": [None], "text_ids": [[]], "text_pieces": [[]], "text_length": [text_tokens],
    }  # fmt: skip
    found = {
        name: chosen[name].combine_chunks()
        if name in chosen.column_names
        else pa.array(missing[name] * len(images), TAKEN[name])
        for name in TAKEN
        if name in missing or name in chosen.column_names
    }
    drawn_before = pa.array([image % repeats for image in images], pa.int64())
    texts = found["prompt"].to_pylist()
    columns: dict[str, Any] = {
        "image": pa.array(images, pa.int64()),
        "prompt": found["prompt"],
        "seed": pc.add(found["seed"], drawn_before),
        "split": pa.array([split_of(text) for text in texts], pa.string()),
        "text_ids": found["text_ids"],
        "text_pieces": found["text_pieces"],
        **{name: found[name] for name in TEXT_COLUMNS if name in found},
        "sigma": pa.array([sigmas] * len(images), pa.list_(pa.float32())),
        "scheduler_sigma": pa.array([scheduled] * len(images), pa.list_(pa.float32())),
    }
    own = [name for name in chosen.column_names if name not in TAKEN]
    return pa.table({**columns, **{name: chosen[name].combine_chunks() for name in own}})


def _lines(path: Path) -> pa.Table:
    lines = path.read_text("utf-8-sig").replace("\r\n", "\n").split("\n")
    if "\0" in "".join(lines[:1]):
        raise UsageError(f"{path} is no text: write one prompt a line, or CSV, JSON Lines or Parquet")
    return pa.table({"prompt": pa.array([line.strip() for line in lines if line.strip()], pa.string())})


def _csv(path: Path, delimiter: str) -> pa.Table:
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types={"prompt": pa.string()}),
    )


def _taken(table: pa.Table, name: str, path: Path) -> pa.Array:
    try:
        found = table[name].combine_chunks().cast(TAKEN[name])
    except pa.ArrowException as error:
        raise UsageError(f"{path}: the column {name!r} is not {TAKEN[name]}, as in a store: {error}") from None
    if name == "prompt":
        return pa.array([None if text is None else text.strip() for text in found.to_pylist()], pa.string())
    if name != "seed" and found.null_count:
        raise UsageError(f"{path}: the column {name!r} is empty in {found.null_count} rows")
    return found


def _plain(column: pa.Array, where: str) -> pa.Array:
    """A column as JSON and Parquet carry it alike."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UsageError(f"{where} holds bytes; a prompt table carries text and numbers: leave that column out")
    if pa.types.is_null(kind):
        return pa.array([None] * len(column), pa.string())
    if pa.types.is_floating(kind):
        values = [None if value is None or not math.isfinite(value) else value for value in column.to_pylist()]
        return pa.array(values, pa.float64())
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind):
        return column
    return pa.array([_text(value) for value in column.to_pylist()], pa.string())


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False, sort_keys=True)
