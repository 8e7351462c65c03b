"""Where tests of bad input play: a store, its dictionaries and an OUT, that each test may damage."""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Place:
    """A folder with all three."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def dictionaries(self) -> Path:
        return self.folder / "dictionaries"

    @property
    def out(self) -> Path:
        return self.folder / "out"
