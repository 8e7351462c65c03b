"""Which images a scan looks at, and which of them are replicates: pictures of one prompt that differ in their seed."""

import re
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from jaxtyping import Bool, Int

from analyze.prompts import prompt_texts
from analyze.scan.settings import ScanSettings
from store import Store
from store.errors import UsageError
from store.sites import parse_numbers
from store.split import normalise

SHOWN = 60
ONE_SEED = "one seed a prompt: no deviation over seeds can be given"
UNTOLD = "this store does not say its prompts, so not which images differ in seed alone: no deviation over seeds can be given"


@dataclass(frozen=True)
class Catalogue:
    """The images of a store by prompt and seed."""

    prompts: tuple[str, ...]
    keys: tuple[str, ...]
    """the prompts normalised (case, spaces, flags): equal for replicates"""
    seeds: Int[np.ndarray, " image"]
    """0 where it is not known"""
    told: bool
    """whether the store says its prompts at all"""
    unknown: Bool[np.ndarray, " image"] | None = None
    """of which images the seed is not known (a store of activations from elsewhere need not say it); None: it is of all"""

    def seed(self, image: int) -> int | None:
        """The seed of an image, None where it is not known."""
        return None if self.unknown is not None and self.unknown[image] else int(self.seeds[image])

    def unseeded(self, images: Int[np.ndarray, " row"]) -> Int[np.ndarray, " unknown"]:
        """Those of the images of which the seed is not known."""
        return images[:0] if self.unknown is None else images[self.unknown[images]]

    def groups(self, images: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
        """A number for each of the given images, equal for images that share a prompt."""
        numbers: dict[str, int] = {}
        return np.asarray([numbers.setdefault(self.keys[image], len(numbers)) for image in images], np.int64)

    def numbered(self, text: str) -> Int[np.ndarray, " row"]:
        """The images that `0-9,12` names; `UsageError` beyond those there are."""
        return np.asarray(parse_numbers(text, len(self.prompts), "image"), np.int64)

    def matching(self, pattern: str, flag: str) -> Int[np.ndarray, " row"]:
        """The images whose prompt matches a regular expression somewhere; `UsageError` when none does."""
        self.need_prompts(f"--{flag}")
        expression = compiled(pattern, flag)
        found = [image for image, prompt in enumerate(self.prompts) if expression.search(prompt)]
        if not found:
            raise UsageError(
                f"no prompt of the store matches --{flag} {pattern!r}; its first is {short(self.prompts[0])}"
            )
        return np.asarray(found, np.int64)

    def of_prompt(self, prompt: str, where: str) -> Int[np.ndarray, " row"]:
        """The images of one prompt; `UsageError`, with the closest there is, when the store has none."""
        self.need_prompts(where)
        key = normalise(prompt)
        found = [image for image, other in enumerate(self.keys) if other == key]
        if not found:
            close = get_close_matches(key, dict.fromkeys(self.keys), n=1, cutoff=0.0)
            hint = f"; the closest is {short(self.prompts[self.keys.index(close[0])])}" if close else ""
            raise UsageError(f"{where}: the store has no image of the prompt {short(prompt)}{hint}")
        return np.asarray(found, np.int64)

    def need_prompts(self, what: str) -> None:
        """Refuse to look for prompts in a store that was shared without them."""
        if not self.told:
            raise UsageError(f"{what} looks for prompts, which were left out of this store: choose images by number")


def catalogue(store: Store) -> Catalogue:
    """The prompts and seeds of a store."""
    table, prompts = store.prompts(), prompt_texts(store)
    unknown = np.asarray(table["seed"].is_null().to_numpy(zero_copy_only=False), bool)
    seeds = np.asarray(table["seed"].fill_null(0).to_numpy(), np.int64)
    keys = tuple(normalise(prompt) for prompt in prompts)
    return Catalogue(tuple(prompts), keys, seeds, "prompt" in table.column_names, unknown)


def compiled(pattern: str, flag: str) -> re.Pattern[str]:
    """A regular expression that ignores case; `UsageError` for one that is none."""
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UsageError(
            f"--{flag} {pattern!r} is no regular expression: {error}; put a \\ before ( [ + * ? ."
        ) from None


def chosen_images(known: Catalogue, settings: ScanSettings) -> Int[np.ndarray, " row"]:
    """The images of a scan that has no sides, ascending: all, or those of --images that match --prompts."""
    images = np.arange(len(known.prompts)) if settings.images is None else known.numbered(settings.images)
    if settings.prompts is not None:
        matching = known.matching(settings.prompts, "prompts")
        kept = np.intersect1d(images, matching)
        if not len(kept):
            raise UsageError(
                f"none of the images {settings.images} has a prompt that matches --prompts {settings.prompts!r}: "
                f"images {', '.join(map(str, matching[:8]))} do"
            )
        images = kept
    return np.asarray(images, np.int64)


def short(prompt: str) -> str:
    """A prompt in quotes, cut when it is long."""
    return f"“{prompt}”" if len(prompt) <= SHOWN else f"“{prompt[: SHOWN - 1].rstrip()}…”"
