"""The report's page of steering: `steering.html`, plain HTML that opens from disk, beside `index.html`.

    --steering O [O …]   what `analyze steer` and `analyze guided` wrote: grids of pictures, distances, what the judge reads, arms compared
    --faithfulness F     what `analyze faithfulness` wrote: its tables and plots

    steering.html, steering.css                      the page
    pictures/steering/NAME/0003-01.webp, *.png       its pictures: shot 3 under variant 1; collages and plots as they were made

What is not of the store's model is refused before a report that is there already is touched.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from analyze.report.folder import ReportFolder
from analyze.report.steering_experiments import EXPERIMENT, RESULTS, SHOWN, Names, experiment_view, slug_of
from analyze.report.steering_outcomes import FAITHFULNESS, PLOTS, RATES, faithfulness_view, guided_view
from analyze.steering.documents import read_document
from store import Store
from store.errors import ForeignError, MismatchError, UnfinishedError, UsageError
from store.files import read_json

STEERED, GUIDED, SPLICED = "granary steering", "granary guided steering", "granary faithfulness"
VERSIONS = {STEERED: 1, GUIDED: 2, SPLICED: 2}
WHOLE = {STEERED: RESULTS, GUIDED: RATES, SPLICED: FAITHFULNESS}
"""what is there when a command has come to its end"""
COMMANDS = {STEERED: "steer", GUIDED: "guided", SPLICED: "faithfulness"}
PAGE, STYLE = "steering.html", "steering.css"
PICTURE_BYTES, COLLAGE_BYTES = 9_000, 150_000
"""of a picture of 256 pixels, and of a collage or plot: for the plan"""


def check_steering(steering: Sequence[Path], faithfulness: Path | None, store: Store) -> None:
    """Refuse what is no result of these commands, unfinished, of a format that is not known, or of another model than the store's.

    Errors: `UsageError`, `UnfinishedError`, `ForeignError`, `MismatchError`.
    """
    for place in steering:
        _check(place, (STEERED, GUIDED), "--steering", store)
    if faithfulness is not None:
        _check(faithfulness, (SPLICED,), "--faithfulness", store)


def planned(steering: Sequence[Path], faithfulness: Path | None) -> tuple[int, int]:
    """Files and about how many bytes the page takes in a report, pictures included."""
    pictures, collages = 0, 0
    for place in steering:
        record = read_json(place / "run.json")
        if record["format"] == STEERED:
            document = read_document(place / EXPERIMENT)
            pictures += min(SHOWN, len(document["shots"])) * (1 + len(document["variants"]))
        else:
            collages += len(record["circuits"])
    if faithfulness is not None:
        collages += sum((faithfulness / name).is_file() for name in PLOTS)
    return 2 + pictures + collages, pictures * PICTURE_BYTES + collages * COLLAGE_BYTES


def write_steering(
    folder: ReportFolder,
    steering: Sequence[Path],
    faithfulness: Path | None,
    title: str,
    names: Names,
    side: int,
    graphs: bool,
) -> None:
    """Write the page and its pictures into the folder of a report; `side`: pixels of a picture's longer side at most.

    `DamagedError` for results that cannot be read.  Equal results give equal bytes, wherever they lie.
    """
    taken: set[str] = {"faithfulness"}
    experiments: list[dict[str, Any]] = []
    guided: list[dict[str, Any]] = []
    for place in steering:
        record = read_json(place / "run.json")
        if record["format"] == GUIDED:
            slug = slug_of(f"circuits of {record['settings']['attribute']}", taken)
            guided.append(guided_view(place, slug, folder, names))
        else:
            slug = slug_of(str(read_document(place / EXPERIMENT)["name"]), taken)
            experiments.append(experiment_view(place, slug, folder, names, side))
    values = {
        "title": title,
        "graphs": graphs,
        "guided": guided,
        "experiments": experiments,
        "faithfulness": None if faithfulness is None else faithfulness_view(faithfulness, folder),
        "shown": SHOWN,
    }
    folder.write(STYLE, resources.files("analyze.report").joinpath("templates", STYLE).read_bytes())
    folder.write(PAGE, _rendered(values))


def _rendered(values: Mapping[str, Any]) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analyze.report", "templates"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(PAGE).render(values).encode()


def _check(place: Path, formats: Sequence[str], flag: str, store: Store) -> None:
    commands = " or ".join(f"analyze {COMMANDS[name]}" for name in formats)
    if not (place / "run.json").is_file():
        raise UsageError(f"{flag} {place}: there is no run.json; give what {commands} was told with --out")
    record = read_json(place / "run.json")
    found = str(record.get("format", "something else")) if isinstance(record, dict) else "something else"
    if found not in formats:
        raise UsageError(f"{flag} {place} holds {found}: give what {commands} was told with --out")
    if record.get("version") != VERSIONS[found]:
        raise ForeignError(
            f"{flag} {place} is of version {record.get('version')} of {found}, expected {VERSIONS[found]}: make it again"
        )
    if not (place / WHOLE[found]).is_file():
        raise UnfinishedError(
            f"{flag} {place} is not finished, {WHOLE[found]} is not there yet: run analyze {COMMANDS[found]} again with the same --out"
        )
    here, there = _weights(store.meta.model), _weights(record.get("model"))
    if here is not None and there is not None and here != there:
        raise MismatchError(
            f"{flag} {place} was made with another model, transformer {there[:16]}…, than the store's, {here[:16]}…: "
            "report it beside an analysis of its own model"
        )


def _weights(model: Any) -> str | None:
    """The hash of a model's transformer; None where it is not known."""
    hashes = model.get("weights_sha256") if isinstance(model, Mapping) else None
    found = hashes.get("transformer") if isinstance(hashes, Mapping) else None
    return found if isinstance(found, str) else None
