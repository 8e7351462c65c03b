"""What the page of steering shows of an experiment of `analyze steer`: what was changed, how far it moved the pictures, and the pictures.

Everything is read from the folder that `analyze steer` left: its resolved experiment, its table, its pictures.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from analyze.pictures.drawing import fitted
from analyze.report.folder import ReportFolder
from analyze.report.picture_files import webp_bytes
from analyze.steering.distances import COLUMNS, NEARER_IS_GREATER, typical
from analyze.steering.documents import read_document
from analyze.steering.edits import exact
from analyze.steering.judging import VERDICTS, rates, told
from store.errors import DamagedError
from store.sites import spans
from store.sizes import many

SHOWN = 12
"""shots of an experiment whose pictures stand on the page"""
SMALL = 160
"""pictures up to so many pixels are stored without loss: they are shown enlarged"""
HEADS = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "flip": "FLIP", "lpips": "LPIPS", "latent_cosine": "latent cosine", "latent_mse": "latent MSE",
    "clip": "CLIP",
}  # fmt: skip
RESULTS, EXPERIMENT = "results.parquet", "experiment.yaml"


@dataclass(frozen=True)
class Cells:
    """A table: the names of its columns, and its lines as texts; the first `left` columns are words."""

    head: list[str]
    lines: list[list[str]]
    left: int = 1


@dataclass(frozen=True)
class Names:
    """How the report calls the dictionaries, so that features can be linked."""

    by_identity: Mapping[str, str]
    """identity -> name in the report"""
    steps: tuple[int, ...]
    """the steps that the report shows"""

    def link(self, identity: str | None, steps: Sequence[int] | None, feature: int) -> str | None:
        """Where the page of a feature is; None where the report does not show its dictionary."""
        name = self.by_identity.get(identity or "")
        if name is None:
            return None
        step = next((step for step in steps or () if step in self.steps), self.steps[0])
        return f"index.html#/feature/{name}/{step}/{feature}"


def experiment_view(place: Path, slug: str, folder: ReportFolder, names: Names, side: int) -> dict[str, Any]:
    """An experiment as the template shows it; its pictures are written into the report.  `DamagedError` for what cannot be read."""
    document = read_document(place / EXPERIMENT)
    table = table_of(place / RESULTS)
    numbers = sorted(set(table["number"].to_pylist()))
    parts = [table.filter(pc.equal(table["number"], number)).sort_by("shot") for number in numbers]
    labels = ["plain", *(variant["name"] for variant in document["variants"])]
    drawing = document["drawing"]
    shots = len(parts[0])
    judge = bool(set(VERDICTS.names) <= set(table.column_names))
    return {
        "slug": slug,
        "name": document["name"],
        "facts": (
            f"{many(shots, 'shot')}, plain and {many(len(labels) - 1, 'variant')}, drawn by {drawing['model']} at {drawing['width']} × "
            f"{drawing['height']} pixels in {drawing['num_inference_steps']} steps: "
            f"{many(shots * len(labels) * drawing['num_inference_steps'], 'transformer run')}"
        ),
        "variants": [
            {"name": variant["name"], "method": variant["method"], "parts": variant_parts(variant, document, names)}
            for variant in document["variants"]
        ],
        "distances": distance_cells(labels, parts),
        "judge": judge_cells(labels, parts) if judge else None,
        "asked": document.get("judge") if judge else None,
        "columns": labels,
        "rows": picture_rows(place, slug, folder, labels, parts, side, judge),
        "left_out": max(0, shots - SHOWN),
        "pixelated": drawing["width"] <= SMALL,
    }


def variant_parts(variant: Mapping[str, Any], document: Mapping[str, Any], names: Names) -> list[dict[str, Any]]:
    """What a variant does, an entry an edit: words before its features, the features with their links, words after."""
    identities = document.get("dictionaries") or {}
    kinds = any(key.startswith("sae_") for key in identities)  # not all are transcoders: then each says its kind
    found: list[dict[str, Any]] = []
    for edit in variant.get("edits", ()):
        site, steps = edit["site"], edit.get("steps")
        keys = [key for key in identities if key in (f"{edit.get('kind')}_{site}", f"transcoder_{site}", f"sae_{site}")]
        identity = identities.get(f"{edit.get('kind')}_{site}", identities[keys[0]] if len(keys) == 1 else None)
        strength = f" {exact(edit['strength'])}" if "strength" in edit else ""
        unit = " peaks" if edit.get("unit") == "peak" else ""
        after = f" at steps {spans(steps)}" if steps is not None else ""
        after += "" if edit.get("tokens", "all") == "all" else f" at tokens {_short(edit['tokens'])}"
        features = [{"text": str(f), "link": names.link(identity, steps, int(f))} for f in edit["features"]]
        place = f"{edit['kind']}_{site}" if kinds and edit.get("kind") else site
        found.append({"before": f"{edit['mode']}{strength}{unit} {place}:", "features": features, "after": after})
    for off in variant.get("off", ()):
        steps = f" at steps {spans(off['steps'])}" if off.get("steps") is not None else ""
        words = f"{off['stream']} stream off in blocks {spans(off['layers'])} ({', '.join(off['parts'])}){steps}"
        found.append({"before": words, "features": [], "after": ""})
    if spliced := [str(each) for each in variant.get("splice", ())]:
        words = f"the dictionaries of {', '.join(spliced)} in the place of their MLPs"
        one = f"the dictionary of {spliced[0]} in the place of its MLP"
        found.append({"before": words if len(spliced) > 1 else one, "features": [], "after": ""})
    return found


def distance_cells(labels: Sequence[str], parts: Sequence[pa.Table]) -> Cells:
    """Medians over the shots, a line a variant."""
    columns = [name for name in COLUMNS if name in parts[0].column_names]
    lines = []
    for label, part in zip(labels[1:], parts[1:], strict=True):
        medians = typical({name: np.asarray(part[name].to_numpy(), np.float64) for name in columns})
        lines.append([label, *(figure(name, medians[name]) for name in columns)])
    return Cells(["Variant", *(HEADS[name] for name in columns)], lines)


def judge_cells(labels: Sequence[str], parts: Sequence[pa.Table]) -> Cells:
    """What the judge reads, a line a variant: of how many pictures, and the shares that changed, lost an object, kept what they had."""
    every = [rates(part.select(VERDICTS.names)) for part in parts[1:]]
    columns = list(dict.fromkeys(name for each in every for name, rate in each.items() if rate.n))
    lines = [
        [label, str(max((rate.n for rate in each.values()), default=0)), *(str(each[name]) for name in columns)]
        for label, each in zip(labels[1:], every, strict=True)
    ]
    words = [f"{name.removeprefix('kept_')} kept" if name.startswith("kept_") else name for name in columns]
    return Cells(["Variant", "pictures", *(word.replace("lost", "objects lost") for word in words)], lines)


def picture_rows(
    place: Path,
    slug: str,
    folder: ReportFolder,
    labels: Sequence[str],
    parts: Sequence[pa.Table],
    side: int,
    judge: bool,
) -> list[dict[str, Any]]:
    """The first shots, each with a cell a variant: where its picture lies, what it shows, how far it is from plain."""
    rows: list[dict[str, Any]] = []
    stories = [list(told(part.select(VERDICTS.names))) for part in parts[1:]] if judge else []
    for shot, facts in enumerate(parts[0].to_pylist()[:SHOWN]):
        cells = []
        for number, (label, part) in enumerate(zip(labels, parts, strict=True)):
            mine = part.slice(shot, 1).to_pylist()[0]
            path = f"pictures/steering/{slug}/{shot:04d}-{number:02d}.webp"
            folder.write(path, picture_bytes(place / mine["picture"], side))
            story = stories[number - 1][shot].replace("->", "→") if judge and number else ""
            caption = "" if not number else f"{figure('psnr', mine['psnr'])} dB".replace("equal dB", "equal")
            cells.append(
                {
                    "path": path,
                    "alt": f"{facts['prompt']}, seed {facts['seed']}: {label}",
                    "caption": caption,
                    "story": story,
                }
            )
        rows.append({"prompt": facts["prompt"], "seed": facts["seed"], "image": facts["image"], "cells": cells})
    return rows


def picture_bytes(path: Path, side: int) -> bytes:
    """A picture as the report carries it: WebP, its longer side at most `side`, small ones without loss."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DamagedError(
            f"{path} cannot be read ({error}): run the command that made it again, with the same --out"
        ) from None
    if max(picture.size) > SMALL:
        return webp_bytes(picture if max(picture.size) <= side else fitted(picture, side))
    return webp_bytes(picture, lossless=True)


def table_of(path: Path) -> pa.Table:
    """A table; `DamagedError` for a file that cannot be read."""
    try:
        return pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        raise DamagedError(f"{path} cannot be read ({error}): run the command that made it again") from None


def figure(name: str, value: float | None) -> str:
    """A distance as the tables show it."""
    if value is None or np.isnan(value):
        return "–"
    if np.isinf(value) or (name in NEARER_IS_GREATER and value == 1):
        return "equal"
    if name in NEARER_IS_GREATER - {"psnr"} and value >= 0.9995:  # as many digits as show that it is not 1
        return next((text for digits in range(4, 13) if float(text := f"{value:.{digits}f}") < 1), "1 − 1e-12")
    return f"{value:.1f}" if name == "psnr" else f"{value:.2e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"


def slug_of(name: str, taken: set[str]) -> str:
    """A name for folders and links, the same for no other; it is added to those that are taken."""
    base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48] or "experiment"
    slug = next(
        each for number in range(1, 1 << 16) if (each := base if number == 1 else f"{base}-{number}") not in taken
    )
    taken.add(slug)
    return slug


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
