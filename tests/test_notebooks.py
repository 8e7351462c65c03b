"""The notebooks: committed without outputs, run from the first cell to the last, and what they say is looked at."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.test_house import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
VARIANTS = {"case_colour_prior": 3, "case_concept_context": 3, "case_suppressor": 3, "case_temporal": 7}
TO_CHANGE = "for FLUX.1-schnell"


@pytest.fixture(scope="module")
def shown(traced_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """Of every notebook all that it printed and showed as text, and how many pictures it showed."""
    data = tmp_path_factory.mktemp("notebooks")
    (data / "store-val").symlink_to(traced_flux / "store")
    (data / "dictionaries").symlink_to(traced_flux / "dictionaries")
    words = [sys.executable, str(ROOT / "notebooks" / "run.py"), str(data / "out")]
    own = {"GRANARY_DEMO": str(data), "GRANARY_WORD": "small", "TMPDIR": str(data), "IPYTHONDIR": str(data / "ipython")}
    done = subprocess.run(words, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.stem: _outputs(path) for path in (data / "out").glob("*.ipynb")}


def _outputs(path: Path) -> tuple[str, int]:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    text = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(text), sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_notebook_stands_in_the_list() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted([*VARIANTS, "walkthrough"])
    listed = (ROOT / "notebooks" / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"[{path.name}]({path.name})" in listed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_has_one_line_to_change(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    lines = [line for cell in code for line in cell.source.splitlines() if TO_CHANGE in line]
    assert len(lines) == 1
    assert lines[0].startswith("DATA = ")


def test_the_walkthrough_opens_scores_traces_and_steers(shown: dict[str, tuple[str, int]]) -> None:
    text, pictures = shown["walkthrough"]
    assert pictures == 3
    assert "3 images of tiny-flux, steps (0, 1, 2, 3)" in text
    conservation = re.search(r"conservation (\S+) of", text)
    assert conservation is not None
    assert float(conservation[1]) < 1e-12
    psnr = [float(found) for found in re.findall(r"psnr (\S+)", text)]
    assert len(psnr) == 3
    assert all(10 < value < 90 for value in psnr)  # every intervention changed the pictures
    assert "48 passes through the transformer" in text


@pytest.mark.parametrize("name", VARIANTS)
def test_a_case_study_draws_each_of_its_interventions(shown: dict[str, tuple[str, int]], name: str) -> None:
    text, pictures = shown[name]
    assert pictures == 1
    assert "2 of 3 prompts say small" in text
    psnr = [float(found) for found in re.findall(r"psnr (\S+)", text)]
    assert len(psnr) == VARIANTS[name]
    assert all(2 < value < 90 for value in psnr)
    if name == "case_temporal":
        shares = re.findall(r"step (\d): (\d+) % image, (\d+) % text", text)
        assert [step for step, _, _ in shares] == ["1", "3"]
        assert all(99 <= int(img) + int(txt) <= 101 for _, img, txt in shares)
    else:
        assert re.search(r"(txt|img)_[0-2]:\d+", text)
