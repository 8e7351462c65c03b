"""`python -m analyze graph`: attribution graphs of features from a store's traces and transcoders, FLUX not run.

1. What is asked is checked against the store and the dictionaries; with `--plan` its cost is printed, and that is all.
2. The graphs that OUT does not hold yet are made, trace by trace.
3. The further forms of these graphs are written; the page and the summary, of all graphs that OUT holds.
4. A failure of `--check`, or a target that is not active, ends the command with exit 1 when all else is done.
"""

import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from analyze.circuits.exchange import write_exports
from analyze.circuits.experiments import Made, device_of, make_all
from analyze.circuits.folders import check_claim, check_dictionaries, claim, damage, graph_folders, threads_of
from analyze.circuits.inquiry import Inquiry, open_inquiry, sites_below
from analyze.circuits.planning import announce, memory_note
from analyze.circuits.settings import GraphSettings
from analyze.circuits.summary import Labels, printed, row_of, rows_of_others, summary_table
from analyze.circuits.viewer.pages import write_pages
from store.errors import GranaryError
from store.files import write_json
from store.layout import runs_folder
from store.sites import spans
from store.sizes import many
from store.tables import write_table
from train.claim import claimed


@dataclass(frozen=True)
class GraphsMade:
    """What a run of `graph` made, or, with `--plan`, nothing."""

    made: tuple[Made, ...]
    """Every experiment: its graph's folder, or why it has none, and its check."""
    summary: pa.Table
    """What `OUT/summary.parquet` holds: a row an experiment, then one for each further graph in OUT."""
    seconds: float = field(compare=False)


def run(settings: GraphSettings) -> GraphsMade:
    """Make the graphs that are not there yet, each in its folder under OUT.

    Same bytes: the same command on the same store and dictionaries, wherever they lie, stopped and gone on with or not, gives the same
    bytes with the same `memory`, kind of device, number of threads (`torch.get_num_threads`) and version of PyTorch; these decide in
    which parts sums are added up, and so their last digits.  OUT records memory, device and threads: another memory or device is
    refused there, and later runs take as many threads as the first did.

    Errors: `UsageError` for what cannot be explained and for an OUT made with other settings, `MismatchError` for dictionaries of another
    model, `DamagedError` for a trace that cannot be read, `GranaryError` at the end where --check finds an error over its bound or a
    target was not active.
    """
    started = time.monotonic()
    device_of(settings.device)
    inquiry = open_inquiry(settings)
    _check_out(inquiry)
    for note in notes(inquiry):
        print(note)
    announce(inquiry)
    if settings.plan:
        return GraphsMade((), summary_table([]), time.monotonic() - started)
    with claimed(settings.out, runs_folder(settings.out), "process makes graphs in"):
        record = _check_out(inquiry)  # another process may have had the lock
        claim(settings.out, record)
        with _threads(record["settings"]["threads"]):
            done = GraphsMade(*_make(inquiry), time.monotonic() - started)
    _record(inquiry, done)
    print(_sentence(inquiry, done))
    refuse_failures(inquiry, done.made)
    return done


def _check_out(inquiry: Inquiry) -> dict[str, Any]:
    """Refuse an OUT of other choices or dictionaries; else what decides the bytes of the graphs there."""
    settings = inquiry.settings
    record: dict[str, Any] = {
        "store": inquiry.store.id, "alone": inquiry.alone,
        "settings": {
            **settings.choices, "memory": settings.held, "device": device_of(settings.device).type,
        },
    }  # fmt: skip
    check_claim(settings.out, record)
    record["settings"]["threads"] = threads_of(settings.out) or torch.get_num_threads()
    check_dictionaries(settings.out, inquiry.identities(*inquiry.experiments))
    return record


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, PyTorch computes with so many threads."""
    before = torch.get_num_threads()
    if count != before:
        print(
            f"note: computing with {many(count, 'thread')}, as the graphs that are there already were, for the same bytes"
        )
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def _make(inquiry: Inquiry) -> tuple[tuple[Made, ...], pa.Table]:
    """Graphs, further forms, page and summary."""
    settings = inquiry.settings
    order = {id(each): number for number, each in enumerate((*inquiry.experiments, *inquiry.untraced))}
    made = tuple(sorted(make_all(inquiry), key=lambda each: order[id(each.experiment)]))
    labels = Labels(inquiry)
    folders = [each.folder for each in made if each.folder is not None]
    for folder in folders:
        write_exports(folder, settings.exports, labels.books, settings.out)
    rows = [row_of(each, labels, inquiry) for each in made]
    path = settings.out / "summary.parquet"
    every = [*folders, *_readable(folder for folder in graph_folders(settings.out) if folder not in folders)]
    others = sorted(every[len(folders) :])
    table = summary_table([*rows, *rows_of_others(others, labels, path)])
    write_table(path, table)
    if settings.page and every:
        write_pages(sorted(set(every)), settings.out, inquiry.store, labels.by_identity)
    elif any(each.new for each in made):
        _remove_page(settings.out)
    print(printed(made, rows))
    return made, table


def _readable(folders: Iterable[Path]) -> Iterator[Path]:
    """Of graphs that other runs made those that can be read; of another a note says what to do."""
    for folder in folders:
        if wrong := damage(folder):
            print(f"note: the summary and the page lack a graph: {wrong}")
        else:
            yield folder


def _remove_page(out: Path) -> None:
    """Take away the page of an earlier run, which does not show the new graphs."""
    if (out / "index.html").exists():
        (out / "index.html").unlink()
        shutil.rmtree(out / "page", ignore_errors=True)
        print(
            "note: the page of an earlier run was removed, which did not show the new graphs: run without --no-page to have one"
        )


def notes(inquiry: Inquiry) -> list[str]:
    """What a reader of the graphs has to know of their inputs."""
    found = []
    if inquiry.unchecked:
        found.append(
            f"note: that {', '.join(inquiry.unchecked)} belong to the store's model is not checked: the dictionaries or the store "
            "do not say what they come from (parent: unknown)"
        )
    without = [site for site in sites_below(inquiry.experiments) if site not in inquiry.subjects]
    if without:
        found.append(
            f"note: {', '.join(map(str, without))} {'has' if len(without) == 1 else 'have'} no transcoder: what "
            f"{'its MLP adds' if len(without) == 1 else 'their MLPs add'} counts as error (--allow-missing)"
        )
    if inquiry.single:
        found.append(
            f"note: joint_{spans([site.layer for site in inquiry.single])} left out: graphs stop at the last double block, before "
            "the single-stream ones"
        )
    if inquiry.untraced:
        found.append(f"note: {many(len(inquiry.untraced), 'target')} left out, of images or steps that are not traced")
    if not inquiry.scanned:
        found.append(
            f"note: that the dictionaries which {inquiry.settings.targets} names are these is not checked: the record of the scan "
            "does not lie beside it"
        )
    if warning := memory_note(inquiry):
        found.append(warning)
    return found


def refuse_failures(inquiry: Inquiry, made: tuple[Made, ...]) -> None:
    """Raise for a check over its bound, and for targets that are not active; all else is done by then."""
    inactive = [each for each in made if each.inactive]
    said = []
    if inactive and not inquiry.settings.skip_inactive:
        said.append(
            f"{len(inactive)} of {many(len(made), 'target')} have no graph, the first {inactive[0].experiment.where}: "
            f"{inactive[0].reason}; --skip-inactive lets such targets pass"
        )
    over = [(each.name, what) for each in made if each.check is not None for what in each.check.worst]
    if over:
        name, (what, error, bound) = over[0]
        said.append(
            f"{many(len(over), 'check')} failed, the first of {name}: {what} {error:.2e}, expected at most {bound:.0e}: "
            "do not rely on these graphs; try --dtype float64, and harvest the trace again with --trace-dtype float32"
        )
    if said:
        raise GranaryError("; ".join(said))


def _sentence(inquiry: Inquiry, done: GraphsMade) -> str:
    new = sum(each.new for each in done.made)
    there = sum(each.folder is not None for each in done.made) - new
    count = many(new, "graph") + (f" ({there:,} were there already)" if there else "")
    settings = inquiry.settings
    held = len(graph_folders(settings.out))
    more = f"; {settings.out} holds {held:,} in all" if held > new + there else ""
    where = settings.out / "index.html" if settings.page and held else settings.out
    return f"graph: {count} of {many(len(inquiry.traces), 'trace')} in {done.seconds:.1f} s{more} -> {where}"


def _record(inquiry: Inquiry, done: GraphsMade) -> None:
    """Note beside OUT how it was computed."""
    settings = inquiry.settings
    about: dict[str, Any] = {
        "command": sys.argv, "host": platform.node(), "ended": time.time(), "seconds": done.seconds,
        "device": device_of(settings.device).type, "memory": settings.memory, "made": sum(each.new for each in done.made),
        "found": sum(each.folder is not None and not each.new for each in done.made),
    }  # fmt: skip
    write_json(runs_folder(settings.out) / "graph.json", about)
