"""The folder that a report is written into: what is written is remembered, and what an earlier report left is removed at the end."""

import re
from pathlib import Path
from typing import Any

from analyze.report.packing import script_bytes
from store.errors import UsageError
from store.files import is_temporary, write_bytes

INDEX = "index.html"
OURS = re.compile(
    r"data/.+\.js|pictures/\d+/\d+\.webp|pictures/.+/step\d+-feature\d+\.webp|pictures/steering/[^/]+/[^/]+\.(webp|png)|"
    r"(libraries|static)/[^/]+|report\.(css|js)|graphs?\.(css|html)|steering\.(css|html)"
)
"""what reports call their files, those of earlier versions too; files of other names are not ours"""


BEGUN = {"data", "libraries", "pictures", "static", "graph.css", "graphs.html", "steering.css", "steering.html"}
"""what lies in the folder of a report that was interrupted; `report.css` is in every other one"""


class ReportFolder:
    """Writes the files of one report; `index.html` is taken away at the start and comes last, so what opens is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: dict[str, int] = {}
        """bytes of each file, by its name in the folder"""
        _refuse_foreign(path)
        (path / INDEX).unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a file.  Not synced one by one: of a folder without `index.html` everything is written again."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.written[name] = len(data)

    def script(self, name: str, value: Any) -> None:
        """Write `data/NAME.js`, a script that hands over the value."""
        self.write(f"data/{name}.js", script_bytes(name, value))

    def finish(self, index: bytes) -> None:
        """Remove what earlier reports left, and publish `index.html`."""
        self.sweep()
        write_bytes(self.path / INDEX, index)
        self.written[INDEX] = len(index)

    def sweep(self) -> None:
        """Remove what earlier reports left and this one did not write."""
        for path in sorted(self.path.rglob("*"), reverse=True):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in self.written and OURS.fullmatch(name):
                path.unlink()
                for parent in path.parents:
                    if parent == self.path or any(parent.iterdir()):
                        break
                    parent.rmdir()


def _refuse_foreign(path: Path) -> None:
    """`UsageError` for a file, and for a folder that holds something and no report of ours, whole or begun."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, and the report is a folder: move it away, or choose another --out")
    names = {each.name for each in path.iterdir() if not is_temporary(each)} if path.exists() else set()
    if names - BEGUN and "report.css" not in names:
        raise UsageError(
            f"{path} holds other files ({min(names - BEGUN)}) and no report of ours: move them away, or choose another --out"
        )
