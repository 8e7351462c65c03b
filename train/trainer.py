"""Trains dictionaries from a pack by the recipe of record, one site after the other.

Every step: a batch of rows, the loss of record, AdamW without weight decay, decoder columns back to
unit norm.  The gradient is not projected.  A killed run goes on from its last state and ends with the
same bits on a CPU, because batches, learning rate and L1 weight are functions of the step alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from store.errors import MismatchError, NonFiniteError, UsageError
from store.shards import Pack, open_pack
from store.sites import Site, choose_sites
from train.checkpoint import (
    CONFIG,
    COVERED,
    RESUME,
    LogLine,
    Progress,
    frozen,
    load_dictionary,
    load_progress,
    read_config,
    refuse_other,
    save_dictionary,
    save_progress,
)
from train.config import DictionaryConfig, Parent
from train.dictionary import Dictionary, build
from train.evaluate import check_packs, check_sigmas, check_site, evaluate
from train.loader import Batch, Loader
from train.loss import Loss, loss_of_record
from train.means import TrainingMeans
from train.recompute import PackPoints
from train.settings import TrainSettings

RECORD_ROWS, RECORD_PERIOD = 1_000_000, 256


def run(settings: TrainSettings) -> list[Dictionary]:
    """The trained dictionaries of all sites, saved below `settings.out`; what can be refused is refused first."""
    pack = open_pack(settings.pack)
    if pack.split != "train":
        raise UsageError(f"--pack {pack.path} is of the split {pack.split!r}, which is held out: pack --split train")
    val = None if settings.val is None else open_pack(settings.val)
    sites = choose_sites(settings.sites, pack.sites, str(pack.path))
    if val is not None:
        check_packs(pack, val)
    for found in (pack, val):
        if found is not None and found.recomputed:
            print(f"{found.path}: targets are recomputed, mlp_out = MLP(mlp_in) in float32, by the MLPs in the pack")
    with thread_count(settings.threads):
        jobs = [Job(settings, pack, site, val) for site in sites]
        if val is None:
            print("no --val pack: the dictionaries are not measured, and their metrics.json says null")
        dictionaries = [job.run() for job in jobs]
    print(table(dictionaries))
    return dictionaries


class Job:
    """The training of one dictionary."""

    def __init__(self, settings: TrainSettings, pack: Pack, site: Site, val: Pack | None) -> None:
        self.settings, self.pack, self.val = settings, pack, val
        self.config = config_of(settings, pack, site)
        self.folder = settings.out / self.config.name
        check_site(pack, site, self.config)
        if val is not None:
            check_site(val, site, self.config)
            check_sigmas(pack, val, site)
            PackPoints(val, site, self.config.input_point, self.config.target_point)  # looks for its MLP
        self.means = TrainingMeans(pack, site, self.config.target_point)
        self.loader = Loader(
            pack, site, self.config.input_point, self.config.target_point, settings.batch, settings.seed
        )
        self.steps = settings.epochs * len(self.loader)
        if settings.rows is not None:
            self.steps = min(self.steps, -(-settings.rows // settings.batch))
        self.l1, self.in_bfloat16 = settings.l1_of(site), settings.in_bfloat16
        self.finished = self._finished()

    def _finished(self) -> bool:
        """Whether the same training ended already; `UsageError` when another one lies there."""
        if (self.folder / CONFIG).exists():
            refuse_other(self.folder, read_config(self.folder), self.config)
            measured = (load_dictionary(self.folder).metrics or {}).get("pack")
            if self.val is not None and measured != self.val.id:
                kind = UsageError if measured is None else MismatchError
                raise kind(
                    f"{self.folder} is complete and was measured on {measured or 'no pack'}, not on {self.val.path} "
                    f"({self.val.id}): choose another --out, or remove it"
                )
            return True
        there = {path.name for path in self.folder.glob("*") if path.suffix != ".tmp"}
        if not there <= {RESUME, *COVERED}:
            raise UsageError(f"{self.folder} exists and is no dictionary of ours: choose another --out, or remove it")
        return False

    def run(self) -> Dictionary:
        """The dictionary, trained and measured, or loaded when it is finished already."""
        if self.finished:
            print(f"{self.folder} is complete already")
            return load_dictionary(self.folder)
        for leftover in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
        dictionary = build(self.config)
        dictionary.initialise(self.settings.seed, self._decoder_bias())
        optimizer = torch.optim.AdamW(dictionary.parameters(), lr=self.settings.lr, weight_decay=0.0, fused=True)
        progress = load_progress(self.folder, dictionary, optimizer)
        self._train(dictionary, optimizer, progress)
        dictionary.config = self.config.trained(self.steps, self.steps * self.settings.batch)
        frozen(dictionary)
        self.loader.release()
        dictionary.metrics = None if self.val is None else evaluate(dictionary, self.means, self.val)
        save_dictionary(self.folder, dictionary, dictionary.metrics, progress.log)
        return dictionary

    def _train(self, dictionary: Dictionary, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        settings, first = self.settings, progress.step
        with tqdm(total=self.steps * settings.batch, initial=first * settings.batch, unit="row", unit_scale=True,
                  desc=dictionary.name, mininterval=0.5) as bar:  # fmt: skip
            for step, batch in enumerate(self.loader.batches(first, self.steps), start=first):
                logged = step % settings.log_steps == 0 or step == self.steps - 1
                loss, l0 = self._step(dictionary, optimizer, batch, step, logged)
                if logged:
                    line = self._line(step, loss, l0)
                    progress.log.append(line)
                    bar.set_postfix(loss=f"{line['loss']:.4f}", L0=f"{line['l0']:.1f}", refresh=False)
                bar.update(settings.batch)
                if (step + 1) % settings.checkpoint_steps == 0 and step + 1 < self.steps:
                    progress.step = step + 1
                    save_progress(self.folder, dictionary, optimizer, progress)

    def _step(
        self, dictionary: Dictionary, optimizer: torch.optim.Optimizer, batch: Batch, step: int, count: bool
    ) -> tuple[Loss, float]:
        settings = self.settings
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, self.steps)
        with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            z = dictionary.encode(batch.x, batch.sigma)
            y_hat = dictionary.decode(z)
        loss = loss_of_record(batch.y, y_hat, z, self.l1 * risen(step, settings.l1_warmup_rows, settings.batch))
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        dictionary.normalise_decoder()
        return loss, float((z > 0).sum()) / len(z) if count else math.nan

    def _line(self, step: int, loss: Loss, l0: float) -> LogLine:
        total, residual, sparsity = (float(value.detach()) for value in loss)
        if not math.isfinite(total):
            raise NonFiniteError(
                f"{self.config.name}: the loss is {total} at step {step}, the training diverged: use a lower --lr"
            )
        lr = learning_rate(self.settings, step, self.steps)
        rows = (step + 1) * self.settings.batch
        return {
            "step": step,
            "rows": rows,
            "loss": total,
            "residual": residual,
            "sparsity": sparsity,
            "l0": l0,
            "lr": lr,
        }

    def _decoder_bias(self) -> Tensor | None:
        if self.settings.decoder_bias == "zero":
            return None
        means = [mean for step in self.pack.steps if (mean := self.means.of(step)) is not None]
        return torch.stack(means).mean(dim=0).float()


def config_of(settings: TrainSettings, pack: Pack, site: Site) -> DictionaryConfig:
    """What the dictionary of a site will say about itself."""
    return DictionaryConfig(
        kind=settings.kind,
        site=site,
        d_model=pack.d_model,
        n_features=settings.expansion * pack.d_model,
        activation=settings.activation,
        k=settings.k,
        time_embed_dim=settings.time_embed_dim,
        parent=Parent(pack.id, pack.store_id, pack.model, pack.targets),
        training=settings.resolved(site),
    )


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The learning rate of a step; `record` changes it once per 1e6 rows, over 256 of them."""
    if settings.schedule == "record":
        angle = (step * settings.batch // RECORD_ROWS) / RECORD_PERIOD
    else:
        angle = step / steps if settings.schedule == "cosine" else 0.0
    return settings.lr * risen(step, settings.lr_warmup_rows, settings.batch) * 0.5 * (1 + math.cos(math.pi * angle))


def risen(step: int, warmup_rows: int, batch: int) -> float:
    """How far a warm-up over so many rows has come at a step, 0 to 1."""
    return min(1.0, (step + 1) * batch / warmup_rows) if warmup_rows else 1.0


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Compute with so many CPU threads inside; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(dictionaries: list[Dictionary]) -> str:
    """One line a dictionary: rows, FVU, L0, its share of the features, dead share; held-out rows only."""
    lines = [("dictionary", "rows", "features", "FVU", "L0", "L0 %", "dead %", "cosine", "held-out rows")]
    for dictionary in dictionaries:
        config, figures = dictionary.config, dictionary.metrics
        head = (dictionary.name, f"{config.rows:,}", f"{config.n_features:,}")
        groups = [("", figures)] if figures else []
        groups += [(f"  {group}", figures[group]) for group in ("real", "padding") if figures and figures.get(group)]
        if not groups:
            lines.append((*head, "-", "-", "-", "-", "-", "none"))
        for label, found in groups:
            assert found is not None
            fvu = "-" if found["fvu"] is None else f"{found['fvu']:.4f}"
            shares = (
                f"{found['l0']:.1f}",
                f"{100 * found['density']:.2f}",
                f"{100 * found['dead']:.1f}",
                f"{found['cosine']:.4f}",
            )
            lines.append((*(head if not label else (label, "", "")), fvu, *shares, f"{found['rows']:,}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
