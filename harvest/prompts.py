"""Where prompts come from: a file, a Hugging Face dataset, or the captions of `builtin:shapes`.

Whatever the source, a harvest works on a list of `Prompt`s that is fixed before the model is loaded,
so the store can say by hash what it was made of.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from harvest.prompt_files import FILE_SUFFIXES, Prompt, column_types, read_file
from harvest.settings import TINY_FLUX, HarvestSettings
from harvest.tiny_flux import scenes
from store.errors import GranaryError, UsageError
from store.files import json_bytes, sha256_bytes
from store.split import split_of

BUILTIN_SHAPES = "builtin:shapes"
DATASET_DEFAULT = "yvdao/midjourney-v6"
DATASET_MIN_CHARACTERS, DATASET_MAX_CHARACTERS = 17, 512
"""Of a dataset, prompts longer than 16 characters, cut at 512: as both reference systems did."""
CANDIDATES = 10_000
"""How many of a source's prompts, those of most characters, are looked at for the greatest number of text tokens."""
IMAGES_DEFAULT = {"builtin": 256, "dataset": 1000}


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a harvest, one an image, and what the store says about their source.

    Image i has the same prompt and seed whatever the number of images is, so that a store that is extended equals one
    that was harvested in one go.  What must not depend on that number either (the types of columns, the slots that real
    text tokens need) follows from `found`.
    """

    prompts: tuple[Prompt, ...]
    found: tuple[Prompt, ...]
    """the distinct prompts in their order: all of a file (of the split asked for), whether an image has them or not; of
    our captions and of a dataset, as many as there are images for"""
    name: str
    split: str
    seeds_per_prompt: int = 1

    @property
    def source(self) -> dict[str, Any]:
        """What the store says about its prompts."""
        return self.source_of_first(len(self.prompts))

    def source_of_first(self, images: int) -> dict[str, Any]:
        """What a store of the first `images` says about its prompts: name, split, columns, hash and number of those used."""
        used = self.found[: -(-images // self.seeds_per_prompt)]
        return {
            "source": self.name,
            "split": self.split,
            "columns": {name: str(type_) for name, type_ in self.columns.items()},
            "sha256": sha256_bytes(json_bytes([[p.text, p.seed, dict(p.columns)] for p in used])),
            "count": len(used),
        }

    @cached_property
    def columns(self) -> dict[str, pa.DataType]:
        """The prompt file's own columns and their types over all of its prompts: one schema for every part."""
        return column_types(self.found)

    def candidates_for_longest(self) -> list[str]:
        """Different texts, one of which is the longest of the source in text tokens, whichever of them the images use."""
        texts = {prompt.text for prompt in self.found}
        if self.found[0].scene is not None:
            kinds = (scenes.scenes("one"), scenes.scenes("two"))
            texts |= {caption for kind in kinds for scene in kind for caption in scenes.captions(scene)}
        longest = sorted(texts, key=lambda text: (-len(text), text))[:CANDIDATES]
        return [*longest, *({prompt.text for prompt in self.prompts}.difference(longest))]

    def seed_of(self, image: int, first_seed: int) -> int:
        """The noise seed of an image: the file's plus how often its prompt was drawn before, or `first_seed + image`."""
        given = self.prompts[image].seed
        return first_seed + image if given is None else given + image % self.seeds_per_prompt


def load_prompts(settings: HarvestSettings) -> PromptSet:
    """One prompt an image, by the rule: image i has prompt i // seeds_per_prompt.

    Errors: `UsageError` for a source that is missing, empty or not text, or has too few prompts.
    """
    name = source_of(settings)
    if name.startswith("builtin:"):
        found = _builtin(settings, name)
    elif is_dataset(settings):
        found = list(islice(_chosen(_dataset(name), settings), _wanted(settings, IMAGES_DEFAULT["dataset"])))
    elif not _exists(name):
        raise UsageError(
            f"there is no prompt file {name}; --prompts takes a file, a dataset id (OWNER/NAME) or {BUILTIN_SHAPES}"
        )
    else:
        found = list(_chosen(read_file(Path(name)), settings))
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
    highest = max(prompt.seed or 0 for prompt in chosen) + settings.seeds_per_prompt
    if max(highest, settings.seed + images) >= 2**63:
        raise UsageError(f"--seed {settings.seed} and the seeds of {name} must stay below 2**63 with {images} images")
    source = Path(name).name if _exists(name) else name
    return PromptSet(chosen, tuple(found), source, settings.split, settings.seeds_per_prompt)


def source_of(settings: HarvestSettings) -> str:
    """Where the prompts come from when nothing else is said: our captions for tiny-flux, the dataset of record for others."""
    return settings.prompts or (BUILTIN_SHAPES if settings.model == TINY_FLUX else DATASET_DEFAULT)


def is_dataset(settings: HarvestSettings) -> bool:
    """Whether the source is neither ours nor a file: something to be streamed from the hub."""
    name = source_of(settings)
    here = name.startswith("builtin:") or _exists(name) or name.lower().endswith(FILE_SUFFIXES)
    return not here and name.count("/") == 1


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # a name longer than any file's
        return False


def _wanted(settings: HarvestSettings, default: int) -> int:
    return -(-(settings.images or default) // settings.seeds_per_prompt)


def _builtin(settings: HarvestSettings, name: str) -> list[Prompt]:
    if name != BUILTIN_SHAPES:
        raise UsageError(f"there is no prompt set {name!r}; there is {BUILTIN_SHAPES}")
    wanted = _wanted(settings, IMAGES_DEFAULT["builtin"])
    if settings.cycle:
        there = 3 * min(scenes.prompt_count("two", settings.split), scenes.prompt_count("one", settings.split) // 2)
        wanted = min(wanted, there)
    return [Prompt(text, scene=scene) for text, scene in scenes.prompts(wanted, settings.seed, settings.split)]


def _chosen(prompts: Iterable[Prompt], settings: HarvestSettings) -> Iterator[Prompt]:
    return (p for p in prompts if settings.split == "all" or split_of(p.text) == settings.split)


def _dataset(name: str) -> Iterator[Prompt]:
    """The prompts of a Hugging Face dataset, streamed: longer than 16 characters, cut at 512."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # it would report each of its retries; our message says it once
    try:
        rows = iter(datasets.load_dataset(name, split="train", streaming=True))
        for row in rows:
            if "prompt" not in row:
                raise UsageError(f"the dataset {name} has no column 'prompt'; it has {', '.join(row)}")
            text = row["prompt"]
            if isinstance(text, str) and len(text) >= DATASET_MIN_CHARACTERS:
                yield Prompt(text[:DATASET_MAX_CHARACTERS])
    except (OSError, ValueError) as error:  # what `datasets` and the hub raise for missing, gated and unreachable
        if isinstance(error, GranaryError):
            raise
        raise UsageError(
            f"{name!r} is neither a file here nor a dataset that can be read from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Give a prompt file, a dataset id, or {BUILTIN_SHAPES}"
        ) from None
