"""The report: `OUT/report/index.html` and what it loads, a folder that opens from disk and can be sent to a colleague.

    index.html, report.css, static/     the page: overview as plain HTML, the rest drawn by scripts of ours
    libraries/                          DataTables and Bokeh, out of their wheels, with their licences
    data/report.js                      what there is; data/labels.js: the labels when it was built
    data/tables/NAME/step.K.js          columns of the table of features
    data/features/NAME/N.js             similar features and step profiles, 64 features a file
    data/examples/NAME/step.K/N.js      figures, histogram and examples with their heat, 64 features a file
    data/prompts/N.js, data/pieces/N.js prompts and their text tokens, 1,024 images a file
    pictures/000/17.webp                each picture once
    graphs.html, graph.css, data/graphs.js, data/graphs/NAME.js     attribution graphs, where there are any (`analyze.circuits.viewer`)
    steering.html, steering.css, pictures/steering/…                steering and faithfulness, where there are any (`steering`)

Everything is relative, static and local.  Equal results give equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analyze.circuits.viewer.pages import check_graphs, write_beside_report
from analyze.compare.directions import nearest
from analyze.features.ranking import step_profile
from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.labels.book import LabelBook
from analyze.pictures.examples import check_top
from analyze.report.chosen import Round, heat_limit, rounds
from analyze.report.chunks import CHUNK, Profile, Similar, chunk_slices, examples_chunk, feature_chunk
from analyze.report.columns import table_script
from analyze.report.findings import Spotlight, Truth, headlines, judged_features, read_truth, spotlights
from analyze.report.folder import INDEX, ReportFolder
from analyze.report.heat_pass import HeatInside, spool_heat
from analyze.report.html import Page, write_page
from analyze.report.images import write_images
from analyze.report.libraries import bundle_libraries
from analyze.report.page import dictionary_rows
from analyze.report.planning import Plan, plan_of
from analyze.report.settings import ReportSettings
from analyze.report.spool import Spool
from analyze.report.steering import check_steering, write_steering
from analyze.report.steering_experiments import Names
from analyze.truth.attributes import Attribute, Scene, read_scenes


@dataclass(frozen=True)
class Report:
    """Where the report lies, and its best findings in plain words."""

    index: Path
    findings: tuple[str, ...]
    files: int
    bytes: int


def run(settings: ReportSettings) -> Report | Plan:
    """Write the report; prints where it is and the five best findings.  With `plan`: what it would be."""
    analysis = open_analysis(settings)
    choices = check_output(analysis)
    check_top(choices["top"], settings.top)
    truth = read_truth(analysis)
    limit = heat_limit(analysis, settings)
    check_graphs(settings.graphs, analysis.store)  # before a report that is there already is touched
    check_steering(settings.steering, settings.faithfulness, analysis.store)
    if settings.plan:
        plan = plan_of(analysis, settings, limit)
        print(plan.sentence())
        return plan
    folder = ReportFolder(analysis.out / "report")
    libraries = bundle_libraries(folder)
    books = {subject.name: LabelBook.of(subject) for subject in analysis.subjects}
    overview = dictionary_rows(analysis)
    spots = {subject.name: spotlights(analysis, subject, truth, settings.best) for subject in analysis.subjects}
    findings = headlines(analysis, truth, [spot for group in spots.values() for spot in group], books)
    images = _write_dictionaries(analysis, settings, truth, limit, spots, folder)
    pictures = write_images(folder, analysis, images, settings.picture_side)
    folder.script("labels", _labels(analysis, books))
    page = Page(analysis, settings, choices, truth, overview, findings, libraries)
    identities = {subject.identity: subject.name for subject in analysis.subjects}
    steered = bool(settings.steering or settings.faithfulness)
    graphs = (
        write_beside_report(folder, settings.graphs, analysis.store, identities, steered) if settings.graphs else []
    )
    if steered:
        names = Names(identities, analysis.steps)
        write_steering(
            folder, settings.steering, settings.faithfulness, settings.title, names, settings.picture_side, bool(graphs)
        )
    folder.script("report", {**_contents(analysis, settings, overview), "pictures": pictures, "graphs": len(graphs)})
    write_page(folder, page)
    size = sum(folder.written.values())
    report = Report(folder.path / INDEX, tuple(text for _, text in findings), len(folder.written), size)
    print(f"report: {report.index} ({report.files:,} files, {size / 1e6:,.1f} MB)")
    for number, text in enumerate(report.findings, 1):
        print(f"  {number}. {text}")
    return report


def _write_dictionaries(
    analysis: Analysis,
    settings: ReportSettings,
    truth: Truth | None,
    limit: int,
    spots: Mapping[str, Sequence[Spotlight]],
    folder: ReportFolder,
) -> set[int]:
    """Write tables, features and examples of every dictionary; the images that stand there."""
    knows_scenes = truth is not None and "truth" in analysis.store.prompts().column_names
    scenes = read_scenes(analysis.store) if knows_scenes else None
    images: set[int] = set()
    total = len(analysis.subjects) * len(analysis.steps)
    with tqdm(total=total, desc="report", unit="step", mininterval=0.5) as progress:
        for subject in analysis.subjects:
            _write_features(analysis, subject, settings.similar, folder)
            for this in rounds(analysis, subject, settings, limit, spots[subject.name]):
                progress.set_postfix_str(f"{subject.name} step {this.step}", refresh=False)
                images |= set(np.unique(this.columns.images[this.columns.images >= 0]).tolist())
                _write_round(analysis, this, truth, scenes if subject.site.stream != "txt" else None, folder)
                progress.update(1)
    return images


def _write_features(analysis: Analysis, subject: Subject, similar: int, folder: ReportFolder) -> None:
    profile = step_profile(analysis, subject)
    count = min(similar, subject.n_features - 1)
    near = Similar(*nearest(subject.dictionary, count)) if count > 0 else None
    over_steps = Profile(profile["density"], profile["mean_active"])
    for number, features in enumerate(chunk_slices(subject.n_features)):
        folder.script(f"features/{subject.name}/{number}", feature_chunk(features, near, over_steps))


def _write_round(
    analysis: Analysis, this: Round, truth: Truth | None, scenes: Sequence[Scene] | None, folder: ReportFolder
) -> None:
    judged = judged_features(truth, this.subject, this.step)
    attributes = {f: [Attribute(entry["group"], entry["value"]) for entry in found] for f, found in judged.items()}
    first = analysis.store.meta.text_tokens if this.subject.site.stream == "joint" else 0
    inside = HeatInside(scenes, attributes, first)
    with Spool(len(this.heated), this.columns.images.shape[1]) as spool:
        rows = spool_heat(analysis, this, spool, inside)
        for feature, found in judged.items():
            for entry in found:
                entry["heat_inside"] = inside.share(feature, Attribute(entry["group"], entry["value"]))
        for number, features in enumerate(chunk_slices(this.columns.n_features)):
            chunk = examples_chunk(features, this.columns, this.coherence, (spool, rows), judged)
            folder.script(f"examples/{this.name}/{number}", chunk)
    stands_for = {
        feature: ", ".join(f"{entry['group']} {entry['value']}" for entry in found if entry["stands"])
        for feature, found in judged.items()
        if any(entry["stands"] for entry in found)
    }
    script = table_script(this.columns, analysis.store.n_images, this.coherence, stands_for)
    folder.script(f"tables/{this.name}", script)


def _labels(analysis: Analysis, books: Mapping[str, LabelBook]) -> dict[str, Any]:
    return {name: [asdict(label) for label in book.labels] for name, book in books.items()}


def _contents(analysis: Analysis, settings: ReportSettings, overview: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page has to know before it loads anything else."""
    meta = analysis.store.meta
    dictionaries = [
        {
            "name": subject.name,
            "full_name": subject.outline.name,
            "identity": subject.identity,
            "site": str(subject.site),
            "stream": subject.site.stream,
            "point": subject.point,
            "features": subject.n_features,
            **{key: row[key] for key in ("kind", "fvu_value", "l0_value", "fvu_steps", "density")},
        }
        for subject, row in zip(analysis.subjects, overview, strict=True)
    ]
    return {
        "title": settings.title,
        "store": analysis.store.id,
        "model": str(meta.model.get("id")),
        "images": analysis.store.n_images,
        "steps": list(analysis.steps),
        "grid": list(meta.grid),
        "width": meta.width,
        "height": meta.height,
        "text_tokens": meta.text_tokens,
        "chunk": CHUNK,
        "dictionaries": dictionaries,
    }
