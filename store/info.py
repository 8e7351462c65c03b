"""`python -m store info STORE`: what a store holds, as a table worth reading."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from store import open_store
from store.reader import Store
from store.statistics import merged


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
        ("size", f"{store.size_bytes / 1e9:.3f} GB in {meta.n_parts} parts of {meta.chunk_images} images"),
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
    if not store.committed_parts:
        return ["no part is committed yet"]
    lines = [f"{'site':>8} {'step':>5} {'rows':>10}   {'mlp_in rms':>10} {'max':>9}   {'mlp_out rms':>11} {'max':>9}"]
    for site in store.sites:
        for step in store.steps:
            before, after = (merged(store.statistics(site, step, point)) for point in ("mlp_in", "mlp_out"))  # type: ignore[arg-type]
            lines.append(
                f"{site!s:>8} {step:>5} {before['rows']:>10,}   {before['rms']:>10.4f} {before['max']:>9.3f}   "
                f"{after['rms']:>11.4f} {after['max']:>9.3f}"
            )
    return lines
