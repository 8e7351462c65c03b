"""The shots that an experiment asks for: images of a store, or prompts, each with one or several seeds; or shots already settled."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analyze.steering.drawing import Shot, shots_of
from store import Store
from store.errors import UsageError
from store.sites import parse_numbers

MOST_SHOTS = 1_000_000
MOST_SEED = 2**63 - 1


def shots_asked(document: Mapping[str, Any], where: str, folder: Path, store: Store | None) -> tuple[Shot, ...]:
    """What is drawn, in order: each prompt with each seed.  `UsageError` for nothing, for one twice, and for what is no prompt or seed."""
    ways = [key for key in ("shots", "images", "prompts") if document.get(key) is not None]
    if len(ways) != 1:
        said = f"says {' and '.join(ways)}" if ways else "says not what is drawn"
        raise UsageError(f"{where} {said}: give --images 0-7 of a store, or --prompt (or --prompts FILE) and --seeds")
    seeds = None if document.get("seeds") is None else _seeds(document["seeds"], where)
    if ways == ["shots"]:
        if seeds is not None:
            raise UsageError(f"{where} says shots, which have seeds: leave out seeds")
        found = _settled(document["shots"], where, store)
    elif ways == ["images"]:
        found = _of_images(document["images"], seeds, where, store)
    else:
        found = _of_prompts(document["prompts"], seeds, where, folder)
    if not found or len(found) > MOST_SHOTS:
        raise UsageError(f"{where} asks for {len(found):,} shots; give 1 to {MOST_SHOTS:,}")
    known: set[tuple[str, int]] = set()
    for shot in found:
        if (shot.prompt, shot.seed) in known:
            raise UsageError(f"{where} asks for {shot.prompt!r} with seed {shot.seed} twice: leave one out")
        known.add((shot.prompt, shot.seed))
    return tuple(found)


def _of_images(asked: Any, seeds: tuple[int, ...] | None, where: str, store: Store | None) -> list[Shot]:
    if store is None:
        raise UsageError(f"{where}: images {asked!r} are images of a store: give --store")
    text = ",".join(map(str, asked)) if isinstance(asked, list) else str(asked)
    if not text.strip():
        raise UsageError(f"{where}: images is empty: write numbers and ranges such as 0-7")
    try:
        numbers = [number for word in text.split(",") for number in parse_numbers(word, store.n_images, "image")]
        if len(set(numbers)) < len(numbers):
            twice = next(number for number, times in Counter(numbers).items() if times > 1)
            raise UsageError(f"image {twice} is there twice: name each once")
        found = shots_of(store, sorted(numbers))
    except UsageError as error:
        raise UsageError(f"images {text}: {error}; the store is {store.path}") from None
    if seeds is None:
        return found
    own = {(shot.prompt, shot.seed): shot.image for shot in found}
    prompts = dict.fromkeys(shot.prompt for shot in found)
    return [Shot(prompt, seed, own.get((prompt, seed))) for prompt in prompts for seed in seeds]


def _of_prompts(asked: Any, seeds: tuple[int, ...] | None, where: str, folder: Path) -> list[Shot]:
    if isinstance(asked, str):
        from harvest.prompt_files import read_file

        path = folder / asked
        if not path.exists():
            raise UsageError(f"there is no file {path}: prompts are a file, or in an experiment file a list of texts")
        found = [(prompt.text, prompt.seed) for prompt in read_file(path)]
    elif isinstance(asked, list) and all(isinstance(text, str) for text in asked):
        found = [(text, None) for text in asked]
    else:
        raise UsageError(f"{where}: prompts is {asked!r}; write a list of texts, or the name of a file")
    return [
        Shot(_text(text, where), seed)
        for text, own in found
        for seed in (seeds if seeds is not None else ((own or 0),))
    ]


def _settled(asked: Any, where: str, store: Store | None) -> list[Shot]:
    """Shots as experiment.yaml lists them."""
    if not isinstance(asked, list):
        raise UsageError(f"{where}: shots is {asked!r}; write a list of prompts with seeds")
    found = []
    for place, each in enumerate(asked):
        if not isinstance(each, dict) or not set(each) <= {"prompt", "seed", "image"} or "prompt" not in each:
            raise UsageError(f"{where}: shot {place} is {each!r}; write a mapping with prompt, seed and perhaps image")
        image = each.get("image")
        if image is not None and (type(image) is not int or image < 0):
            raise UsageError(f"{where}: shot {place} has image {image!r}; it is the number of an image in the store")
        found.append(Shot(_text(each["prompt"], where), _seed(each.get("seed", 0), where), image))
    numbered = [shot for shot in found if shot.image is not None]
    if store is not None and numbered and "prompt" in store.prompts().column_names:  # one that was shared may have none
        own = shots_of(store, [shot.image for shot in numbered if shot.image is not None])
        for shot, there in zip(numbered, own, strict=True):
            if shot != there:
                raise UsageError(
                    f"{where}: image {shot.image} of {store.path} is {there.prompt!r} with seed {there.seed}, not {shot.prompt!r} with "
                    f"seed {shot.seed}: leave out the image's number, or give the store that it is of"
                )
    return found


def _text(asked: Any, where: str) -> str:
    if not isinstance(asked, str):
        raise UsageError(f"{where}: the prompt {asked!r} is no text")
    try:
        asked.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: the prompt {asked!r} is no Unicode text") from None
    return asked


def _seed(asked: Any, where: str) -> int:
    if type(asked) is not int or not 0 <= asked <= MOST_SEED:
        raise UsageError(f"{where}: seed {asked!r} is no whole number from 0 to {MOST_SEED}")
    return asked


def _seeds(asked: Any, where: str) -> tuple[int, ...]:
    """Seeds from `0-3,7`, a number or a list, each once, in their order."""
    if isinstance(asked, str):
        listed: list[Any] = []
        for word in asked.split(","):
            match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", word.strip())
            if match is None:
                raise UsageError(
                    f"{where}: {word.strip()!r} in seeds {asked!r} is no seed: write numbers and ranges such as 0-3,7"
                )
            low, high = int(match[1]), int(match[2] or match[1])
            if not 0 <= high - low < MOST_SHOTS:
                raise UsageError(f"{where}: seeds {word.strip()} are {'no' if high < low else 'too many'} seeds")
            listed += range(low, high + 1)
    else:
        listed = asked if isinstance(asked, list) else [asked]
    found = tuple(_seed(seed, where) for seed in listed)
    if not found or len(set(found)) < len(found):
        raise UsageError(f"{where}: seeds {asked!r}: name at least one, and none twice")
    return found
