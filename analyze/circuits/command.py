"""`python -m analyze graph`: attribution graphs of features from a store's traces and transcoders, FLUX not run.

1. What is asked is checked against the store and the dictionaries; with `--plan` its cost is printed, and that is all.
2. The graphs that OUT does not hold yet are made, trace by trace.
3. The further forms, the page and the summary are written from the graphs on the disk.
4. A failure of `--check`, or a target that is not active, ends the command with exit 1 when all else is done.
"""

import platform
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from analyze.circuits.exchange import write_exports
from analyze.circuits.experiments import Made, device_of, make_all
from analyze.circuits.folders import check_claim, claim, held
from analyze.circuits.inquiry import Inquiry, open_inquiry, sites_below
from analyze.circuits.planning import announce
from analyze.circuits.settings import GraphSettings
from analyze.circuits.summary import Labels, printed, row_of, summary_table
from analyze.circuits.viewer.pages import write_pages
from store.errors import GranaryError
from store.files import write_json
from store.layout import runs_folder
from store.sizes import many
from store.tables import write_table


@dataclass(frozen=True)
class GraphsMade:
    """What a run of `graph` made, or, with `--plan`, nothing."""

    made: tuple[Made, ...]
    """Every experiment: its graph's folder, or why it has none, and its check."""
    summary: pa.Table
    """A row an experiment: what the target is and what it comes from."""
    seconds: float = field(compare=False)


def run(settings: GraphSettings) -> GraphsMade:
    """Make the graphs that are not there yet, each in its folder under OUT; the same settings on the same store give the same bytes.

    Errors: `UsageError` for what cannot be explained and for an OUT made with other settings, `MismatchError` for dictionaries of another
    model, `DamagedError` for a trace that cannot be read, `GranaryError` at the end where --check finds an error over its bound or a
    target was not active.
    """
    started = time.monotonic()
    device_of(settings.device)
    inquiry = open_inquiry(settings)
    record = {"store": inquiry.store.id, "alone": inquiry.alone, "settings": settings.choices}
    check_claim(settings.out, record)
    for note in notes(inquiry):
        print(note)
    announce(inquiry)
    if settings.plan:
        return GraphsMade((), summary_table([]), time.monotonic() - started)
    with held(settings.out):
        check_claim(settings.out, record)  # another process may have had the lock
        claim(settings.out, record)
        done = GraphsMade(*_make(inquiry), time.monotonic() - started)
    _record(inquiry, done)
    print(_sentence(inquiry, done))
    refuse_failures(inquiry, done.made)
    return done


def _make(inquiry: Inquiry) -> tuple[tuple[Made, ...], pa.Table]:
    """Graphs, further forms, page and summary."""
    settings, labels = inquiry.settings, Labels(inquiry)
    made = tuple(make_all(inquiry))
    folders = [each.folder for each in made if each.folder is not None]
    for folder in folders:
        write_exports(folder, settings.exports, labels.books)
    rows = [row_of(each, labels, inquiry) for each in made]
    table = summary_table(rows)
    write_table(settings.out / "summary.parquet", table)
    if settings.page and folders:
        write_pages(folders, settings.out, inquiry.store, labels.books)
    print(printed(made, rows))
    return made, table


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
            f"note: {', '.join(map(str, without))} have no transcoder: what their MLPs add counts as error (--allow-missing)"
        )
    return found


def refuse_failures(inquiry: Inquiry, made: tuple[Made, ...]) -> None:
    """Raise for a check over its bound, and for targets that are not active; all else is done by then."""
    inactive = [each for each in made if each.reason is not None]
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
    page = inquiry.settings.out / "index.html"
    where = page if page.exists() else inquiry.settings.out
    return f"graph: {count} of {many(len(inquiry.traces), 'trace')} in {done.seconds:.1f} s -> {where}"


def _record(inquiry: Inquiry, done: GraphsMade) -> None:
    """Note beside OUT how it was computed."""
    settings = inquiry.settings
    about: dict[str, Any] = {
        "command": sys.argv, "host": platform.node(), "ended": time.time(), "seconds": done.seconds,
        "device": device_of(settings.device).type, "memory": settings.memory, "made": sum(each.new for each in done.made),
        "found": sum(each.folder is not None and not each.new for each in done.made),
    }  # fmt: skip
    write_json(runs_folder(settings.out) / "graph.json", about)
