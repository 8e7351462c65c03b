"""The report: `OUT/report/index.html` with its pictures, a folder that opens from disk and can be sent to a colleague.

Everything in it is relative, static and local: no network, no fetch, one classic script for filter and order, which the page does
without.  Equal results give equal bytes.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from tqdm import tqdm

from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.pictures.sheets import (
    Example,
    check_top,
    feature_row,
    gather_examples,
    pictures_with_heat,
    refuse_without_pictures,
)
from analyze.report.findings import Spotlight, Truth, headlines, read_truth, spotlights
from analyze.report.page import facts, overview_rows, spotlight_view, tiles, truth_view
from analyze.report.settings import ReportSettings
from analyze.truth.attributes import Scene, read_scenes
from store.files import write_bytes

PICTURE_SIDE = 144
PICTURE_GAP = 6
PICTURE = re.compile(r"pictures/(?:transcoder_|sae_)?(?:img|txt|joint)_\d+/step\d+-feature\d+\.webp")
"""what the report calls its pictures"""
WEBP_QUALITY = 84


@dataclass(frozen=True)
class Report:
    """Where the report lies, and its best findings in plain words."""

    index: Path
    findings: tuple[str, ...]


def run(settings: ReportSettings) -> Report:
    """Write the report; prints where it is and the five best findings."""
    analysis = open_analysis(settings)
    choices = check_output(analysis)
    check_top(choices["top"], settings.top)
    refuse_without_pictures(analysis, analysis.subjects)
    folder = analysis.out / "report"
    overview = overview_rows(analysis)
    truth = read_truth(analysis)
    shown = {subject.name: spotlights(analysis, subject, truth, settings.best) for subject in analysis.subjects}
    scenes = read_scenes(analysis.store) if truth is not None else None
    sections = []
    for subject, row in tqdm(
        list(zip(analysis.subjects, overview, strict=True)), desc="report", unit="dictionary", mininterval=0.5
    ):
        sections.append(
            {**row, "cards": _cards(analysis, subject, shown[subject.name], settings, truth, scenes, folder)}
        )
    spots = [spot for subject in analysis.subjects for spot in shown[subject.name]]
    findings = headlines(analysis, truth, spots)
    page = {
        "title": settings.title,
        "facts": facts(analysis, choices["padding"]),
        "tiles": tiles(analysis, truth, overview),
        "findings": [{"text": text, "anchor": spot.anchor} for spot, text in findings],
        "overview": overview,
        "sections": sections,
        "streams": analysis.streams(),
        "truth": None if truth is None else truth_view(truth, {spot.anchor for spot in spots}),
        "lower_bounds": _lower_bounds(analysis),
        "settings": {"best": settings.best, "top": settings.top, "kept": choices["top"]},
        "store_id": analysis.store.id,
        "dictionaries": [(subject.name, subject.identity) for subject in analysis.subjects],
    }
    write_bytes(folder / "index.html", _rendered(page))
    for name in ("report.css", "report.js"):
        write_bytes(folder / name, _template_bytes(name))
    shown_now = {card["picture"]["src"] for section in sections for card in section["cards"] if card["picture"]}
    _remove_old_pictures(folder, shown_now)
    report = Report(folder / "index.html", tuple(text for _, text in findings))
    print(f"report: {report.index}")
    for number, text in enumerate(report.findings, 1):
        print(f"  {number}. {text}")
    return report


def _remove_old_pictures(folder: Path, shown: set[str]) -> None:
    """Remove the pictures of earlier reports that this one does not show; files of other names are not ours."""
    for path in sorted((folder / "pictures").glob("*/*.webp")):
        name = path.relative_to(folder).as_posix()
        if PICTURE.fullmatch(name) and name not in shown:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _lower_bounds(analysis: Analysis) -> list[str]:
    """Streams whose maxima are over a sample of the tokens only."""
    found = [
        s.site.stream for s in analysis.subjects if analysis.matrix(s, analysis.steps[0]).attributes["lower_bounds"]
    ]
    return sorted(set(found))


def _cards(
    analysis: Analysis,
    subject: Subject,
    spots: Sequence[Spotlight],
    settings: ReportSettings,
    truth: Truth | None,
    scenes: Sequence[Scene] | None,
    folder: Path,
) -> list[dict[str, Any]]:
    cards: dict[str, dict[str, Any]] = {}
    threshold = 1.0 if truth is None else truth.threshold
    for step in sorted({spot.step for spot in spots}):
        own = [spot for spot in spots if spot.step == step]
        table = analysis.matrix(subject, step).features()
        found = gather_examples(analysis, subject, step, table, sorted({spot.feature for spot in own}), settings.top)
        for spot in own:
            row = feature_row(table, spot.feature)
            cards[spot.anchor] = _card(analysis, spot, row, found[spot.feature], threshold, scenes, folder)
    return [cards[spot.anchor] for spot in spots]


def _card(
    analysis: Analysis,
    spot: Spotlight,
    row: dict[str, Any],
    examples: Sequence[Example],
    threshold: float,
    scenes: Sequence[Scene] | None,
    folder: Path,
) -> dict[str, Any]:
    inside = heat_inside(spot, examples, scenes) if scenes is not None and spot.subject.site.stream == "img" else None
    card = spotlight_view(spot, row, threshold, inside)
    card["examples"] = [{"score": f"{e.score:.3g}", "prompt": e.prompt, "pieces": e.pieces} for e in examples]
    card["picture"] = None
    if spot.subject.site.stream != "txt" and examples:
        strip = contact_strip(pictures_with_heat(analysis.store, spot.subject.site.stream, examples, PICTURE_SIDE))
        name = f"pictures/{spot.subject.name}/step{spot.step}-feature{spot.feature}.webp"
        write_bytes(folder / name, webp_bytes(strip))
        card["picture"] = {"src": name, "width": strip.width, "height": strip.height, "alt": _alt(spot, examples)}
    return card


def heat_inside(spot: Spotlight, examples: Sequence[Example], scenes: Sequence[Scene]) -> float | None:
    """Share of the feature's heat on the images shown that lies where its attribute is, weighted by how much of a token is covered.

    For a background that is whatever no object covers; other images than those with the attribute count as outside.
    """
    if spot.attribute is None:
        return None
    inside = total = 0.0
    for example in examples:
        scene = scenes[example.heat.image]
        covered = np.zeros(len(scene.things[0].coverage), np.float32)
        if spot.attribute.group == "background":
            if scene.background == spot.attribute.value:
                covered = 1 - np.clip(np.sum([thing.coverage for thing in scene.things], axis=0), 0, 1)
        else:
            for thing in scene.things:
                if getattr(thing, spot.attribute.group) == spot.attribute.value:
                    covered = np.maximum(covered, thing.coverage)
        inside += float((example.heat.values * covered[example.heat.positions]).sum())
        total += float(example.heat.values.sum())
    return inside / total if total > 0 else None


def contact_strip(pairs: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """The pictures side by side, each with its heat below; the gaps are transparent, so that they suit any page."""
    width = max(picture.width for picture, _ in pairs)
    height = max(picture.height for picture, _ in pairs)
    size = (len(pairs) * (width + PICTURE_GAP) - PICTURE_GAP, 2 * height + PICTURE_GAP)
    strip = Image.new("RGBA", size, (0, 0, 0, 0))
    for number, (picture, heated) in enumerate(pairs):
        strip.paste(picture, (number * (width + PICTURE_GAP), 0))
        strip.paste(heated, (number * (width + PICTURE_GAP), height + PICTURE_GAP))
    return strip


def webp_bytes(image: Image.Image) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
    return buffer.getvalue()


def _alt(spot: Spotlight, examples: Sequence[Example]) -> str:
    prompts = "; ".join(
        example.prompt if len(example.prompt) <= 80 else example.prompt[:79] + "…" for example in examples[:4]
    )
    return (
        f"The {len(examples)} images on which feature {spot.feature} of {spot.subject.name} is strongest at step {spot.step}, "
        f"and below each the same image with the feature's heat over it. Prompts: {prompts}"
    )


def _rendered(page: dict[str, Any]) -> bytes:
    loader = jinja2.PackageLoader("analyze.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(page).encode()


def _template_bytes(name: str) -> bytes:
    return resources.files("analyze.report").joinpath("templates", name).read_bytes()
