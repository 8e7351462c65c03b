"""What OUT holds: a folder a finished splicing, and the tables, plots and pictures that are made of them.

OUT/run.json                         what made it all: store, model, dictionaries, settings, versions
OUT/splicings/NAME/images.parquet    a row an image: distances from the plain picture, and what the judge reads
OUT/splicings/NAME/sites.parquet     a row a site, step and kind of tokens; written last: a splicing that has it is finished
OUT/pictures/NAME/00000.png          the first pictures of a splicing, plain ones under `plain`
OUT/exactness/GROUP.parquet          errors added back
OUT/faithfulness.parquet .md .png    a row a splicing; the tables for people; sparsity against faithfulness
OUT/images.parquet, sites.parquet, exactness.parquet, steps.png, blocks.png, pictures.png
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from analyze.faithfulness.groups import FILE_NAME, Group, Splicing, sites_text
from analyze.faithfulness.plots import blocks_plot, sparsity_plot, steps_plot
from analyze.faithfulness.table import markdown, summary, summary_table, with_recovered
from analyze.steering.collages import grid
from store.files import write_bytes
from store.tables import read_table, write_table

PLAIN = "plain"
SHOWN = 4
"""images whose pictures are kept and stand in the sheet"""
MOST_COLUMNS = 12
"""splicings in the sheet"""


@dataclass(frozen=True)
class Place:
    """The folder of a run's results."""

    out: Path

    def folder(self, splicing: Splicing) -> Path:
        """Where the tables of a splicing lie."""
        return self.out / "splicings" / splicing.file_name

    def finished(self, splicing: Splicing) -> bool:
        """Whether a splicing was measured."""
        return (self.folder(splicing) / "sites.parquet").exists()

    def write(self, splicing: Splicing, images: pa.Table, sites: pa.Table, pictures: Sequence[Image.Image]) -> None:
        """Publish what was measured; what says that it is finished comes last."""
        self.write_pictures(splicing.file_name, images["image"].to_pylist(), pictures)
        write_table(self.folder(splicing) / "images.parquet", images)
        write_table(self.folder(splicing) / "sites.parquet", sites)

    def write_pictures(self, name: str, images: Sequence[int], pictures: Sequence[Image.Image]) -> None:
        """Keep the first few pictures."""
        for image, picture in zip(images[:SHOWN], pictures[:SHOWN], strict=False):
            buffer = io.BytesIO()
            picture.save(buffer, format="png")
            write_bytes(self.out / "pictures" / name / f"{image:05d}.png", buffer.getvalue())

    def pictures(self, name: str, images: Sequence[int]) -> list[Image.Image | None]:
        """The kept pictures of these images; None where there is none."""
        paths = [self.out / "pictures" / name / f"{image:05d}.png" for image in images]
        return [Image.open(path).convert("RGB") if path.exists() else None for path in paths]

    def tables(self, splicing: Splicing) -> tuple[pa.Table, pa.Table]:
        """(images, sites) of a finished splicing; `DamagedError` where a file cannot be read."""
        return _table(self.folder(splicing) / "images.parquet"), _table(self.folder(splicing) / "sites.parquet")

    def exactness(self, group: Group) -> Path:
        """Where it is written how exactly the errors of a group's dictionaries make up for them."""
        return self.out / "exactness" / f"{FILE_NAME.sub('-', group.label)}.parquet"


def _table(path: Path) -> pa.Table:
    return read_table(path, "remove its folder and run the command again")


@dataclass(frozen=True)
class Results:
    """What a finished run found."""

    summary: pa.Table
    """faithfulness.parquet: a row a splicing"""
    sites: pa.Table
    """sites.parquet: a row a splicing, site, step and kind of tokens"""
    exactness: pa.Table | None
    """exactness.parquet; None where that was left out"""


def publish_results(
    place: Place,
    splicings: Sequence[Splicing],
    groups: Sequence[Group],
    facts: Sequence[str],
    shown: Sequence[tuple[int, str]],
) -> Results:
    """Make every table, plot and sheet of the finished splicings; `shown`: (image, prompt) of the pictures in the sheet."""
    tables = [place.tables(splicing) for splicing in splicings]
    rows = with_recovered([summary(*each) for each in tables])
    sites = pa.concat_tables([each[1] for each in tables])
    exact = [_table(path) for path in map(place.exactness, groups) if path.exists()]
    found = Results(summary_table(rows), sites, pa.concat_tables(exact) if exact else None)
    write_table(place.out / "images.parquet", pa.concat_tables([each[0] for each in tables]))
    write_table(place.out / "sites.parquet", sites)
    if found.exactness is not None:
        write_table(place.out / "exactness.parquet", found.exactness)
    site_rows = sites.to_pylist()
    drawn = {
        "faithfulness.png": sparsity_plot(rows), "steps.png": steps_plot(rows, site_rows), "blocks.png": blocks_plot(rows),
        "pictures.png": _sheet(place, splicings, shown),
    }  # fmt: skip
    files = [name for name, data in drawn.items() if data is not None]
    for name, data in drawn.items():
        if data is not None:
            write_bytes(place.out / name, data)
    exact_rows: list[dict[str, Any]] = [] if found.exactness is None else found.exactness.to_pylist()
    text = markdown("Faithfulness of dictionaries in the place of MLPs", facts, rows, site_rows, exact_rows, files)
    write_bytes(place.out / "faithfulness.md", text.encode())
    write_table(place.out / "faithfulness.parquet", found.summary)
    return found


def _sheet(place: Place, splicings: Sequence[Splicing], shown: Sequence[tuple[int, str]]) -> bytes | None:
    """A line for each of the first images: plain, as splicings of several sites draw it (or of one, where that is all there is), and where
    these differ.
    """
    images = [image for image, _ in shown]
    chosen = [splicing for splicing in splicings if splicing.every_step]
    chosen = ([splicing for splicing in chosen if splicing.scopes != ("site",)] or chosen)[:MOST_COLUMNS]
    names = [(PLAIN, PLAIN), *((splicing.file_name, _head(splicing, chosen)) for splicing in chosen)]
    columns = [place.pictures(name, images) for name, _ in names]
    if not images or not chosen or any(picture is None for picture in columns[0]):
        return None
    sheet = grid(
        [list(row) for row in zip(*columns, strict=True)],
        [f"{image}: {prompt}" for image, prompt in shown],
        [head for _, head in names],
        "Drawn with dictionaries in the place of MLPs",
        difference=True,
    )
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    return buffer.getvalue()


def _head(splicing: Splicing, among: Sequence[Splicing]) -> str:
    """What tells a splicing apart from the others of the sheet."""
    same = len({(other.sites, other.steps) for other in among}) == 1
    return splicing.group.label if same else f"{splicing.group.label}, {sites_text(splicing.sites)}"
