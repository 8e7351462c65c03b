"""The dependency table of the house holds: who imports whom, and that the packages are those of this checkout."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("store", "harvest", "train", "analyze")
MAY_IMPORT = {
    "store": set(),
    "harvest": {"store"},
    "train": {"store"},
    "analyze": {"store", "train"},
}
NEVER = {
    "store": {"torch", "diffusers", "transformers"},
    "harvest": set(),
    "train": {"diffusers"},
    "analyze": {"diffusers"},
}
RUN_THE_MODEL = ("steering", "guided", "responsive", "faithfulness", "validation", "explore")
"""rooms of `analyze` that run the model again, and so may import `harvest`"""
LONGEST_FILE = 400


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(file: Path) -> set[str]:
    """The top-level names that a file imports, lazily or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides where a thing comes from"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", OURS)
def test_a_package_imports_only_what_the_table_allows(package: str) -> None:
    for file in files_of(package):
        found = imports_of(file)
        runs_the_model = package == "analyze" and file.parent.name in RUN_THE_MODEL
        allowed = MAY_IMPORT[package] | {package} | ({"harvest"} if runs_the_model else set())
        assert not (found & set(OURS)) - allowed, file
        assert not found & NEVER[package], file


@pytest.mark.parametrize("package", OURS)
def test_the_package_imported_is_the_one_of_this_checkout(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).is_relative_to(ROOT)


def test_no_file_of_ours_grew_past_its_purpose() -> None:
    lengths = {file: len(file.read_text().splitlines()) for package in OURS for file in files_of(package)}
    assert not {file: n for file, n in lengths.items() if n > LONGEST_FILE}


def test_nothing_is_called_utils() -> None:
    names = {file.stem for package in OURS for file in files_of(package)} | {
        folder.name for package in OURS for folder in (ROOT / package).rglob("*") if folder.is_dir()
    }
    assert not names & {"utils", "helpers", "common", "misc", "util", "helper"}


@pytest.mark.parametrize("package", OURS)
def test_the_readme_has_a_line_for_every_file(package: str) -> None:
    section = (ROOT / "README.md").read_text().split(f"| `{package}/` |", 1)[1].split("\n\n", 1)[0]
    for file in files_of(package):
        if not file.name.startswith("__"):
            assert section.count(f"`{file.name}`") == len(list((ROOT / package).rglob(file.name))), file
