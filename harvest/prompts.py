"""Where prompts come from: a file, a Hugging Face dataset, or the captions of `builtin:shapes`.

Whatever the source, a harvest works on a list of `Prompt`s that is fixed before the model is loaded,
so the store can say by hash what it was made of.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harvest.settings import TINY_FLUX, HarvestSettings
from harvest.tiny_flux import scenes
from store.errors import GranaryError, UsageError
from store.files import json_bytes, sha256_bytes
from store.split import split_of

BUILTIN_SHAPES = "builtin:shapes"
DATASET_DEFAULT = "yvdao/midjourney-v6"
DATASET_MIN_CHARACTERS, DATASET_MAX_CHARACTERS = 17, 512
"""Of a dataset, prompts longer than 16 characters, cut at 512: as both reference systems did."""
IMAGES_DEFAULT = {"builtin": 256, "dataset": 1000}
OWN_COLUMNS = {
    "image",
    "prompt",
    "seed",
    "split",
    "text_ids",
    "text_pieces",
    "text_length",
    "sigma",
    "scheduler_sigma",
    "truth",
}
FILE_SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text, the seed its file gave, the file's other columns, and its scene when it is a caption of ours."""

    text: str
    seed: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    scene: scenes.Scene | None = None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a harvest, one an image, and what the store says about their source."""

    prompts: tuple[Prompt, ...]
    source: dict[str, Any]

    def seed_of(self, image: int, first_seed: int) -> int:
        """The noise seed of an image: the file's, or `first_seed + image`."""
        given = self.prompts[image].seed
        return first_seed + image if given is None else given


def load_prompts(settings: HarvestSettings) -> PromptSet:
    """One prompt an image, by the rule: image i has prompt i // seeds_per_prompt.

    Errors: `UsageError` for a source that is missing, empty or not text, or has too few prompts.
    """
    name = settings.prompts or (BUILTIN_SHAPES if settings.model == TINY_FLUX else DATASET_DEFAULT)
    if name.startswith("builtin:"):
        if name != BUILTIN_SHAPES:
            raise UsageError(f"there is no prompt set {name!r}; there is {BUILTIN_SHAPES}")
        found = _builtin(settings)
    elif Path(name).exists() or name.lower().endswith(FILE_SUFFIXES) or "/" not in name:
        found = _chosen(read_file(Path(name)), settings)
    else:
        found = list(islice(_chosen_lazily(_dataset(name), settings), _wanted(settings, IMAGES_DEFAULT["dataset"])))
    if not found:
        raise UsageError(
            f"{name} holds no prompts" + ("" if settings.split == "all" else f" of the split {settings.split!r}")
        )
    images = settings.images or (len(found) * settings.seeds_per_prompt)
    needed = -(-images // settings.seeds_per_prompt)
    if needed > len(found) and not settings.cycle:
        raise UsageError(
            f"{images} images with {settings.seeds_per_prompt} seed(s) a prompt need {needed} prompts, and {name} has {len(found)}: "
            "ask for fewer --images, more --seeds-per-prompt, or say --cycle to begin again with the first"
        )
    chosen = tuple(found[(i // settings.seeds_per_prompt) % len(found)] for i in range(images))
    digest = sha256_bytes(json_bytes([[p.text, p.seed, dict(p.columns)] for p in found[:needed]]))
    source = name if not Path(name).exists() else Path(name).name
    return PromptSet(
        chosen, {"source": source, "sha256": digest, "count": min(needed, len(found)), "split": settings.split}
    )


def _wanted(settings: HarvestSettings, default: int) -> int:
    return -(-(settings.images or default) // settings.seeds_per_prompt)


def _builtin(settings: HarvestSettings) -> list[Prompt]:
    wanted = _wanted(settings, IMAGES_DEFAULT["builtin"])
    if settings.cycle:
        there = 3 * min(scenes.prompt_count("two", settings.split), scenes.prompt_count("one", settings.split) // 2)
        wanted = min(wanted, there)
    return [Prompt(text, scene=scene) for text, scene in scenes.prompts(wanted, settings.seed, settings.split)]


def _chosen(prompts: Iterable[Prompt], settings: HarvestSettings) -> list[Prompt]:
    return list(_chosen_lazily(prompts, settings))


def _chosen_lazily(prompts: Iterable[Prompt], settings: HarvestSettings) -> Iterator[Prompt]:
    return (p for p in prompts if settings.split == "all" or split_of(p.text) == settings.split)


def read_file(path: Path) -> list[Prompt]:
    """The prompts of a text file (one a line), or of CSV, JSONL or Parquet with `prompt` and perhaps `seed` columns."""
    if not path.exists():
        raise UsageError(
            f"there is no prompt file {path}; --prompts takes a file, a dataset id (OWNER/NAME) or {BUILTIN_SHAPES}"
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder; --prompts takes a file, a dataset id or {BUILTIN_SHAPES}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return [_from_row(row, f"{path} row {i}") for i, row in enumerate(_parquet_rows(path))]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not text in UTF-8 (byte {error.start} cannot be decoded): write one prompt a line, or CSV, JSONL or Parquet"
        ) from None
    if "\0" in text:
        raise UsageError(f"{path} is not text: it holds NUL bytes. Write one prompt a line, or CSV, JSONL or Parquet")
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [_from_row(row, f"{path} line {reader.line_num}") for row in reader]
    if suffix == ".jsonl":
        return [
            _from_row(_json_line(line, path, i), f"{path} line {i}")
            for i, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    return [Prompt(line.strip()) for line in text.splitlines() if line.strip()]


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is no Parquet file that can be read: {error}") from None
    return rows


def _json_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{path} line {number} is no JSON object with a key 'prompt'")
    return row


def _from_row(row: Mapping[Any, Any], where: str) -> Prompt:
    if "prompt" not in row:
        raise UsageError(f"{where} has no column 'prompt'; it has {', '.join(str(key) for key in row)}")
    text, seed = row["prompt"], row.get("seed")
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: the prompt is {text!r}; a prompt is text that is not empty")
    if seed is not None and seed != "":
        try:
            seed = int(seed)
        except (TypeError, ValueError):
            raise UsageError(f"{where}: the seed is {seed!r}; a seed is a whole number") from None
        if not 0 <= seed < 2**63:
            raise UsageError(f"{where}: the seed is {seed}; a seed is from 0 to 2**63 - 1")
    else:
        seed = None
    columns = {str(key): value for key, value in row.items() if key is not None and key not in OWN_COLUMNS}
    return Prompt(text.strip(), seed, columns)


def _dataset(name: str) -> Iterator[Prompt]:
    """The prompts of a Hugging Face dataset, streamed: longer than 16 characters, cut at 512."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # it would report each of its retries; our message says it once
    try:
        rows = iter(datasets.load_dataset(name, split="train", streaming=True))
        for row in rows:
            text = row.get("prompt")
            if text is None:
                raise UsageError(f"the dataset {name} has no column 'prompt'; it has {', '.join(row)}")
            if len(text) >= DATASET_MIN_CHARACTERS:
                yield Prompt(text[:DATASET_MAX_CHARACTERS])
    except (OSError, ValueError) as error:  # what `datasets` and the hub raise for missing, gated and unreachable
        if isinstance(error, GranaryError):
            raise
        raise UsageError(
            f"{name!r} is neither a file here nor a dataset that can be read from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Give a prompt file, a dataset id, or {BUILTIN_SHAPES}"
        ) from None
