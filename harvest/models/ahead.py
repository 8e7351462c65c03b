"""`--text-encoders first`: every prompt is encoded, and the text encoders are freed, before the transformer is loaded.

FLUX's T5 takes 9.5 GB in bfloat16 beside the transformer's 24.  The embeddings lie in files under `OUT.runs/embeddings/<what
decides them>/`, one a unit (`harvest.models.embeddings`): a run that goes on, and other workers, find them there.  They may be deleted
when the store is finished.
"""

import gc
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harvest.models.embeddings import Ahead, Embeddings, Unit, bytes_of, units_of
from harvest.models.loading import Frame, load_weights, place
from harvest.models.model import library_versions, weights_hash
from harvest.models.pipelines import tokenizers_of
from harvest.models.text import apart, encode, family_of
from harvest.settings import HarvestSettings
from store import layout
from store.errors import GranaryError
from store.files import sha256_bytes, write_json
from store.format import StoreMeta
from store.opening import peek
from store.sizes import human_size, many

DECIDING = ("torch", "transformers", "tokenizers", "diffusers")
"""libraries whose versions may change an embedding"""


@dataclass(frozen=True)
class Encoded:
    """What is left of the text encoders."""

    embeddings: Embeddings
    weights: Mapping[str, str]
    """part -> SHA-256 of its weights"""
    remark: str
    """how much was encoded, and where it lies"""


def encoded_alone(settings: HarvestSettings) -> bool:
    """Whether each prompt is encoded by itself: where prompts are drawn several times, but for stores that were begun otherwise."""
    if settings.seeds_per_prompt == 1 and not settings.cycle:
        return False
    there = peek(settings.out) if settings.out is not None else None
    return there is None or there.model.get("text_embeddings") == "alone"


def encode_first(
    settings: HarvestSettings, frame: Frame, meta: StoreMeta, texts: Sequence[str], alone: bool, device: torch.device
) -> Encoded:
    """The embeddings of every batch that this run may draw, made by encoders that are gone afterwards.  `texts`: one an image.

    For `--plan` only those of the batch that is timed, in memory.  `GranaryError` where they do not fit on the disk.
    """
    pipe = load_weights(settings, frame, meta.dtype, frame.encoders)
    hashes = {part: weights_hash(getattr(pipe, part)) for part in frame.encoders}
    facts = _facts(frame, meta, hashes, alone, device)
    folder = None if settings.plan or settings.out is None else _folder(settings.out, facts)
    units = list(dict.fromkeys(_units(settings, meta, texts, alone)))
    source = Ahead(folder)
    guided = apart(family_of(frame.pipe), meta.guidance)
    missing = source.missing([*guided, *(units[: len(units) if folder else 1])])
    size = 0
    if missing:
        place(pipe, device, settings.offload)
        pipe.transformer = frame.pipe.transformer  # its configuration says how wide a text without an encoder is
        if folder is not None:
            missing = turned(missing)
        for unit in tqdm(missing, unit="unit", desc="encode", disable=settings.plan):
            if folder is not None and not source.missing([unit]):
                continue  # another worker was faster
            embedded = encode(pipe, unit, meta.max_sequence_length)
            if folder is not None and not size:
                _check_room(folder, bytes_of(embedded) * len(missing))
                write_json(folder / "facts.json", facts)
            size = max(size, bytes_of(embedded))
            source.put(unit, embedded)
    del pipe
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    what = (
        f"text embeddings of {many(len(units), 'prompt')}"
        if alone
        else f"text embeddings, batch by batch ({len(units):,} of them)"
    )
    if folder is None:
        where = f"about {human_size(size * len(units))} under OUT.runs/embeddings"
    else:
        where = f"{human_size(sum(file.stat().st_size for file in folder.glob('*.safetensors')))} in {folder}"
    return Encoded(
        Embeddings(source, alone, lambda: device), hashes, f"{what} ({where}), made before the transformer is loaded"
    )


def _units(settings: HarvestSettings, meta: StoreMeta, texts: Sequence[str], alone: bool) -> Iterator[Unit]:
    """What is encoded together, batch by batch, of the parts that are named and have no commit."""
    for part in sorted(settings.parts_of(meta.n_parts)):
        if settings.out is not None and (settings.out / layout.part_commit(part)).exists():
            continue
        images = meta.part_images(part)
        for first in range(0, len(images), meta.batch_size):
            yield from units_of([texts[i] for i in images[first : first + meta.batch_size]], alone)


def turned(units: Sequence[Unit]) -> list[Unit]:
    """The same, in a circle from a random one on: workers that encode at once then make different ones.  No byte depends on it."""
    first = random.SystemRandom().randrange(len(units))
    return [*units[first:], *units[:first]]


def _facts(
    frame: Frame, meta: StoreMeta, hashes: Mapping[str, str], alone: bool, device: torch.device
) -> dict[str, Any]:
    """What decides an embedding besides its text: encoders, tokenizers, dtype, length and machine."""
    versions = library_versions()
    return {
        "weights_sha256": dict(hashes),
        "tokenizers_sha256": {
            name: tokenizer_hash(part)
            for name in tokenizers_of(family_of(frame.pipe))
            if (part := getattr(frame.pipe, name)) is not None
        },
        "dtype": meta.dtype,
        "max_sequence_length": meta.max_sequence_length,
        "alone": alone,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {name: versions[name] for name in DECIDING},
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary and rules, its marks and how it puts a chat, not where it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:  # left by the last call, and said anew in the next
        rules |= {"truncation": None, "padding": None}
    marks = {name: str(mark) for name, mark in tokenizer.special_tokens_map.items()}
    does = [rules, marks, tokenizer.model_max_length, tokenizer.padding_side, tokenizer.chat_template]
    return sha256_bytes(json.dumps(does, sort_keys=True).encode())


def _folder(out: Path, facts: Mapping[str, Any]) -> Path:
    """The folder of the embeddings that follow from `facts`; it appears with the first of them."""
    return layout.runs_folder(out) / "embeddings" / sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:16]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(next(each for each in folder.absolute().parents if each.is_dir())).free
    if needed > free:
        raise GranaryError(
            f"the text embeddings take {human_size(needed)} in {folder}, and {human_size(free)} are free: give --parts to harvest "
            "less at once, a smaller --max-sequence-length, or --text-encoders resident"
        )
