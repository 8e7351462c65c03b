"""`python notebooks/run.py OUT [NAME …]`: run the notebooks and write them, with what they show, into a folder.

One kernel runs them all, one after the other, each with no name known: torch is imported once.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
SECONDS_A_CELL = 3600


def run(out: Path, names: list[str]) -> None:
    """Run the notebooks of these names (all: none) into `out`; stops at the first cell that fails."""
    paths = [HERE / f"{name}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb"))
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        there = ", ".join(path.stem for path in sorted(HERE.glob("*.ipynb")))
        raise SystemExit(f"there is no notebook {missing[0]}; there are {there}")
    out.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        nbformat.v4.new_notebook(),
        timeout=SECONDS_A_CELL,
        resources={"metadata": {"path": str(HERE)}},
        extra_arguments=["--HistoryManager.enabled=False"],
    )
    with client.setup_kernel():
        for path in paths:
            print(path.stem, flush=True)
            client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")])
            client.execute_cell(client.nb.cells[0], 0)
            client.nb = nbformat.read(path, as_version=4)
            client.reset_execution_trackers()
            try:
                for index, cell in enumerate(client.nb.cells):
                    client.execute_cell(cell, index)
            except CellExecutionError as error:
                raise SystemExit(f"{path.name}, cell {index}: {error}") from None
            (out / path.name).write_text(nbformat.writes(client.nb) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    run(Path(sys.argv[1]), sys.argv[2:])
