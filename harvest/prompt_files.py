"""Reads prompt files: text, one prompt a line, or a table with a column `prompt`, perhaps `seed`, and others.

What cannot be read is refused in one sentence that says where; what a table holds beside prompts is
kept as it is when the store can carry it, else as JSON text.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harvest.tiny_flux import scenes
from store.errors import UsageError
from store.strata import TEXT_COLUMNS

OWN_COLUMNS = frozenset(
    ["image", "prompt", "seed", "split", "text_ids", "text_pieces", *TEXT_COLUMNS, "sigma", "scheduler_sigma", "truth"]
)
"""Columns that the store fills itself; a prompt file's own columns of these names are not taken over."""
TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl", ".parquet"}
FILE_SUFFIXES = (".txt", *TABLE_SUFFIXES)
NOT_PROMPTS = {".json": "write JSON Lines, one object a line, as .jsonl", ".xlsx": "export it as CSV"}


@dataclass(frozen=True)
class Prompt:
    """One prompt: text, the seed its file gave, the file's other columns, and its scene when it is a caption of ours."""

    text: str
    seed: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    scene: scenes.Scene | None = None


def read_file(path: Path) -> list[Prompt]:
    """The prompts of a file; `UsageError` for one that is missing, no text, or without prompts where they should be."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UsageError(f"{path} is a folder; --prompts takes a file, a dataset id (OWNER/NAME) or builtin:shapes")
    if suffix in NOT_PROMPTS:
        raise UsageError(f"{path} is no prompt file: {NOT_PROMPTS[suffix]}")
    if suffix == ".parquet":
        return [_from_row(row, f"{path} row {i}") for i, row in enumerate(_parquet_rows(path))]
    text = _text(path)
    if suffix in (".csv", ".tsv"):
        return [_from_row(row, where) for row, where in _csv_rows(text, path, "\t" if suffix == ".tsv" else ",")]
    lines = [(number, line) for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if suffix == ".jsonl":
        return [_from_row(_json_row(line, f"{path} line {n}"), f"{path} line {n}") for n, line in lines]
    return [Prompt(line.strip()) for _, line in lines]


def column_types(prompts: Sequence[Prompt]) -> dict[str, pa.DataType]:
    """The prompt file's own columns and their types over all prompts, so that every part has one schema; mixed types become text."""
    types: dict[str, pa.DataType] = {}
    for name in sorted({name for prompt in prompts for name in prompt.columns}):
        try:
            found = pa.array([prompt.columns.get(name) for prompt in prompts]).type
        except (pa.ArrowException, OverflowError):
            found = pa.string()
        types[name] = pa.string() if pa.types.is_null(found) else found
    return types


def _text(path: Path) -> str:
    remedy = "write one prompt a line, or CSV, JSONL or Parquet"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8 (byte {error.start} cannot be decoded): {remedy}") from None
    if "\0" in text:
        raise UsageError(f"{path} is not text: it holds NUL bytes. Please {remedy}")
    return text


def _csv_rows(text: str, path: Path, delimiter: str) -> Iterator[tuple[dict[str, Any], str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            yield row, f"{path} line {reader.line_num}"
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num} is no CSV that can be read: {error}") from None


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} is no Parquet file that can be read: {error}") from None
    return rows


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where} is no JSON object with a key 'prompt'")
    return row


def _from_row(row: Mapping[Any, Any], where: str) -> Prompt:
    if "prompt" not in row:
        raise UsageError(f"{where} has no column 'prompt'; it has {', '.join(str(key) for key in row)}")
    text = row["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: the prompt is {text!r}; a prompt is text that is not empty")
    columns = {
        str(key): _plain(value, f"{where}, column {key!r}")
        for key, value in row.items()
        if key is not None and key not in OWN_COLUMNS
    }
    _encodable(text, where)
    return Prompt(text.strip(), _seed(row.get("seed"), where), columns)


def _seed(value: Any, where: str) -> int | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    whole = whole or (isinstance(value, float) and value.is_integer())  # pandas writes 7.0 where others are missing
    whole = whole or (isinstance(value, str) and value.strip().isdecimal())
    if not whole or not 0 <= int(value) < 2**63:
        raise UsageError(f"{where}: the seed is {value!r}; a seed is a whole number from 0 to 2**63 - 1")
    return int(value)


def _plain(value: Any, where: str) -> Any:
    """A value that JSON and Arrow carry alike: numbers and text as they are, a NaN as missing, anything else as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _encodable(value, where)
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, (bytes, bytearray)):
        raise UsageError(f"{where} holds bytes; a prompt table carries text and numbers: leave that column out")
    return _encodable(json.dumps(value, default=str, ensure_ascii=False, sort_keys=True), where)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} holds half a surrogate pair at character {error.start}: it is no valid text"
        ) from None
    return text
