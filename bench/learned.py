"""`python -m bench.learned`: what each trainer has learned after one minute of TopK, judged by our evaluator on held-out rows.

FVU, L0, dead features.  The learning rate is the best of three that each tries for a quarter of a minute before.  Rows are planted
(`bench.planted`); every trainer runs alone in a process of its own, in the fastest precision that it has on this machine.
About eight minutes; kept in build/bench-learned.json.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch

from bench.groups import TRAIN_PEERS
from bench.machine import this_machine
from bench.peer import Answer
from bench.peers import PEERS, Amount, K, Rows, ask
from bench.planted import SITE
from store.command import Command, program
from store.errors import UsageError
from store.files import write_json
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import build
from train.results.evaluate import evaluate
from train.rows.means import TrainingMeans

AMOUNT = Amount(512, 8192, 1024, 139_264, 60.0)
RATES = {"eai-sparsify": (2e-3, 5e-3, 1e-2)}
ADAM = (3e-4, 1e-3, 3e-3)
"""learning rates that a trainer may choose from for its minute, by a trial of `TRIAL` seconds; signum's lie about its own rule, 7e-3"""
TRIAL = 15.0
HEAD = f"{'trainer':<20} {'precision':<10} {'rate':>6} {'steps':>8} {'rows':>12} {'FVU':>10} {'L0':>8} {'dead %':>8}"


@dataclass(frozen=True)
class LearnedSettings:
    """Let every trainer learn for a minute, and judge what it learned."""

    out: Path = Path("build/bench-learned.json")
    """where the figures are kept"""

    def __post_init__(self) -> None:
        if (missing := TRAIN_PEERS.missing()) is not None:
            raise UsageError(f"left to compare with: nobody. {missing}")


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

    def text(self) -> str:
        """One line of the table."""
        head = f"{self.trainer:<20} {self.precision:<10} {self.lr or 0:>6g}"
        if self.answer.why_not is not None:
            return f"{head} not measured: {self.answer.why_not}"
        rows = self.answer.steps * AMOUNT.batch
        return f"{head} {self.answer.steps:>8,} {rows:>12,} {self.fvu:>10.4f} {self.l0:>8.1f} {100 * (self.dead or 0):>8.1f}"


def run(settings: LearnedSettings) -> list[Learned]:
    """Print a line a trainer, and keep the figures."""
    machine, found = this_machine(Path(tempfile.gettempdir())), []
    print(f"{machine.text()}\nafter {AMOUNT.seconds:.0f} s of TopK {K}, batch {AMOUNT.batch}\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        rows = Rows(Path(name), AMOUNT)
        for trainer in PEERS:
            found.append(best_minute(trainer, rows))
            print(found[-1].text(), flush=True)
            write_json(settings.out, {"machine": asdict(machine), "learned": [asdict(line) for line in found]})
    print(f"kept in {settings.out}")
    return found


def best_minute(trainer: str, rows: Rows) -> Learned:
    """A minute at the best of the trainer's rates; the trial that failed where all did."""
    trials = [_best_precision(trainer, lr, rows) for lr in RATES.get(trainer, ADAM)]
    able = [trial for trial in trials if trial.fvu is not None]
    if not able:
        return trials[0]
    line = min(able, key=lambda trial: trial.fvu or 0.0)
    return taught(trainer, line.precision == "bfloat16", line.lr or 0.0, AMOUNT.seconds, rows)


def _best_precision(trainer: str, lr: float, rows: Rows) -> Learned:
    """A trial in bfloat16, or in float32 where the trainer has no other."""
    line = taught(trainer, True, lr, TRIAL, rows)
    return line if line.answer.why_not is None else taught(trainer, False, lr, TRIAL, rows)


def taught(trainer: str, bfloat16: bool, lr: float, seconds: float, rows: Rows) -> Learned:
    """What a trainer's dictionary is worth after so many seconds."""
    weights = rows.rows.with_name(f"{trainer}.safetensors")
    task = rows.task(bfloat16=bfloat16, seconds=seconds, weights=str(weights), lr=lr)
    line = Learned(trainer, "bfloat16" if bfloat16 else "float32", ask(trainer, task), lr)
    return line if line.answer.why_not is not None else replace(line, **judged(weights, rows))


def judged(weights: Path, rows: Rows) -> dict[str, Any]:
    """FVU, L0 and the share of dead features of an SAE on held-out rows, by `train.results.evaluate`."""
    of = rows.amount
    config = DictionaryConfig("sae", SITE, of.d_model, of.features, activation="topk", k=K, family="flux-sae")
    dictionary = build(config)
    dictionary.load_state_dict(safetensors.torch.load_file(weights))
    dictionary.eval().requires_grad_(False)
    (figures,) = evaluate([dictionary], {"mlp_out": TrainingMeans(rows.pack, SITE, "mlp_out")}, rows.val)
    return {name: float(figures[name]) for name in ("fvu", "l0", "dead")}


COMMANDS = {"run": Command(LearnedSettings, run, "Let every trainer learn for a minute, and judge what it learned.")}

if __name__ == "__main__":
    sys.exit(program("bench.learned", COMMANDS, default="run"))
