"""Our training against sae-lens, dictionary-learning and eai-sparsify: same machine, same rows, same sizes; seconds a batch.

Rows are planted (`bench.planted`).  Peers have them in RAM as float32; ours reads its pack from the page cache.  Each trainer takes
its own batches and steps on them, alone in a process of its own with the same number of threads.  With the size `full` loader and
step are timed apart too.  What each has learned after a minute: `python -m bench.learned`.

Least work: as `bench.train_step` counts it, without a sigma.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.groups import TRAIN_PEERS
from bench.lines import Line, Need, Peer, Size
from bench.peer import Answer
from bench.peers import L1, PEERS, Amount, K, Rows, ask
from bench.train_step import least_work

Step = tuple[str, bool]
"""topk or relu, and whether under bfloat16 autocast"""


@dataclass(frozen=True)
class Sizes:
    """How much is trained, and how often it is measured."""

    amount: Amount
    steps: tuple[Step, ...]
    repeats: int


TOPK: tuple[Step, ...] = (("topk", False), ("topk", True))
SIZES = {
    "tiny": Sizes(Amount(64, 128, 64, 4096, 0.1), TOPK[:1], 1),
    "quick": Sizes(Amount(512, 8192, 2048, 69_632, 2.0), TOPK, 3),
    "full": Sizes(Amount(512, 8192, 4096, 139_264, 3.0), (*TOPK, ("relu", False), ("relu", True)), 3),
}


def lines(size: Size) -> Iterator[Line]:
    """Every trainer at every kind of step; one that cannot do it is named in the note."""
    sizes = SIZES[size]
    there = [name for name in PEERS if name == "ours" or TRAIN_PEERS.missing() is None]
    with tempfile.TemporaryDirectory() as name:
        rows = Rows(Path(name), sizes.amount)
        for activation, bfloat16 in sizes.steps:
            found: dict[str, Answer] = {}
            for trainer in there:
                l1 = L1[trainer] if activation == "relu" else 0.0
                how = {"activation": activation, "bfloat16": bfloat16, "l1": l1}
                found[trainer] = ask(trainer, rows.task(**how, repeats=sizes.repeats, apart=size == "full"))
            yield line(sizes.amount, activation, bfloat16, found)


def line(amount: Amount, activation: str, bfloat16: bool, found: dict[str, Answer]) -> Line:
    """Ours beside those that could do it."""
    why_not = {name: answer.why_not for name, answer in found.items() if answer.why_not is not None}
    if "ours" in why_not:
        raise RuntimeError(f"our own trainer failed: {why_not['ours']}")
    times = {
        name: tuple(amount.batch / rate for rate in answer.both)
        for name, answer in found.items()
        if name not in why_not
    }  # fmt: skip
    notes = [f"{name} left out: {reason}" for name, reason in why_not.items()]
    for name, answer in found.items():
        if answer.rates:
            notes.append(
                f"{name} loader {answer.rates['loader'] / 1e3:,.0f}, step {answer.rates['step'] / 1e3:,.1f} k rows/s"
            )
    precision = "bfloat16" if bfloat16 else "float32"
    kind = f"TopK {K}" if activation == "topk" else "ReLU, L1"
    operations = amount.batch * least_work(amount.d_model, amount.features, K if activation == "topk" else None, False)
    needs = (Need("bfloat16" if bfloat16 else "float32", operations),)
    what = f"{kind}, {amount.features:,} features, {precision}"
    peers = tuple(Peer(name, seconds) for name, seconds in times.items() if name != "ours")
    return Line(what, times["ours"], peers, needs, "; ".join(notes))
