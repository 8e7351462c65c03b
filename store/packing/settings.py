"""The settings of `python -m store pack`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import tyro

from store.errors import UsageError
from store.sites import POINTS
from store.sizes import parse_size
from store.split import Split


@dataclass(frozen=True)
class PackSettings:
    """Shuffle one split of a store into shards that training reads in order."""

    store: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """the store to pack, a folder or a URL (s3://, hf://, https://)"""
    out: Path
    """folder of the pack"""
    sites: str = "all"
    """sites to pack, such as img_0-3,txt_6"""
    split: Split = "train"
    """train, or val for held-out prompts"""
    points: str = "all"
    """what to pack: all that the store has, mlp_in, mlp_out or both; mlp_out alone makes a pack for SAEs, of half the
    size. Of a store with recomputed targets mlp_in is packed, and the MLP of each site with it"""
    memory: str = "2GB"
    """bound on what is held at once (Python and its libraries come on top: about 150 MB a process, 180 MB a worker); shared by --workers,
    but of each worker with --scheduler. A site that fits is read and written once; a larger one goes through scratch files"""
    shard_mb: int = 256
    """greatest size of a shard in MB (10^6 bytes)"""
    seed: int = 0
    """decides the order of the rows"""
    scratch: Path | None = None
    """folder for scratch files, as large as the largest site where that does not fit into the memory; in --out by default"""
    workers: int = 1
    """processes of this machine that do the work; the bytes are the same for any number"""
    scheduler: str | None = None
    """tcp://HOST:PORT of a dask scheduler whose workers do the work; they must see the store, --out and --scratch under
    the same paths, and run this version of Granary"""
    plan: bool = False
    """print what would be read and written, and stop"""

    def __post_init__(self) -> None:
        odd = [point for point in self.points.split(",") if point not in POINTS and self.points != "all"]
        if odd:
            raise UsageError(f"--points {self.points!r}: {odd[0]!r} is no point; there are {', '.join(POINTS)}")
        if self.split not in get_args(Split):
            raise UsageError(f"--split {self.split!r} is not one of {', '.join(get_args(Split))}")
        if self.shard_mb < 1:
            raise UsageError(f"--shard-mb {self.shard_mb} must be at least 1")
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers} must be at least 1")
        if self.scheduler is not None and self.workers != 1:
            raise UsageError(
                "--workers starts processes on this machine, --scheduler uses those of a cluster: give one of them"
            )
        if self.scheduler is not None and "://" not in self.scheduler:
            raise UsageError(f"--scheduler {self.scheduler!r} is no address: write tcp://HOST:PORT")
        parse_size(self.memory)
