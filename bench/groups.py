"""The groups of the table, in the order in which the data goes through Granary."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.lines import Line, Size
from store.errors import UsageError

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Peers:
    """Programs that we compare with and do not depend on."""

    names: str
    folder: str
    """where they are installed, below the checkout"""

    @property
    def installed(self) -> Path:
        """The file that says that they are there; `make` it and they are."""
        return ROOT / self.folder / "installed"

    def missing(self) -> str | None:
        """How to get them, in one line; None where they are there."""
        return (
            None
            if self.installed.exists()
            else f"{self.names}: not installed; `make {self.folder}/installed` gets them"
        )


STORE_PEERS = Peers("tensorstore", ".bench-peers")
TRAIN_PEERS = Peers("sae-lens, dictionary-learning and eai-sparsify", ".bench-peers/train")


@dataclass(frozen=True)
class Group:
    """Lines that belong together."""

    module: str
    """its `lines(size)` gives them, each as it is measured"""
    about: str
    disk: float
    """gigabytes below the temporary folder at the most, with the sizes quick and full"""
    usual: bool = True
    """in the table when nothing is said"""
    peers: Peers | None = None

    def lines(self, size: Size) -> Iterator[Line]:
        """Measure, line by line; the modules are imported here, for each needs others."""
        found: Iterator[Line] = importlib.import_module(f"bench.{self.module}").lines(size)
        yield from found


GROUPS = {
    "harvest": Group("harvest_overhead", "a harvest against plain generation of the same pictures", 1),
    "store": Group(
        "store_io", "a part written, read and verified, against raw files and other libraries", 3, peers=STORE_PEERS
    ),
    "pack": Group("pack_copy", "a store packed, against a copy of its bytes, both cold", 4),
    "loader": Group("loader", "batches from a pack, against a memory map", 2),
    "step": Group("train_step", "training steps on rows in RAM, against plain loops", 1),
    "trainers": Group("trainers", "loader and step together, against three other trainers", 2, peers=TRAIN_PEERS),
    "shared": Group("shared_read", "eight lambdas on one read, against eight trainings", 2, usual=False),
    "scores": Group("scores", "score matrices from a store, against a plain pass in RAM", 1),
    "features": Group("features", "statistics and top images, against loops over features", 1),
    "coherence": Group("coherence", "coherence of top images, against loops over features", 1),
    "circuits": Group("circuits", "edges of attribution graphs, against the whole model per node", 1),
}
USUAL = ",".join(name for name, group in GROUPS.items() if group.usual)


def chosen(only: str) -> list[str]:
    """The names in `--only`, in the order of the table; `UsageError` for one that is none."""
    names = [name.strip() for name in only.split(",")]
    if odd := [name for name in names if name not in GROUPS]:
        raise UsageError(f"--only {only!r}: there is no group {odd[0]!r}; there are {', '.join(GROUPS)}")
    return [name for name in GROUPS if name in names]
