"""How one dictionary is trained: everything that decides its weights beside the pack, the site and the order of the rows.

A named recipe is a set of defaults, and each flag given by hand goes before it:

    difract    the recipe of record (DifFRACT, arXiv:2606.15796): ReLU and L1, AdamW 2e-4, cosine in steps of 1e6 rows
    flux-sae   the second family (SAEs for visual features in FLUX.1): pre_bias, TopK, mean squared error per element, AdamW 1e-3
               with decay and clipping, cosine, its resampling.  Its cosine begins after the warm-up, ours at the start; its
               batch is 2048 (--batch)
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from store.errors import UsageError
from train.dictionaries.config import Activation, Family, Kind

Schedule = Literal["record", "cosine", "constant"]
LossName = Literal["record", "mse"]
Dead = Literal["none", "auxk", "resample", "flux-sae"]
Autocast = Literal["none", "bfloat16"]
RecipeName = Literal["difract", "flux-sae"]

L1_OF_RECORD = {"img": 3e-4, "txt": 5e-5, "joint": 3e-4}
GREATEST = 2**63 - 1
"""of any whole number: what torch counts with"""
WIDEST = 65_536
"""expansion and time_embed_dim at most: far beyond what any memory holds"""
COUNTED = ("topk", "batchtopk")
"""the activations that need a k"""


@dataclass(frozen=True)
class Recipe:
    """The settings of one model, every default filled in.  `UsageError` where they contradict each other."""

    kind: Kind = "transcoder"
    family: Family = "difract"
    activation: Activation = "relu"
    k: int | None = None
    """active features a row: of each row (topk), on the average of a batch (batchtopk)"""
    l1: float = 0.0
    """weight of the sparsity term: of mean_rows sum_f |z_f| with the loss of record, of mean |z| with mse, of L0 with jumprelu"""
    expansion: int = 16
    """n_features = expansion * d_model"""
    time_embed_dim: int | None = 256
    """width of the embedding of sigma; None: not conditioned on the denoising step"""
    skip: bool = False
    """a linear path from input to target beside the features"""
    nested: tuple[float, ...] = ()
    """shares of the features, rising and below 1, whose first so many must also explain the target alone (Matryoshka)"""
    bandwidth: float = 0.1
    """jumprelu: width of the rectangle around a threshold through which it gets its gradient; the paper's 1e-3 is for inputs of
    unit norm"""
    loss: LossName = "record"
    decoder_bias: Literal["zero", "mean"] = "zero"
    """where the decoder's bias (or pre_bias) starts"""
    lr: float = 2e-4
    schedule: Schedule = "record"
    lr_warmup_rows: int = 0
    l1_warmup_rows: int = 0
    weight_decay: float = 0.0
    """AdamW's, decoupled"""
    clip: float | None = None
    """greatest norm of the gradient of all parameters together; None: as it is"""
    project: bool = False
    """take off the part of the decoder's gradient along its columns before the step"""
    dead: Dead = "none"
    """what is done for dead features: auxk (an auxiliary loss), resample (Anthropic's), flux-sae (that system's own)"""
    dead_rows: int = 1_000_000
    """a feature is dead when it was active on none of the last so many rows"""
    aux_k: int | None = None
    """auxk: dead features that explain the residual; default: half of d_model"""
    aux_weight: float = 1 / 32
    """auxk: weight of that loss"""
    resample_rows: int = 10_000_000
    """resample, flux-sae: rows between two resamplings"""
    autocast: Autocast = "none"
    """bfloat16: matrix products in bfloat16; weights, loss, thresholds and statistics stay float32"""
    seed: int = 0
    """decides the initial weights, and which rows dead features are resampled from"""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, most = getattr(self, f.name), WIDEST if f.name in ("expansion", "time_embed_dim") else GREATEST
            if isinstance(value, int) and value > most:
                raise UsageError(f"--{f.name.replace('_', '-')} {value} must be at most {most}")
        for name in ("expansion", "lr", "k", "aux_k", "dead_rows", "resample_rows", "bandwidth", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} {value} must be positive")
        for name in ("l1", "lr_warmup_rows", "l1_warmup_rows", "seed", "aux_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative")
        if self.activation in COUNTED and self.k is None:
            raise UsageError(f"--activation {self.activation} needs --k: how many features may be active on a row")
        for name, (idle_with, remedy) in idle(vars(self)).items():
            if getattr(self, name) != DEFAULTS[name]:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} means nothing with {idle_with}: add {remedy}"
                )
        if list(self.nested) != sorted({share for share in self.nested if 0 < share < 1}):
            raise UsageError(
                f"--nested {self.nested} must be rising shares of the features between 0 and 1, such as 0.125,0.5"
            )

    def to_json(self) -> dict[str, Any]:
        """As `config.json` and the log say it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "nested": list(self.nested)}


LOG_STEPS, LEAST_LINES = 50, 50
"""steps between two lines of the log unless somebody says otherwise; fewer where a run would have fewer lines than that"""


def usual_log_steps(steps: int) -> int:
    """Steps between two lines of the log of a run of so many, by default."""
    return max(1, min(LOG_STEPS, steps // LEAST_LINES))


DEFAULTS: Mapping[str, Any] = MappingProxyType({f.name: f.default for f in fields(Recipe)})
"""the recipe of record"""


def idle(values: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The fields of `Recipe` that decide nothing beside the others: name -> (because of what, what would make it count).

    `values` may have l1 None, the default of the site's stream.
    """
    activation, dead, counted = values["activation"], values["dead"], values["activation"] in COUNTED
    found: dict[str, tuple[str, str]] = {}
    if not counted:
        found["k"] = f"--activation {activation}", "--activation topk"
    if activation != "jumprelu":
        found["bandwidth"] = f"--activation {activation}", "--activation jumprelu"
    if dead == "none":
        found["dead_rows"] = "--dead none", "--dead auxk"
    if dead != "auxk":
        found["aux_k"] = found["aux_weight"] = f"--dead {dead}", "--dead auxk"
    if dead not in ("resample", "flux-sae"):
        found["resample_rows"] = f"--dead {dead}", "--dead resample"
    if values["l1"] == 0 or (values["l1"] is None and counted):
        found["l1_warmup_rows"] = "--l1 0", "--l1 with a weight"
    return found


RECIPES: Mapping[RecipeName, Mapping[str, Any]] = MappingProxyType(
    {
        "difract": {},
        "flux-sae": {
            "kind": "sae", "family": "flux-sae", "activation": "topk", "time_embed_dim": None, "loss": "mse",
            "expansion": 4, "lr": 1e-3, "weight_decay": 1e-5, "clip": 1.0, "schedule": "cosine", "lr_warmup_rows": 4_096_000,
            "dead": "flux-sae", "dead_rows": 10_000, "resample_rows": 10_240_000,
        },
    }
)  # fmt: skip
"""name -> what it sets otherwise than `Recipe`'s own defaults, which are the recipe of record"""
