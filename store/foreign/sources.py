"""Which array becomes which site, step and point: what `--activations` says, checked against what the files hold."""

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from store.errors import UsageError
from store.foreign.arrays import ForeignArray, Rows, open_array
from store.foreign.settings import ImportSettings
from store.sites import POINTS, Point, Site, Stream, parse_numbers

STREAMS: tuple[Stream, ...] = ("img", "txt", "joint")
Key = tuple[Site, int, Point]
NAMED = re.compile(r"(?P<site>[^:=/]+):(?P<steps>[^:=/]+)(?::(?P<point>[^:=/]+))?=(?P<file>.+)", re.DOTALL)
NEXT = re.compile(r",(?=[a-z]+_\d+:[^/]*=)")


@dataclass(frozen=True)
class Source:
    """Where the rows of one site, step and point come from."""

    array: ForeignArray
    step: int
    """the step within the array"""


def open_sources(settings: ImportSettings) -> dict[Key, Source]:
    """Every (site, step, point) and where it comes from, in the order of the store."""
    rows = None if settings.rows_per_image is None else Rows.parse(settings.rows_per_image)
    found: dict[Key, Source] = {}
    opened: dict[tuple[Path, str | None], ForeignArray] = {}
    for text in settings.activations:
        for word in NEXT.split(text):
            site, steps, point, path, key = _named(settings, word)
            if (path, key) not in opened:
                opened[path, key] = open_array(path, key, rows)
            array = opened[path, key]
            for step, index in _steps(array, steps, path).items():
                if (site, step, point) in found:
                    raise UsageError(f"two arrays are given for {point} of {site} at step {step}: the second is {path}")
                found[site, step, point] = Source(array, index)
    _check_complete(found)
    order = list(product(sites_of(found), sorted({step for _, step, _ in found}), points_of(found)))
    return {key: found[key] for key in order}


def _named(settings: ImportSettings, word: str) -> tuple[Site, str, Point, Path, str | None]:
    """Site, steps, point, file and key of `img_5:0:mlp_out=FILE#KEY`, or of a file whose place other flags say."""
    match = NAMED.fullmatch(word)
    if match is None and (settings.site is None or settings.step is None):
        raise UsageError(
            f"--activations {word}: say where it was taken, by --site img_5 --step 0 [--point mlp_out], "
            f"or as --activations img_5:0:mlp_out={word}"
        )
    if match is not None and not (settings.site is None and settings.step is None):
        raise UsageError(f"--activations {word} says site and step itself: leave out --site, --step and --point")
    site = Site.parse(match["site"] if match else str(settings.site))
    steps = match["steps"] if match else str(settings.step)
    point = (match["point"] if match else None) or settings.point
    if point not in POINTS:
        raise UsageError(f"--activations {word}: {point!r} is no point; there are {', '.join(POINTS)}")
    name = match["file"] if match else word
    file, _, key = name.rpartition("#") if "#" in name and not Path(name).exists() else (name, "", settings.key)
    return site, steps, point, Path(file), key


def _steps(array: ForeignArray, text: str, path: Path) -> dict[int, int]:
    """The sampler's steps that an array is taken for, and which of its own steps each is."""
    if array.steps > 1:
        return {step: step for step in parse_numbers(text, array.steps, "step")}
    if not text.strip().isdecimal():
        raise UsageError(f"step {text!r} of {path}: the array holds one step; say which, 0-based, such as 0")
    return {int(text): 0}


def _check_complete(sources: dict[Key, Source]) -> None:
    """A store has every point at every step of every site, over the same images, tokens and channels."""
    steps, points = sorted({step for _, step, _ in sources}), points_of(sources)
    missing = [key for key in product(sites_of(sources), steps, points) if key not in sources]
    if missing:
        site, step, point = missing[0]
        raise UsageError(
            f"{len(missing)} arrays are missing, the first is {point} of {site} at step {step}: a store has each of its points "
            f"({', '.join(points)}) at each of its steps ({', '.join(map(str, steps))}) for every site"
        )
    (first_site, _, _), first = next(iter(sources.items()))
    of_stream: dict[Stream, tuple[Site, ForeignArray]] = {}
    for (site, _, _), source in sources.items():
        array = source.array
        if (array.images, array.d_model) != (first.array.images, first.array.d_model):
            raise UsageError(
                f"{array.path} ({site}) holds {array.images} images of {array.d_model} channels, {first.array.path} "
                f"({first_site}) {first.array.images} of {first.array.d_model}: a store has the same images and channels everywhere"
            )
        other_site, other = of_stream.setdefault(site.stream, (site, array))
        if array.tokens != other.tokens:
            raise UsageError(
                f"{array.path} ({site}) holds {array.tokens} tokens an image, {other.path} ({other_site}) {other.tokens}: "
                "a stream has one number of tokens"
            )


def sites_of(sources: dict[Key, Source]) -> list[Site]:
    """The sites, those of the image first, by layer."""
    return sorted({site for site, _, _ in sources}, key=lambda site: (STREAMS.index(site.stream), site.layer))


def points_of(sources: dict[Key, Source]) -> tuple[Point, ...]:
    """The points, mlp_in first."""
    return tuple(point for point in POINTS if any(point == found for _, _, found in sources))


def dtypes_of(sources: dict[Key, Source]) -> str:
    """The dtypes of the arrays, in words."""
    return ", ".join(sorted({source.array.dtype.name for source in sources.values()}))


def facts_of(sources: dict[Key, Source]) -> list[dict[str, object]]:
    """What the store says of the arrays that it was made from, and what each was taken for."""
    arrays = {id(source.array): source.array for source in sources.values()}
    return [
        {
            **array.facts(),
            "taken_for": [f"{site}:{step}:{point}" for (site, step, point), s in sources.items() if s.array is array],
        }
        for array in arrays.values()
    ]
