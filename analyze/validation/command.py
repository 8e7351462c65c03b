"""`python -m analyze validate`: the nodes of attribution graphs perturbed in the real model, against what the graphs say.

1. Graphs, store and transcoders are checked against one another; with `--plan` the runs are counted, and that is all.
2. Every image is drawn once, up to the last step that a graph explains, and what the transformer is called with is kept.
3. At each (image, step): a plain pass, and the same with transcoders and their errors in the place of the MLPs (`exactness`).
4. Graph by graph, every node is perturbed, a batch at a time, and every expanded node read; each graph is published when it is done.
5. Tables of all graphs, their agreement, a page and a picture of it.
"""

import platform
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tqdm import tqdm

from analyze.faithfulness.splicing import KeptErrors, splice
from analyze.inputs import check_results
from analyze.steering.drawing import Painter, open_painter, threads
from analyze.validation.files import (
    DONE,
    RUN,
    WHAT,
    Together,
    folder_of,
    publish_all,
    publish_graph,
    record_of,
)
from analyze.validation.graphs import Job, Validated, open_validated
from analyze.validation.measured_graph import measure
from analyze.validation.perturbed_runs import Call, Plain, answer, calls_of, dtype_of, plain_pass
from analyze.validation.settings import ValidateSettings
from analyze.validation.text import rows_text
from store.files import write_json
from store.layout import runs_folder
from store.sizes import human_size, many
from train.claim import claimed, refuse_place
from train.dictionaries.provenance import model_name

if TYPE_CHECKING:
    from torch import nn

PAIR_BYTES, PAGE_BYTES = 120, 500_000
"""of a pair in the tables, twice, and of the page and the picture: more than they take"""


@dataclass(frozen=True)
class Validation:
    """What a run of `validate` found."""

    together: Together | None
    """Tables and facts of all graphs; None with `--plan`."""
    rows: int
    """perturbations of this run, each a row of a batch"""
    seconds: float = field(compare=False)


def run(settings: ValidateSettings) -> Validation:
    """Perturb the graphs' nodes in the model that made the store; tables, page and picture in OUT.

    Errors: `UsageError` for graphs, store or dictionaries that are not there and for an OUT of something else, `MismatchError` for graphs
    of another store, other dictionaries than the graphs were made with, another model, or a picture that does not come out again.
    """
    started = time.monotonic()
    refuse_place(settings.out)
    validated = open_validated(settings)
    record = record_of(validated)
    check_results(settings.out, record, WHAT)
    _announce(validated)
    if settings.plan:
        return Validation(None, 0, time.monotonic() - started)
    with claimed(settings.out, runs_folder(settings.out), "process validates graphs in"):
        check_results(settings.out, record, WHAT)  # another process may have had the lock
        write_json(settings.out / RUN, record)
        rows, forwards = _measure_all(validated)
        done = Validation(publish_all(validated), rows, time.monotonic() - started)
    write_json(
        runs_folder(settings.out) / "validate.json",
        {
            "command": sys.argv, "host": platform.node(), "ended": time.time(), "seconds": done.seconds, "rows": rows,
            "forwards_to_draw": forwards, "rows_per_second": rows / max(done.seconds, 1e-9),
        },
    )  # fmt: skip
    _summarise(validated, done)
    return done


def _announce(validated: Validated) -> None:
    """Print what will be run, and how often."""
    settings = validated.settings
    missing = _missing(validated)
    calls = {(job.member.image, job.member.step) for job in missing}
    images = {image: max(step for i, step in calls if i == image) + 1 for image, _ in calls}
    rows = sum(len(job.rows) for job in missing) * len(settings.holds)
    size = validated.batch_size
    batches = sum(-(-len(job.rows) // size) for job in missing) * len(settings.holds)
    pairs = sum(len(job.rows) * len(job.readers) for job in validated.jobs) * len(settings.holds)
    whole = len(calls) * (3 if settings.exactness else 1)
    top = max(job.top for job in validated.jobs)
    there = len(validated.jobs) - len(missing)
    print(
        f"plan: {many(len(missing), 'graph')} of {many(len(images), 'image')}"
        + (f" ({many(there, 'graph')} finished already)" if there else "")
        + f"; the transformer of "
        f"{model_name(validated.store.meta.model)} runs {sum(images.values())} times to draw, {whole} times whole, and "
        f"{rows + batches:,} times up to block {top} ({many(rows, 'perturbation')} at most {size} at once, a plain row beside them)\n"
        f"  memory: the model, the transcoders, and beside what {many(size + 1, 'row')} at once take in the model at least "
        f"{human_size(_held(validated))} of what its MLPs read and wrote\n"
        f"  at most {human_size(pairs * PAIR_BYTES + PAGE_BYTES)} are written; the time is not known before the model runs",
        flush=True,
    )
    used = {subject.outline.name for subject in validated.subjects.values()}
    unchecked = [name for name in validated.shelf.unchecked if name in used]
    if unchecked:
        print(
            f"note: that {', '.join(unchecked)} belong to the store's model is not checked: the dictionaries or the store do not say what "
            "they come from (parent: unknown)"
        )
    if validated.left_out:
        print(f"note: {many(validated.left_out, 'graph')} left out, with nothing to perturb below what is read")


def _missing(validated: Validated) -> list[Job]:
    """The graphs that OUT does not hold yet."""
    return [job for job in validated.jobs if not (folder_of(validated, job) / DONE).exists()]


def _held(validated: Validated) -> int:
    """Bytes of what a plain pass keeps (mlp_in and mlp_out of each site below the readers), and of one MLP's outputs of a batch."""
    canvas = validated.canvas
    sites = validated.sites(max(job.top for job in validated.jobs))
    width = canvas.d_model * (4 if validated.settings.dtype == "float32" else 2)
    tokens = [canvas.tokens[site.stream] for site in sites]  # type: ignore[index]
    return width * (2 * sum(tokens) + (validated.batch_size + 1) * max(tokens, default=0))


def _measure_all(validated: Validated) -> tuple[int, int]:
    """Measure the graphs that OUT does not hold yet: rows that ran, and passes that drawing took."""
    missing = _missing(validated)
    if not missing:
        return 0, 0
    settings = validated.settings
    painter = open_painter(
        validated.store, settings.model, settings.device, None, 1, validated.shelf, canvas=validated.canvas
    )
    names, by_call = {job.name for job in missing}, {}
    for key, jobs in validated.by_call.items():
        if here := [job for job in jobs if job.name in names]:
            by_call[key] = here
    with threads(validated.canvas.threads):
        calls = _calls(validated, painter, sorted(by_call))
        transformer = _converted(painter, settings)
        total = sum(len(job.rows) for job in missing) * len(settings.holds)
        with tqdm(total=total, desc="validate", unit="row", mininterval=0.5) as progress:
            for (image, step), jobs in by_call.items():
                progress.set_postfix_str(f"image {image}, step {step}", refresh=False)
                call = calls[image, step]
                plain = plain_pass(transformer, call, validated.sites(max(job.top for job in jobs)))
                exact = _exactness(validated, painter, transformer, call, plain) if settings.exactness else None
                for job in jobs:
                    found = measure(
                        job, transformer, call, plain, validated.subjects, settings, validated.batch_size,
                        validated.text_lengths[image], progress.update,
                    )  # fmt: skip
                    publish_graph(validated, job, found, call.sigma, exact)
    return total, painter.forwards


def _calls(validated: Validated, painter: Painter, keys: list[tuple[int, int]]) -> dict[tuple[int, int], Call]:
    """What the transformer is called with at each (image, step), in the dtype of the store."""
    found = {}
    images = sorted({image for image, _ in keys})
    for image in tqdm(images, desc="draw", unit="image", mininterval=0.5):
        steps = [step for i, step in keys if i == image]
        for step, call in calls_of(painter, validated.shots[image], steps).items():
            found[image, step] = call
    return found


def _converted(painter: Painter, settings: ValidateSettings) -> "nn.Module":
    """The transformer in the dtype of the perturbed runs."""
    from harvest.models.model import DTYPES
    from harvest.quiet import quiet

    transformer: nn.Module = painter.sampler.pipe.transformer
    if dtype_of(transformer) != DTYPES[settings.dtype]:
        with quiet():
            transformer.to(DTYPES[settings.dtype])
    return transformer


def _exactness(validated: Validated, painter: Painter, transformer: "nn.Module", call: Call, plain: Plain) -> float:
    """How far the model's answer moves when transcoders and their errors take the place of MLPs: over its largest value."""
    dictionaries = {
        site: painter.dictionaries[site, "transcoder"] for site in validated.subjects if site in plain.outputs
    }
    errors = KeptErrors()
    answer(transformer, call, errors.recording(dictionaries))
    spliced = answer(transformer, call, splice(dictionaries, errors=errors))
    assert plain.answer is not None
    return float((spliced - plain.answer).abs().max() / plain.answer.abs().max())


def _summarise(validated: Validated, done: Validation) -> None:
    assert done.together is not None
    facts, out = done.together.facts, validated.settings.out
    print(rows_text(done.together.agreement))
    exact = (
        ""
        if facts["exactness"] is None
        else f"; with transcoders and errors the answer moves by {facts['exactness']:.1e}"
    )
    print(
        f"validate: {many(len(facts['graphs']), 'graph')} of {facts['model']}, {done.rows:,} perturbations run in {done.seconds:.1f} s; "
        f"redrawn within {facts['drift']:.1e}, out of reach {facts['out_of_reach']:.1e}{exact} -> {out / 'validation.md'}"
    )
