"""The settings of a training: one frozen dataclass, and the command line made from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from store.errors import UsageError
from store.sites import Site
from train.config import Activation, Kind

Schedule = Literal["record", "cosine", "constant"]
L1_OF_RECORD = {"img": 3e-4, "txt": 5e-5, "joint": 3e-4}
_PLACES = ("pack", "out", "val", "checkpoint_steps")  # where, and how often: no weight depends on them


@dataclass(frozen=True)
class TrainSettings:
    """Train one dictionary a site from a pack; the defaults are the recipe of record (DifFRACT)."""

    pack: Path
    """the pack to train on (python -m store pack)"""
    out: Path
    """folder in which each dictionary gets its own folder, such as transcoder_img_6/"""
    val: Path | None = None
    """a pack of held-out prompts (--split val) to measure on; without it no figures are given"""
    sites: Annotated[str, tyro.conf.arg(metavar="img_0-3,txt_6|all")] = "all"
    """sites to train, one after the other"""
    kind: Kind = "transcoder"
    """transcoder: mlp_in -> mlp_out; sae: mlp_out -> mlp_out"""
    activation: Activation = "relu"
    """relu (sparse by L1) or topk (the k greatest of each row)"""
    l1: float | None = None
    """weight of the L1 penalty; default with relu 3e-4 (img) and 5e-5 (txt), with topk none"""
    k: int | None = None
    """with topk: active features a row"""
    expansion: int = 16
    """features for each channel: n_features = expansion * d_model"""
    time_embed_dim: int | None = 256
    """width of the embedding of sigma; none: not conditioned on the denoising step"""
    decoder_bias: Literal["zero", "mean"] = "zero"
    """where the decoder's bias starts: zero (record), or the mean of the targets"""
    epochs: int = 1
    """passes over the pack"""
    rows: int | None = None
    """stop after so many rows a site, rounded up to whole batches; default: the epochs decide"""
    batch: int = 4096
    """rows a step"""
    lr: float = 2e-4
    """learning rate of AdamW (no weight decay)"""
    schedule: Schedule = "record"
    """record: cosine in steps of 1e6 rows, 256 of them; cosine: smoothly down to zero over this run; constant"""
    lr_warmup_rows: int = 0
    """rows over which the learning rate rises from zero"""
    l1_warmup_rows: int = 0
    """rows over which the L1 weight rises from zero"""
    autocast: Literal["none", "bfloat16", "auto"] = "none"
    """bfloat16 for matrix products, while weights, loss and statistics stay float32; auto: where the CPU has units"""
    seed: int = 0
    """decides the initial weights and the order of the rows"""
    threads: int | None = None
    """CPU threads; recorded, because sums depend on it; default: what torch finds"""
    log_steps: int = 50
    """steps between two lines of log.jsonl"""
    checkpoint_steps: int = 2000
    """steps between two states that a killed run goes on from; no weight depends on it"""

    def __post_init__(self) -> None:
        positive = ("expansion", "epochs", "rows", "batch", "lr", "threads", "log_steps", "checkpoint_steps", "k")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} {value} must be positive")
        for name in ("lr_warmup_rows", "l1_warmup_rows", "seed", "l1"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"--{name.replace('_', '-')} {value} must not be negative")
        if self.activation == "topk" and self.k is None:
            raise UsageError("--activation topk needs --k: how many features may be active on a row")
        if self.activation != "topk" and self.k is not None:
            raise UsageError(f"--k {self.k} means nothing with --activation {self.activation}: add --activation topk")
        if self.val is not None and self.val == self.pack:
            raise UsageError(f"--val and --pack are both {self.pack}: figures on rows that were trained on say nothing")

    def l1_of(self, site: Site) -> float:
        """The L1 weight at a site."""
        if self.l1 is not None:
            return self.l1
        return 0.0 if self.activation == "topk" else L1_OF_RECORD[site.stream]

    def resolved(self, site: Site) -> dict[str, Any]:
        """The settings that decide the weights at `site`, every default filled in; no paths."""
        names = (
            name for name in self.__dataclass_fields__ if name not in (*_PLACES, "sites", "kind", "activation", "k")
        )
        values = {name: getattr(self, name) for name in names}
        values["autocast"] = "bfloat16" if self.in_bfloat16 else "none"
        return {**values, "l1": self.l1_of(site), "threads": self.threads or torch.get_num_threads()}

    @property
    def in_bfloat16(self) -> bool:
        """Whether matrix products are computed in bfloat16: three times as fast where the CPU has matrix units."""
        if self.autocast != "auto":
            return self.autocast == "bfloat16"
        found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
