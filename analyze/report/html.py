"""`index.html`: the overview in plain HTML, filled from a template, and the scripts and styles beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import matplotlib
import numpy as np
from jaxtyping import UInt8

from analyze.inputs import Analysis
from analyze.pictures.overlay import COLDEST_SHOWN, COLOUR_MAP
from analyze.report.findings import Spotlight, Truth
from analyze.report.folder import ReportFolder
from analyze.report.packing import packed
from analyze.report.page import facts, tiles, truth_view
from analyze.report.settings import ReportSettings

SCRIPTS = (
    "loading.js", "packed.js", "place.js", "colours.js", "theme.js", "labels.js", "features.js", "heat.js", "examples.js", "plots.js",
    "overview.js", "table.js", "feature.js", "export.js", "keys.js", "main.js",
)  # fmt: skip
"""in the order in which they run"""


@dataclass(frozen=True)
class Page:
    """All that the page says by itself."""

    analysis: Analysis
    settings: ReportSettings
    choices: dict[str, Any]
    truth: Truth | None
    overview: Sequence[dict[str, Any]]
    findings: Sequence[tuple[Spotlight, str]]
    libraries: dict[str, str]


def write_page(folder: ReportFolder, page: Page) -> None:
    """Write styles and scripts, then `index.html`, which makes the report whole."""
    folder.write("report.css", _ours("report.css"))
    for name in SCRIPTS:
        folder.write(f"static/{name}", _ours("static", name))
    folder.script("colours", packed(colour_table(), "u1"))
    folder.finish(_rendered(page))


def _rendered(page: Page) -> bytes:
    analysis = page.analysis
    values = {
        "title": page.settings.title,
        "facts": facts(analysis, page.choices["padding"]),
        "tiles": tiles(analysis, page.truth, page.overview),
        "findings": [
            {"text": text, "link": spot.link, "place": f"{spot.subject.name}/{spot.step}/{spot.feature}"}
            for spot, text in page.findings
        ],
        "overview": page.overview,
        "truth": None if page.truth is None else truth_view(page.truth),
        "lower_bounds": lower_bounds(analysis),
        "scripts": SCRIPTS,
        "store_id": analysis.store.id,
        "dictionaries": [(subject.name, subject.identity) for subject in analysis.subjects],
        "libraries": page.libraries,
        "choices": page.choices,
        "settings": page.settings,
        "pictures": analysis.store.meta.pictures != "none",
        "streams": analysis.streams(),
        "graphs": bool(page.settings.graphs),
        "steering": bool(page.settings.steering or page.settings.faithfulness),
    }
    loader = jinja2.PackageLoader("analyze.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("index.html").render(values).encode()


def colour_table() -> UInt8[np.ndarray, "256 3"]:
    """The colours of heat from cold to hot, as `pictures.overlay` draws it."""
    table = np.asarray(matplotlib.colormaps[COLOUR_MAP](np.linspace(COLDEST_SHOWN, 1, 256)))[:, :3]
    return np.asarray(np.round(table * 255).astype(np.uint8))


def lower_bounds(analysis: Analysis) -> list[str]:
    """Streams whose maxima are over a sample of the tokens only."""
    first = analysis.steps[0]
    found = [s.site.stream for s in analysis.subjects if analysis.matrix(s, first).attributes["lower_bounds"]]
    return sorted(set(found))


def _ours(*path: str) -> bytes:
    return resources.files("analyze.report").joinpath("templates", *path).read_bytes()
