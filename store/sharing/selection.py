"""What is taken of a store: the words of `--layers 6 --streams img --steps 2-3 --images 0-999 --no-prompts`."""

import re
from dataclasses import dataclass

from store.errors import UsageError
from store.reader import Store
from store.sites import Site, parse_numbers

MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Selection:
    """What is taken of a store."""

    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    images: range
    prompts: bool
    """whether texts and pictures come along"""


def select(store: Store, layers: str, streams: str, steps: str, images: str, prompts: bool) -> Selection:
    """The selection that command line words name; `UsageError` says what the store has, and which images would do."""
    chosen = [site for site in store.sites if site.stream in _streams(store, streams)]
    if layers.strip() != "all":
        wanted = _layers(layers)
        missing = [
            f"{kind}:{layer}" for kind, layer in wanted if not any((s.kind, s.layer) == (kind, layer) for s in chosen)
        ]
        if missing:
            there = ", ".join(map(str, store.sites))
            raise UsageError(
                f"--layers {layers}: {store.path} has no layer {', '.join(missing)} in these streams; it has {there}"
            )
        chosen = [site for site in chosen if (site.kind, site.layer) in wanted]
    kept = store.steps
    if steps.strip() != "all":
        kept = parse_numbers(steps, store.meta.num_inference_steps, "step")
        if not set(kept) <= set(store.steps):
            raise UsageError(f"--steps {steps}: {store.path} has the steps {', '.join(map(str, store.steps))}")
    return Selection(tuple(chosen), kept, _images(store, images), prompts)


def _streams(store: Store, text: str) -> tuple[str, ...]:
    if text.strip() == "all":
        return store.meta.streams
    wanted = tuple(word.strip() for word in text.split(","))
    if not set(wanted) <= set(store.meta.streams):
        raise UsageError(f"--streams {text}: {store.path} has the streams {', '.join(store.meta.streams)}")
    return wanted


def _layers(text: str) -> set[tuple[str, int]]:
    """(kind, layer) of `0-3,6`, `double:0-18,single:0-37`; a kind holds until the next one."""
    kind, found = "double", set()
    for word in text.split(","):
        match = re.fullmatch(r"(?:(double|single):)?([\d-]+)", word.strip())
        if match is None:
            raise UsageError(f"--layers {text!r}: write all, 0-3,6 or double:0-3,single:5")
        kind = match[1] or kind
        found |= {(kind, layer) for layer in parse_numbers(match[2], MOST_LAYERS, "layer")}
    return found


def _images(store: Store, text: str) -> range:
    """The images of `0-999`; they must be whole chunks, because chunks are copied as they are."""
    total, chunk = store.n_images, store.chunk_images
    if text.strip() == "all":
        return range(total)
    match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", text)
    if match is None:
        raise UsageError(f"--images {text!r}: write a range such as 0-{min(chunk, total) - 1}, or all")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < total:
        raise UsageError(f"--images {text}: {store.path} has the images 0 to {total - 1}")
    low, high = first - first % chunk, min(-(-(last + 1) // chunk) * chunk, total) - 1
    if (low, high) != (first, last):
        raise UsageError(
            f"--images {text}: {store.path} keeps {chunk} images a chunk, and chunks are copied whole: a range begins at a "
            f"multiple of {chunk} and ends just before one, or at the last image ({total - 1}). --images {low}-{high} would do"
        )
    return range(first, last + 1)
