"""`python -m store info STORE`: what a store or a pack holds, as a table worth reading."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from store import open_store
from store.format import StoreMeta
from store.packing.describe import describe as describe_pack
from store.packing.describe import model_line
from store.places import place_of
from store.reader import Store
from store.shards import is_pack, open_pack
from store.sites import Point, Stream
from store.sizes import human_size, picture_size
from store.statistics import Statistics
from store.strata import STRATA_STREAMS, TEXT_COLUMNS, RealText

COLUMNS = 5
STRATA_NAMES: dict[Stream, str] = {"txt": "text", "img": "image"}
"""of the lines of a joint site"""


@dataclass(frozen=True)
class InfoSettings:
    """Say what a store or a pack holds."""

    store: tyro.conf.Positional[str]
    """the store: a folder or a URL; or a pack"""


def run(settings: InfoSettings) -> str:
    """Print what a store or a pack holds; returns the text."""
    local = place_of(settings.store).local
    if local is not None and is_pack(local):
        text = describe_pack(open_pack(local))
    else:
        text = describe(open_store(settings.store, unfinished=True))
    print(text)
    return text


def describe(store: Store) -> str:
    """The text of `info`: model, prompts, geometry, size, and a line of statistics for every site."""
    meta = store.meta
    images = sum(len(meta.part_images(part)) for part in store.committed_parts)
    grid = f"{meta.grid[1]} x {meta.grid[0]} tokens of {meta.pixels_per_token} pixels"
    state = (
        f"finished, id {store.id}"
        if store.finished
        else f"not finished: {len(store.committed_parts)} of {meta.n_parts} parts"
        + (", the seal is missing" if len(store.committed_parts) == meta.n_parts else "")
    )
    facts = [
        ("store", f"{store.path} (format {meta.format_version}), {state}"),
        ("model", model_line(store.meta.model)),
        ("images", f"{images} of {picture_size(meta.width, meta.height)} ({grid}), pictures: {meta.pictures}"),
        (
            "prompts",
            f"{meta.prompts.get('source')}, {meta.prompts.get('count')} prompts, "
            f"sha256 {str(meta.prompts.get('sha256'))[:12]}…{_splits(store)}",
        ),
        (
            "sampler",
            f"{meta.num_inference_steps} steps of {meta.scheduler.get('class')}{_guided(meta)}, "
            f"steps kept: {', '.join(map(str, meta.steps))}{_sigmas(store)}",
        ),
        ("tokens", ", ".join(f"{stream}: {kept.text}" for stream, kept in meta.tokens.items())),
        *([("text", said)] if (said := _text(store)) else []),
        ("numbers", f"d_model {meta.d_model}, computed in {meta.dtype} on {meta.device}, stored as {_stored(store)}"),
        ("targets", _targets(store)),
        *([("traces", _traces(store))] if store.traced is not None else []),
        (
            "size",
            f"{store.size_bytes / 1e9:.3f} GB in {len(store.committed_parts)} of {meta.n_parts} parts of {meta.chunk_images} images",
        ),
        ("made by", ", ".join(f"{name} {version}" for name, version in meta.versions.items())),
    ]
    if meta.parent is not None:
        facts += [("parent", line) for line in _parent(meta.parent)]
    mixed = [part for part in store.committed_parts if "mixed" in store.commit(part)]
    if mixed:
        facts.append(
            ("mixed", f"{len(mixed)} parts were made under other settings (--allow-mixed), part {mixed[0]} first")
        )
    lines = [f"{name:>8}  {value}" for name, value in facts]
    return "\n".join([*lines, "", *_site_table(store)])


def _parent(parent: dict[str, Any]) -> list[str]:
    """What a subset was taken from, or what was imported and assumed."""
    imported, assumed = parent.get("imported"), parent.get("assumed")
    if not isinstance(imported, list) or not all(isinstance(each, dict) for each in imported):
        return [_part_of(parent)]
    files = [
        f"{each.get('file')} ({each.get('dtype')} {each.get('shape')}) as {each.get('taken_for')}" for each in imported
    ]
    return [f"imported from {file}" for file in files] + [
        f"assumed: {text}" for text in (assumed if isinstance(assumed, list) else [])
    ]


def _part_of(parent: dict[str, Any]) -> str:
    images = parent.get("images")
    known = isinstance(images, list | tuple) and len(images) == 2 and all(type(image) is int for image in images)
    span = f"images {images[0]} to {images[1] - 1} of " if known and images else "part of "
    prompts = "" if parent.get("prompts", True) else ", without prompts and pictures"
    further = parent.get("parent")
    return f"{span}store {parent.get('store')}{prompts}" + (
        f", itself {_part_of(further)}" if isinstance(further, dict) else ""
    )


def _stored(store: Store) -> str:
    codec = "" if store.meta.codec == "none" else f", compressed by {store.meta.codec}"
    scale = " with a scale a row (read as bfloat16)" if store.meta.carrier.scaled else ""
    return f"{store.meta.store_dtype}{scale}{codec}"


def _targets(store: Store) -> str:
    weights = {"none": "not mentioned", "ref": "named by hash", "copy": "in the store"}[store.meta.weights["policy"]]
    targets = "mlp_out is computed from mlp_in when it is needed" if store.recomputed else ", ".join(store.points)
    return f"{targets}; MLP matrices {weights}"


def _traces(store: Store) -> str:
    """What is traced, its bytes, and how well blocks follow from it."""
    assert store.traced is not None
    errors = ", ".join(f"{name} {error:.2g}" for name, error in store.replay_errors().items())
    errors += " (resid repeats the model's own additions: 0 in float32)" if errors else ""
    replay = f"; replayed with relative errors of at most: {errors}" if errors else ", none committed yet"
    return f"{store.traced.text()}{', ' + human_size(store.trace_bytes) if errors else ''}{replay}"


def _text(store: Store) -> str:
    """How many text tokens of an image are real, and how many real ones and how much padding is kept at a step; empty without text."""
    meta = store.meta
    policy = next((meta.tokens[stream] for stream in ("txt", "joint") if stream in meta.tokens), None)
    if policy is None or not store.committed_parts:
        return ""
    real = RealText.of(store.prompt_columns(*TEXT_COLUMNS)).count(meta.text_tokens)
    if policy.strata is not None:
        policy = policy.strata[0]
    padding = meta.text_tokens - real
    if policy.policy.startswith("real+"):
        padding = np.minimum(padding, int(policy.policy.removeprefix("real+")))
    return (
        f"of {meta.text_tokens} tokens an image {real.mean():.1f} are real ({real.min()} to {real.max()}), the others padding; "
        f"kept at a step: {real.sum():,} real, {padding.sum():,} padding"
    )


def _guided(meta: StoreMeta) -> str:
    """Guidance, and whether the schedule was shifted, which differs from resolution to resolution; empty for FLUX.1[schnell]."""
    guidance = f", guidance {meta.guidance:g}" if meta.guidance else ""
    shifted = dict(meta.scheduler.get("config") or {}).get("use_dynamic_shifting")
    return guidance + (f", schedule shifted for {meta.grid[0] * meta.grid[1]} image tokens" if shifted else "")


def _splits(store: Store) -> str:
    counts = Counter(map(str, _column(store, "split")))
    return (
        f"; images by split: {', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}" if counts else ""
    )


def _sigmas(store: Store) -> str:
    first = next(iter(_column(store, "sigma")), None)
    if not isinstance(first, list) or not all(isinstance(sigma, float) for sigma in first):
        return ""
    return ", sigma: " + ", ".join(f"{sigma:g}" for sigma in first)


def _column(store: Store, name: str) -> list[Any]:
    """A column of the prompts, empty where there is none."""
    prompts = store.prompts() if store.committed_parts else None
    return prompts.column(name).to_pylist() if prompts is not None and name in prompts.column_names else []


def _site_table(store: Store) -> list[str]:
    """A line a site: rows a step, RMS over the steps, which shows a dead or exploding site at once, norms, and what rounding cost.

    A joint site has two more lines, its text tokens and its image tokens.
    """
    if not store.committed_parts:
        return ["no part is committed yet"]
    steps, every = _spread(store.steps), store.all_statistics()
    heads = " ".join(f"{f'step {step}':>8}" for step in steps)
    names = "   ".join(f"{f'RMS of {point}':<{len(heads)}}" for point in store.points)
    lossy = any(found.error for found in every.values())
    lines = [
        f"{'':>8} {'':>12}   {names}   {'greatest':>8}   {'norms of ' + store.points[-1]:>24}"
        + ("   cost of the store dtype" if lossy else ""),
        f"{'site':>8} {'rows a step':>12}   {'   '.join([heads] * len(store.points))}   {'|value|':>8}   "
        + " ".join(f"{share:>7}" for share in ("1 %", "50 %", "99 %"))
        + ("   relative  FVU floor" if lossy else ""),
    ]
    for site in store.sites:
        found = {point: [every[site, step, point] for step in store.steps] for point in store.points}
        shown = [store.steps.index(step) for step in steps]
        lines.append(_site_line(str(site), found, shown, lossy))
        for stream in STRATA_STREAMS:
            parts = {point: [each.strata.get(stream) for each in of_steps] for point, of_steps in found.items()}
            known = {point: [each for each in part if each is not None] for point, part in parts.items()}
            if all(known.values()):
                lines.append(_site_line(STRATA_NAMES[stream], known, shown, lossy=False))
    if lossy:
        which = ", mlp_in alone, as mlp_out is computed" if store.recomputed else " and point"
        lines.append(
            f"relative: RMS of the rounding error over RMS; FVU floor: its square over the variance; worst step{which}"
        )
    return lines


def _site_line(name: str, found: dict[Point, list[Statistics]], shown: list[int], lossy: bool) -> str:
    every = [each for point in found.values() for each in point]
    rms = "".join("   " + " ".join(f"{point[index].rms:>8.4f}" for index in shown) for point in found.values())
    greatest = max(each.max for each in every)
    last = [each.norm_quantiles(0.01, 0.5, 0.99) for each in list(found.values())[-1]]
    low, middle, high = min(q[0] for q in last), sorted(q[1] for q in last)[len(last) // 2], max(q[2] for q in last)
    cost = max(each.relative_error for each in every), max(each.fvu_floor for each in every)
    return f"{name:>8} {every[0].rows:>12,}{rms}   {greatest:>8.2f}   {low:>7.3g} {middle:>7.3g} {high:>7.3g}" + (
        f"   {100 * cost[0]:>6.2f} %  {cost[1]:>9.1e}" if lossy else ""
    )


def _spread(steps: tuple[int, ...]) -> list[int]:
    """At most `COLUMNS` of the steps, evenly spread, first and last among them."""
    if len(steps) <= COLUMNS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
