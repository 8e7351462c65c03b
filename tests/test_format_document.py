"""FORMAT.md and the code say the same."""

import dataclasses
import re
from pathlib import Path

import pytest

from store import layout, split
from store.format import CARRIERS, FORMAT_VERSION, StoreMeta, array_path, chunk_file, part_files, tokens_path
from store.sites import POINTS, Site
from tests.small_store import small_meta

DOCUMENT = (Path(__file__).parent.parent / "store" / "FORMAT.md").read_text()


def table_under(title: str) -> list[list[str]]:
    """The cells of the tables below a heading, code quotes removed, header rows and rules left out."""
    section = DOCUMENT.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("`", "") for cell in row] for row in rows]
    heads = {i for i, row in enumerate(cells[1:]) if set("".join(row)) == {"-"}}
    return [row for i, row in enumerate(cells) if i not in heads and i - 1 not in heads]


def test_every_metadata_key_is_documented_and_none_is_invented() -> None:
    assert {row[0] for row in table_under("Metadata")} == {field.name for field in dataclasses.fields(StoreMeta)}


def test_the_version_and_points_are_those_of_the_code() -> None:
    assert f"format version {FORMAT_VERSION}" in DOCUMENT.splitlines()[0]
    rows = {row[0]: row[1] for row in table_under("Metadata")}
    assert rows["points"] == ", ".join(POINTS)
    assert rows["format_version"] == str(FORMAT_VERSION)


@pytest.mark.parametrize("dtype", list(CARRIERS))
def test_carriers_are_documented(dtype: str) -> None:
    (row,) = [row for row in table_under("Arrays") if row[0] == dtype]
    carrier = CARRIERS[dtype]  # type: ignore[index]
    assert row[1:] == [carrier.stored, dtype, str(carrier.fill)]


def test_paths_are_those_of_the_layout_table() -> None:
    paths = {row[0] for row in table_under("Layout")}
    assert array_path(Site.parse("img_6"), 2, "mlp_in") in paths
    assert tokens_path("img", 2) in paths
    assert {layout.ROOT, layout.CARD, layout.STORE_COMMIT, layout.part_commit(0), layout.SEAL} <= paths
    assert {"prompts/part-00000.parquet", "images/part-00000.parquet"} <= paths & set(part_files(small_meta(), 0))
    assert chunk_file(array_path(Site.parse("img_6"), 2, "mlp_in"), 12).endswith("/c.12.0.0")


def test_the_salt_and_the_share_of_the_split_are_documented() -> None:
    text = re.sub(r"\s+", " ", DOCUMENT)
    assert f"`{split.SALT}`" in text
    assert f"`{split.FLAG.pattern}`" in text
    assert f"below {split.VAL_SHARE:.0%}".replace("%", " %") in text
