"""Our training against sae-lens, dictionary-learning and eai-sparsify: same machine, same rows, same sizes.

1. Rows a second of each trainer's loader alone, its step alone, and both, for TopK and for ReLU with L1, float32 and bfloat16.
2. What each has learned after one minute, judged by our evaluator on held-out rows: FVU, L0, dead features.  The learning rate is
   the best of three that each tries for a quarter of a minute before.

The rows are planted (`bench.planted`).  Peers have them in RAM as float32; ours reads its pack.  Every trainer runs alone in a
process of its own, with the same number of threads.  Fewest operations: 12 * d_model * n_features a row for the dense step.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from bench.peer import Answer, Task
from bench.planted import SITE, packs_of, planted_store
from store.shards import Pack
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import build
from train.results.evaluate import evaluate
from train.rows.means import TrainingMeans

ROOT = Path(__file__).parent.parent
PEERS = {
    "ours": "bench.peer_ours",
    "sae-lens": "bench.peer_saelens",
    "dictionary-learning": "bench.peer_dictionary_learning",
    "eai-sparsify": "bench.peer_sparsify",
}
D_MODEL, FEATURES, BATCH, ROWS = 512, 8192, 4096, 139_264
K, SECONDS = 32, 3.0
MINUTE, MINUTE_BATCH = 60.0, 1024
L1 = {"ours": 3e-4, "sae-lens": 0.05, "dictionary-learning": 0.05, "eai-sparsify": 0.0}
"""any that keeps most features on or off as usual: speed does not depend on it"""
RATES = {"eai-sparsify": (2e-3, 5e-3, 1e-2)}
ADAM = (3e-4, 1e-3, 3e-3)
"""learning rates that a trainer may choose from for its minute, by a trial of `TRIAL` seconds; signum's lie about its own rule, 7e-3"""
TRIAL = 15.0


@dataclass(frozen=True)
class Speed:
    """How fast one trainer is at one kind of step."""

    trainer: str
    step: str
    answer: Answer


@dataclass(frozen=True)
class Learned:
    """How good one trainer's dictionary is after a minute."""

    trainer: str
    precision: str
    answer: Answer
    lr: float | None = None
    fvu: float | None = None
    l0: float | None = None
    dead: float | None = None


class Comparison:
    """The rows, and what each trainer made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        store = planted_store(folder / "store", ROWS, D_MODEL, points=("mlp_out",))
        self.pack, self.val = packs_of(store, folder)
        self.rows = folder / "rows.npy"
        columns = [shard.columns("mlp_out")["mlp_out"].astype(np.float32) for shard in self.pack.shards(SITE)]
        np.save(self.rows, np.concatenate(columns))

    def task(self, **changes: Any) -> Task:
        plain = Task(
            str(self.rows), str(self.pack.path), "topk", FEATURES, K, 0.0, BATCH, 1e-3, False, threads(), SECONDS
        )
        return replace(plain, **changes)

    def speeds(self) -> list[Speed]:
        """Every trainer at every kind of step."""
        found = []
        for activation in ("topk", "relu"):
            for bfloat16 in (False, True):
                for trainer in PEERS:
                    l1 = L1[trainer] if activation == "relu" else 0.0
                    given = ask(trainer, self.task(activation=activation, bfloat16=bfloat16, l1=l1))
                    found.append(Speed(trainer, f"{activation}, {precision(bfloat16)}", given))
                    print(speed_line(found[-1]), flush=True)
        return found

    def learned(self) -> list[Learned]:
        """Every trainer after a minute of TopK, in the fastest precision that it has here and at the best of its rates."""
        found = []
        for trainer in PEERS:
            trials = [self.best_precision(trainer, lr) for lr in RATES.get(trainer, ADAM)]
            able = [trial for trial in trials if trial.fvu is not None]
            line = min(able, key=lambda trial: trial.fvu or 0.0) if able else trials[0]
            if able:
                print("  trials: " + ", ".join(f"{trial.lr:g} {trial.fvu:.4f}" for trial in able), flush=True)
                line = self.taught(trainer, line.precision == "bfloat16", line.lr or 0.0, MINUTE)
            found.append(line)
            print(learned_line(line), flush=True)
        return found

    def best_precision(self, trainer: str, lr: float) -> Learned:
        """A trial in bfloat16, or in float32 where the trainer has no other."""
        line = self.taught(trainer, True, lr, TRIAL)
        return line if line.answer.why_not is None else self.taught(trainer, False, lr, TRIAL)

    def taught(self, trainer: str, bfloat16: bool, lr: float, seconds: float) -> Learned:
        """What a trainer's dictionary is worth after so many seconds."""
        weights = self.folder / f"{trainer}.safetensors"
        task = self.task(bfloat16=bfloat16, batch=MINUTE_BATCH, seconds=seconds, weights=str(weights), lr=lr)
        line = Learned(trainer, precision(bfloat16), ask(trainer, task), lr)
        return line if line.answer.why_not is not None else replace(line, **judged(weights, self.pack, self.val))


def judged(weights: Path, pack: Pack, val: Pack) -> dict[str, float]:
    """FVU, L0 and the share of dead features of an SAE on held-out rows, by `train.results.evaluate`."""
    config = DictionaryConfig("sae", SITE, D_MODEL, FEATURES, activation="topk", k=K, family="flux-sae")
    dictionary = build(config)
    dictionary.load_state_dict(safetensors.torch.load_file(weights))
    dictionary.eval().requires_grad_(False)
    (figures,) = evaluate([dictionary], {"mlp_out": TrainingMeans(pack, SITE, "mlp_out")}, val)
    return {name: float(figures[name]) for name in ("fvu", "l0", "dead")}


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


def threads() -> int:
    return len(os.sched_getaffinity(0))


def precision(bfloat16: bool) -> str:
    return "bfloat16" if bfloat16 else "float32"


def speed_line(found: Speed) -> str:
    """One line of the first table."""
    head = f"{found.step:<16} {found.trainer:<20}"
    if found.answer.why_not is not None:
        return f"{head} not measured: {found.answer.why_not}"
    rates = found.answer.rates
    tera = 12 * D_MODEL * FEATURES * rates["step"] / 1e12
    return f"{head} {rates['loader']:>12,.0f} {rates['step']:>12,.0f} {rates['both']:>12,.0f}   {tera:>6.2f}"


SPEED_HEAD = f"{'step':<16} {'trainer':<20} {'loader':>12} {'step':>12} {'both':>12}   dense TFLOP/s"


def learned_line(found: Learned) -> str:
    """One line of the second table."""
    head = f"{found.trainer:<20} {found.precision:<10} {found.lr or 0:>6g}"
    if found.answer.why_not is not None:
        return f"{head} not measured: {found.answer.why_not}"
    rows = found.answer.steps * MINUTE_BATCH
    return f"{head} {found.answer.steps:>8,} {rows:>12,} {found.fvu:>10.4f} {found.l0:>8.1f} {100 * (found.dead or 0):>8.1f}"


LEARNED_HEAD = (
    f"{'trainer':<20} {'precision':<10} {'rate':>6} {'steps':>8} {'rows':>12} {'FVU':>10} {'L0':>8} {'dead %':>8}"
)


def ratios(speeds: list[Speed]) -> list[str]:
    """Ours against the best of the others at each kind of step."""
    lines = []
    for step in dict.fromkeys(speed.step for speed in speeds):
        there = {speed.trainer: speed.answer.rates for speed in speeds if speed.step == step and speed.answer.rates}
        mine = there.pop("ours", None)
        if mine is None or not there:
            continue
        best = {name: max((rates[name], trainer) for trainer, rates in there.items()) for name in mine}
        lines.append(
            f"{step:<16} ours over the best of them: "
            + ", ".join(f"{name} {mine[name] / rate:.2f} ({trainer})" for name, (rate, trainer) in best.items())
        )
    return lines


def run() -> dict[str, Any]:
    """Measure all, print both tables, and return them."""
    with tempfile.TemporaryDirectory() as name:
        comparison = Comparison(Path(name))
        print(f"rows/s, d_model {D_MODEL}, {FEATURES} features, batch {BATCH}, {threads()} threads\n{SPEED_HEAD}")
        speeds = comparison.speeds()
        print("\n".join(ratios(speeds)))
        print(
            f"\nafter {MINUTE:.0f} s of TopK {K}, batch {MINUTE_BATCH}, on {len(np.load(comparison.rows, 'r')):,} rows"
        )
        print(LEARNED_HEAD)
        learned = comparison.learned()
    return {"speeds": [asdict(line) for line in speeds], "learned": [asdict(line) for line in learned]}


if __name__ == "__main__":
    run()
