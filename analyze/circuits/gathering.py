"""`analyze graphs`: many graphs looked at together: edges that recur over prompts, one image over its steps side by side.

    OUT/recurring.parquet           a row an edge: in how many graphs, images and prompts it stands, with what sign and strength
    OUT/recurring_nodes.parquet     a row a node, likewise
    OUT/recurring.png               the edges that recur, drawn
    OUT/over_steps.parquet          a row a node and step: of every image and target that has graphs at several steps
    OUT/edges_over_steps.parquet    a row an edge and step
    OUT/over_steps/NAME.png         the graphs of one image and target, a panel a step
    OUT/run.json                    that OUT is such a folder: another one is not written into

Graphs are compared as they lie in `aggregated/`, over tokens and pruned: names there mean the same in every image.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import tyro
from tqdm import tqdm

from analyze.circuits.finished import Finished, check_alike, finished_folders, read_finished
from analyze.circuits.panels import draw_panels
from analyze.circuits.recurring import recurring_edges, recurring_nodes, recurring_panel, recurring_text
from analyze.circuits.side_by_side import edges_over_steps, grouped, nodes_over_steps, over_steps_text, step_panels
from store.errors import ForeignError, UsageError
from store.files import is_temporary, read_json, write_bytes, write_json
from store.layout import runs_folder
from store.sizes import many
from store.tables import write_table
from train.claim import claimed, refuse_place

RUN, FORMAT, VERSION = "run.json", "granary graphs together", 1


@dataclass(frozen=True, kw_only=True)
class GraphsSettings:
    """Look at many graphs together: which edges recur over prompts, and how those of one image change over its steps."""

    graphs: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="G [G …]")]
    """What `graph` has written: its --out, or several."""
    out: Path | None = None
    """Folder of tables and pictures; by default `together` in the first of --graphs."""
    min_graphs: int = 2
    """Recurring edges stand in at least so many graphs."""
    min_prompts: int = 1
    """Recurring edges stand in graphs of at least so many different prompts."""
    best: int = 20
    """How many recurring edges to print."""
    drawn: int = 30
    """How many nodes a picture shows, the most influential."""
    pictures: bool = True
    """Draw them."""

    def __post_init__(self) -> None:
        if not self.graphs:
            raise UsageError("--graphs names no folder: give what python -m analyze graph has written")
        for flag in ("min_graphs", "min_prompts", "best", "drawn"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}: give at least 1")

    @property
    def place(self) -> Path:
        """Where results go."""
        return self.out if self.out is not None else self.graphs[0] / "together"


@dataclass(frozen=True)
class Together:
    """What came of it."""

    edges: pa.Table
    nodes: pa.Table
    over_steps: pa.Table
    edges_over_steps: pa.Table
    pictures: tuple[Path, ...]


def run(settings: GraphsSettings) -> Together:
    """The tables and pictures, also written to OUT; what recurs and what changes is printed.

    `UsageError` for folders without graphs, `MismatchError` for graphs of different dictionaries.
    """
    started = time.monotonic()
    with claimed(settings.place, runs_folder(settings.place), "process looks at graphs together in"):
        return _run(settings, started)


def _run(settings: GraphsSettings, started: float) -> Together:
    check_claim(settings.place)
    members = [read_finished(folder) for folder in tqdm(finished_folders(settings.graphs), desc="graphs", leave=False)]
    check_alike(members)
    record = {"format": FORMAT, "version": VERSION}
    write_json(settings.place / RUN, record | {"finished": False})
    edges = recurring_edges(members, settings.min_graphs, settings.min_prompts)
    nodes = recurring_nodes(members, settings.min_graphs, settings.min_prompts)
    groups = grouped(members)
    over_steps, edges_at_steps = nodes_over_steps(groups), edges_over_steps(groups)
    tables = {"recurring": edges, "recurring_nodes": nodes}
    tables |= {"over_steps": over_steps, "edges_over_steps": edges_at_steps}
    for name, table in tables.items():
        write_table(settings.place / f"{name}.parquet", table)
    pictures = tuple(_draw(settings, members, edges, nodes, groups))
    for stale in {*settings.place.glob("over_steps/*image-*.png"), *settings.place.glob("recurring.png")} - {*pictures}:
        stale.unlink()  # of other graphs, or of an earlier run over these
    write_json(settings.place / RUN, record)
    print(recurring_text(edges, len(members), settings.best))
    print(over_steps_text(groups, settings.best))
    of = _counted(members)
    found = f"{many(len(edges), 'recurring edge')}, {many(len(groups), 'target')} over steps"
    print(f"graphs: {of}: {found}, in {time.monotonic() - started:.1f} s -> {settings.place}")
    return Together(edges, nodes, over_steps, edges_at_steps, pictures)


def check_claim(out: Path) -> None:
    """Refuse an OUT that holds something else: what is there would be overwritten or removed."""
    refuse_place(out)
    if (out / RUN).exists():
        found = read_json(out / RUN)
        if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise ForeignError(
                f"{out / RUN} is not the record of graphs together in format {VERSION}: choose another --out"
            )
    elif out.exists() and not all(is_temporary(path) for path in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no graphs together: choose another --out")


def _draw(
    settings: GraphsSettings,
    members: list[Finished],
    edges: pa.Table,
    nodes: pa.Table,
    groups: dict[str, list[Finished]],
) -> list[Path]:
    """Publish the pictures; where nothing recurs there is none of it."""
    if not settings.pictures:
        return []
    pictures = {
        settings.place / "over_steps" / f"{name}.png": (
            step_panels(group),
            f"{_shown(group[0])}: image {group[0].image}",
        )
        for name, group in groups.items()
    }
    if len(edges):
        targets = {name for member in members for name in member.explained}
        title = f"Edges that recur over {_counted(members)}: the {settings.drawn} nodes that have most influence"
        pictures[settings.place / "recurring.png"] = ([recurring_panel(edges, nodes, targets)], title)
    for path, (panels, title) in pictures.items():
        write_bytes(path, draw_panels(panels, title, settings.drawn))
    return list(pictures)


def _counted(members: list[Finished]) -> str:
    """`15 graphs of 5 images`"""
    return f"{many(len(members), 'graph')} of {many(len({(each.store, each.image) for each in members}), 'image')}"


def _shown(member: Finished) -> str:
    return " and ".join(member.targets) + f' · "{member.prompt}"'
