"""The run record of one model's training beside its dictionary: `OUT.runs/NAME/log.jsonl`, and events for TensorBoard.

The lines are those of the dictionary's own `log.jsonl`, with the time and the rows a second, on which no byte of a dictionary
may depend.  A training that goes on after a kill begins at its last checkpoint and takes some steps again; what the killed
run wrote of these is taken out of `log.jsonl`, and TensorBoard is told to leave it out (`purge_step`).  To look:

    tensorboard --logdir OUT.runs
"""

import json
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from store.files import write_bytes
from store.strata import Group
from train.dictionaries.checkpoint import LOG, LogLine

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SCALARS = ("loss", "residual", "sparsity", "auxiliary", "l0", "lr", "dead", "resampled", "rows_per_second")
FIGURES = ("fvu", "cosine", "l0", "density", "dead")
FLUSH_SECONDS = 10


class Logs:
    """The run record of one model; nothing is written before the first line."""

    def __init__(self, folder: Path, name: str) -> None:
        """`folder` is `OUT.runs`, `name` the model's folder below OUT."""
        self.folder = folder / name
        self._writer: SummaryWriter | None = None

    def line(self, line: LogLine, rows_per_second: float) -> None:
        """Add a line; the first one takes out all lines of its step and of later ones.  The rate is 0 where it is not known yet."""
        step = int(line["step"])
        if self._writer is None:
            self._go_back_to(step)
            self._writer = self._open(step)
        rate = {"rows_per_second": round(rows_per_second, 1)} if rows_per_second else {}
        record = {**line, **rate, "time": round(time.time(), 3)}
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
        for key in SCALARS:
            if key in record:
                self._writer.add_scalar(f"training/{key}", record[key], step)

    def figures(self, metrics: Mapping[str, Any], steps: int) -> None:
        """Add the figures on held-out rows, at the number of steps taken, and how dense the features are."""
        if self._writer is None:
            self._writer = self._open(steps)
        for group in get_args(Group):
            found = metrics if group == "all" else metrics.get(group)
            if not found:
                continue
            place = "held-out" if group == "all" else f"held-out {group}"
            for key in FIGURES:
                if found.get(key) is not None:
                    self._writer.add_scalar(f"{place}/{key}", found[key], steps)
            if any(found["density_histogram"]["counts"]):
                self._histogram(f"{place}/log10 density", found["density_histogram"], metrics, steps)

    def close(self) -> None:
        """Put everything on the disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # a third of a second, and only those who train need it

        return SummaryWriter(str(self.folder), purge_step=step, flush_secs=FLUSH_SECONDS)

    def _go_back_to(self, step: int) -> None:
        """Take out of the file what a killed run wrote of `step` and later ones, and a line that it did not finish."""
        path = self.folder / LOG
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
                if line.endswith(b"\n") and record["step"] < step:
                    kept.append(line)
            except (ValueError, LookupError, TypeError):  # torn by a kill
                continue
        write_bytes(path, b"".join(kept))

    def _histogram(self, tag: str, histogram: Mapping[str, Any], metrics: Mapping[str, Any], steps: int) -> None:
        """Features that are ever active, by the logarithm of their density; each counted in the middle of its bin."""
        edges, counts = metrics["density_log10_edges"], histogram["counts"]
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        filled = [place for place, count in enumerate(counts) if count]
        assert self._writer is not None
        self._writer.add_histogram_raw(
            tag, min=edges[filled[0]], max=edges[filled[-1] + 1], num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:], bucket_counts=counts, global_step=steps,
        )  # fmt: skip
