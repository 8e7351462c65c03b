"""`python -m store info STORE`: what a store holds, as a table worth reading."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from store import open_store
from store.reader import Store
from store.statistics import merged

COLUMNS = 5


@dataclass(frozen=True)
class InfoSettings:
    """Say what a store holds."""

    store: Annotated[Path, tyro.conf.Positional]
    """the store"""


def run(settings: InfoSettings) -> str:
    """Print what a store holds; returns the text."""
    text = describe(open_store(settings.store, unfinished=True))
    print(text)
    return text


def describe(store: Store) -> str:
    """The text of `info`: model, prompts, geometry, size, and a line of statistics for every site."""
    meta = store.meta
    images = sum(len(meta.part_images(part)) for part in store.committed_parts)
    grid = f"{meta.grid[0]} x {meta.grid[1]} tokens of {meta.pixels_per_token} pixels"
    state = (
        f"finished, id {store.id}"
        if store.finished
        else f"not finished: {len(store.committed_parts)} of {meta.n_parts} parts"
    )
    facts = [
        ("store", f"{store.path} (format {meta.format_version}), {state}"),
        ("model", f"{meta.model['id']}, transformer sha256 {meta.model['weights_sha256']['transformer'][:12]}…"),
        ("images", f"{images} of {meta.height}x{meta.width} pixels ({grid}), pictures: {meta.pictures}"),
        (
            "prompts",
            f"{meta.prompts['source']}, {meta.prompts['count']} prompts, sha256 {meta.prompts['sha256'][:12]}…{_splits(store)}",
        ),
        (
            "sampler",
            f"{meta.num_inference_steps} steps of {meta.scheduler['class']}, "
            f"steps kept: {', '.join(map(str, meta.steps))}{_sigmas(store)}",
        ),
        ("tokens", ", ".join(f"{stream}: {t.kept} of {t.total} ({t.policy})" for stream, t in meta.tokens.items())),
        ("numbers", f"d_model {meta.d_model}, computed in {meta.dtype} on {meta.device}, stored as {meta.store_dtype}"),
        (
            "size",
            f"{store.size_bytes / 1e9:.3f} GB in {len(store.committed_parts)} of {meta.n_parts} parts of {meta.chunk_images} images",
        ),
        ("made by", ", ".join(f"{name} {version}" for name, version in meta.versions.items())),
    ]
    lines = [f"{name:>8}  {value}" for name, value in facts]
    return "\n".join([*lines, "", *_site_table(store)])


def _splits(store: Store) -> str:
    counts = Counter(store.prompts().column("split").to_pylist()) if store.committed_parts else Counter()
    return (
        f"; images by split: {', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}" if counts else ""
    )


def _sigmas(store: Store) -> str:
    if not store.committed_parts:
        return ""
    return ", sigma: " + ", ".join(f"{sigma:g}" for sigma in store.prompts().column("sigma")[0].as_py())


def _site_table(store: Store) -> list[str]:
    """A line a site: rows a step, and the RMS of both points over the steps, which shows a dead or exploding site at once."""
    if not store.committed_parts:
        return ["no part is committed yet"]
    steps = _spread(store.steps)
    heads = " ".join(f"{f'step {step}':>8}" for step in steps)
    lines = [
        f"{'':>8} {'':>12}   {'RMS of mlp_in':<{len(heads)}}   {'RMS of mlp_out':<{len(heads)}}   {'greatest':>8}",
        f"{'site':>8} {'rows a step':>12}   {heads}   {heads}   {'|value|':>8}",
    ]
    for site in store.sites:
        found = {point: [merged(store.statistics(site, step, point)) for step in steps] for point in store.points}
        rms = ["   " + " ".join(f"{each['rms']:>8.4f}" for each in found[point]) for point in store.points]
        greatest = max(each["max"] for point in store.points for each in found[point])
        lines.append(f"{site!s:>8} {found[store.points[0]][0]['rows']:>12,}{''.join(rms)}   {greatest:>8.2f}")
    return lines


def _spread(steps: tuple[int, ...]) -> list[int]:
    """At most `COLUMNS` of the steps, evenly spread, first and last among them."""
    if len(steps) <= COLUMNS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
