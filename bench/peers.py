"""The trainers that we compare with, and how each is asked: in a process of its own, on the same rows."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.groups import ROOT
from bench.peer import Answer, Task
from bench.planted import SITE, packs_of, planted_store
from bench.timing import cores

PEERS = {
    "ours": "bench.peer_ours",
    "sae-lens": "bench.peer_saelens",
    "dictionary-learning": "bench.peer_dictionary_learning",
    "eai-sparsify": "bench.peer_sparsify",
}
K = 32
L1 = {"ours": 3e-4, "sae-lens": 0.05, "dictionary-learning": 0.05, "eai-sparsify": 0.0}
"""any that keeps most features on or off as usual: speed does not depend on it"""


@dataclass(frozen=True)
class Amount:
    """How much every trainer is given."""

    d_model: int
    features: int
    batch: int
    rows: int
    seconds: float
    """a measurement"""


class Rows:
    """The rows that all trainers learn from: a pack for ours, float32 in one file for the others."""

    def __init__(self, folder: Path, amount: Amount) -> None:
        self.amount = amount
        store = planted_store(folder / "store", amount.rows, amount.d_model, points=("mlp_out",))
        self.pack, self.val = packs_of(store, folder)
        self.rows = folder / "rows.npy"
        columns = [shard.columns("mlp_out")["mlp_out"].astype(np.float32) for shard in self.pack.shards(SITE)]
        np.save(self.rows, np.concatenate(columns))

    def task(self, **changes: Any) -> Task:
        """What a trainer is to do with them: TopK in float32 unless `changes` say otherwise."""
        of = self.amount
        plain = Task(
            str(self.rows), str(self.pack.path), "topk", of.features, K, 0.0, of.batch, 1e-3, False, cores(), of.seconds
        )
        return replace(plain, **changes)


def ask(trainer: str, task: Task) -> Answer:
    """What a trainer answers to a task, in a process of its own."""
    words = [sys.executable, "-W", "ignore", "-m", PEERS[trainer], json.dumps(asdict(task))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=task.seconds * 20 + 300
    )
    try:
        return Answer(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return Answer(why_not=f"ended with {done.returncode}: {done.stderr.strip()[-160:]}")
