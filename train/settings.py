"""The settings of a training: one frozen dataclass, and the command line made from it.

`--kind --activation --k --l1 --expansion --lr --seed` take comma lists, and every combination is a model; what else shall
differ between models is said in `--models FILE.yaml`, a list of mappings of the fields of `train.recipe.Recipe`.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from store.errors import UsageError
from train.recipe import (
    COUNTED,
    DEFAULTS,
    GREATEST,
    L1_OF_RECORD,
    RECIPES,
    Dead,
    LossName,
    Recipe,
    RecipeName,
    Schedule,
    idle,
)

SWEPT = ("kind", "activation", "k", "l1", "expansion", "lr", "seed")
"""what takes a comma list, in the order in which models are made and named"""
MOST_THREADS = 65_536

_HINTS = get_type_hints(Recipe)
_NAMES = tuple(f.name for f in fields(Recipe))


def _words(metavar: str) -> PrimitiveConstructorSpec[Any]:
    """A flag whose one word is parsed by `TrainSettings` itself."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: words[0],
        is_instance=lambda _value: True,
        str_from_instance=lambda value: [",".join(map(str, value)) if isinstance(value, tuple) else str(value)],
    )


Names: TypeAlias = tuple[str, ...] | list[str] | str | None
Whole: TypeAlias = tuple[int, ...] | list[int] | int | str | None
Numbers: TypeAlias = tuple[float, ...] | list[float] | float | str | None


@dataclass(frozen=True)
class TrainSettings:
    """Train dictionaries from a pack: sites x settings x seeds, each site read once for all of them."""

    pack: Path
    """the pack to train on (python -m store pack)"""
    out: Path
    """folder in which each dictionary gets its own folder: transcoder_img_6/ with one model a site, otherwise
    l1-0.0003_seed-1/transcoder_img_6/, named after what differs"""
    val: Path | None = None
    """a pack of held-out prompts (--split val) to measure on; without it no figures are given"""
    sites: Annotated[str, tyro.conf.arg(metavar="img_0-3,txt_6|all")] = "all"
    """sites to train"""
    recipe: RecipeName = "difract"
    """defaults of all that follows down to --autocast: difract (the recipe of record) or flux-sae (pre_bias, TopK, mean squared
    error per element); a flag given by hand goes before it"""
    models: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")] = None
    """the models of each site: a list of mappings such as {activation: topk, k: [32, 64]}; flags give what they leave out"""
    kind: Annotated[Names, _words("transcoder|sae[,...]")] = None
    """transcoder: mlp_in -> mlp_out (difract); sae: mlp_out -> mlp_out (flux-sae)"""
    activation: Annotated[Names, _words("relu|topk|batchtopk|jumprelu[,...]")] = None
    """relu (sparse by L1; difract), topk (the k greatest of each row; flux-sae), batchtopk (of a batch), jumprelu"""
    k: Annotated[Whole, _words("INT[,INT...]")] = None
    """with topk, batchtopk: active features a row"""
    l1: Annotated[Numbers, _words("FLOAT[,FLOAT...]")] = None
    """weight of the sparsity term, with jumprelu that of the mean L0; default 3e-4 (img, joint) and 5e-5 (txt), with topk and
    batchtopk none"""
    expansion: Annotated[Whole, _words("INT[,INT...]")] = None
    """features for each channel: n_features = expansion * d_model; default 16 (difract), 4 (flux-sae)"""
    lr: Annotated[Numbers, _words("FLOAT[,FLOAT...]")] = None
    """learning rate of AdamW; default 2e-4 (difract), 1e-3 (flux-sae)"""
    seed: Annotated[Whole, _words("INT[,INT...]")] = None
    """decides the initial weights; default 0"""
    time_embed_dim: Annotated[int | str | None, _words("INT|none")] = "recipe"
    """width of the embedding of sigma; none: not conditioned on the denoising step; default 256 (difract), none (flux-sae)"""
    skip: bool = False
    """a linear path from input to target beside the features"""
    nested: Annotated[Numbers, _words("FLOAT[,FLOAT...]")] = None
    """shares of the features, such as 0.125,0.5, whose first so many must also explain the target alone (Matryoshka)"""
    bandwidth: float | None = None
    """with jumprelu: width of the rectangle through which thresholds get their gradient; default 0.1 (the paper's 1e-3 is for
    inputs of unit norm)"""
    loss: LossName | None = None
    """record: squared residual over the batch's variance, + l1 * mean sum |z| (difract); mse: per element, + l1 * mean |z|"""
    decoder_bias: Literal["zero", "mean"] | None = None
    """where the decoder's bias (or pre_bias) starts: zero (record), or the mean of the targets"""
    schedule: Schedule | None = None
    """record: cosine in steps of 1e6 rows, 256 of them (difract); cosine: smoothly down to zero over this run (flux-sae); constant"""
    lr_warmup_rows: int | None = None
    """rows over which the learning rate rises from zero; default 0 (difract), 4096000 (flux-sae)"""
    l1_warmup_rows: int | None = None
    """rows over which the L1 weight rises from zero; default 0"""
    weight_decay: float | None = None
    """AdamW's; default 0 (difract), 1e-5 (flux-sae)"""
    clip: float | None = None
    """greatest norm of the gradient of all parameters together; default none (difract), 1 (flux-sae)"""
    project: bool = False
    """take off the part of the decoder's gradient along its columns before each step"""
    dead: Dead | None = None
    """for dead features: auxk (an auxiliary loss), resample (Anthropic's), flux-sae (that system's own; flux-sae); default none"""
    dead_rows: int | None = None
    """a feature is dead when it was active on none of the last so many rows; default 1000000 (difract), 10000 (flux-sae)"""
    aux_k: int | None = None
    """with auxk: dead features that explain the residual; default half of d_model"""
    aux_weight: float | None = None
    """with auxk: weight of that loss; default 1/32"""
    resample_rows: int | None = None
    """with resample, flux-sae: rows between two resamplings; default 10000000 (difract), 10240000 (flux-sae)"""
    autocast: Literal["none", "bfloat16", "auto"] | None = None
    """bfloat16 for matrix products, while weights, loss and statistics stay float32; auto: where the device has matrix
    units for it (GPUs; CPUs with AMX); default none"""
    epochs: int = 1
    """passes over the pack"""
    rows: int | None = None
    """stop after so many rows a site, rounded up to whole batches; default: the epochs decide"""
    batch: int = 4096
    """rows a step (of each rank with --parallel rows)"""
    order_seed: int = 0
    """decides the order of the rows, the same for all models"""
    together: int | None = None
    """how many models of a site are trained at once on one read, each with its weights and moments in memory; default all"""
    device: str | None = None
    """cuda, cuda:1, cpu; default: cuda where there is one"""
    parallel: Literal["models", "rows"] | None = None
    """under torchrun: each rank its share of the models, or all ranks each model, a batch each with gradients averaged.
    Default: models where there are at least as many as ranks"""
    threads: int | None = None
    """CPU threads; recorded, because sums depend on it; default: what torch finds"""
    log_steps: int | None = None
    """steps between two lines of log.jsonl; default 50, fewer where the run has fewer than 2500 steps, so that there are 50 lines"""
    checkpoint_steps: int = 2000
    """steps between two states that a killed run goes on from; no weight depends on it"""
    plan: bool = False
    """say which models would be trained, and what memory, disk and reading that takes, and train nothing"""

    def __post_init__(self) -> None:
        for name in SWEPT:
            object.__setattr__(self, name, listed(name, getattr(self, name)))
        if self.time_embed_dim != "recipe":
            object.__setattr__(self, "time_embed_dim", coerced("time_embed_dim", self.time_embed_dim))
        if self.nested is not None:
            object.__setattr__(self, "nested", coerced("nested", self.nested))
        for name in ("epochs", "rows", "batch", "threads", "log_steps", "checkpoint_steps", "together"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{flag(name)} {value} must be positive")
            most = MOST_THREADS if name == "threads" else GREATEST
            if value is not None and value > most:
                raise UsageError(f"{flag(name)} {value} must be at most {most}")
        if self.order_seed < 0:
            raise UsageError(f"--order-seed {self.order_seed} must not be negative")
        if self.val is not None and self.val == self.pack:
            raise UsageError(f"--val and --pack are both {self.pack}: figures on rows that were trained on say nothing")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError:
                raise UsageError(f"--device {self.device!r} is no device: write cpu, cuda or cuda:1") from None
        if self.models is None:
            for values in combinations(self.choices(), self.by_hand()):
                l1 = (
                    L1_OF_RECORD["img"]
                    if values["l1"] is None and values["activation"] not in COUNTED
                    else values["l1"]
                )
                Recipe(**{**values, "l1": l1 or 0.0, "autocast": "none"})  # refuses what cannot be

    @property
    def runs(self) -> Path:
        """`OUT.runs`, the folder beside OUT with what is said of a run and not of a dictionary."""
        nameless = self.out.name in ("", "..")  # `--out .` has a name, too, and a link names what it leads to
        out = self.out.resolve() if nameless or self.out.is_symlink() else self.out
        return out.with_name(out.name + ".runs")

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The values of every field of `Recipe`: given by hand, else the recipe's, else the default; l1 None by default."""
        values: dict[str, tuple[Any, ...]] = {f.name: (f.default,) for f in fields(Recipe)}
        values |= {"l1": (None,)} | {name: (value,) for name, value in RECIPES[self.recipe].items()}
        for name in self.by_hand():
            given = getattr(self, name)
            values[name] = given if name in SWEPT else (given,)
        return values

    def by_hand(self) -> frozenset[str]:
        """The fields of `Recipe` that flags give."""
        default = {f.name: f.default for f in fields(self)}
        return frozenset(name for name in _NAMES if name in default and getattr(self, name) != default[name])


def combinations(choices: Mapping[str, tuple[Any, ...]], by_hand: Collection[str]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of each field.

    What decides nothing in one of them, such as a k with relu, is at its default there: of `--activation relu,topk --k 32,64`
    there are three models.  What was given `by_hand` and decides nothing in any of them stays, and `Recipe` refuses it.
    """
    names = (*SWEPT, *(name for name in choices if name not in SWEPT))
    every = [dict(zip(names, values, strict=True)) for values in product(*(choices[name] for name in names))]
    wanted = set.intersection(*(set(idle(found)) for found in every)) & set(by_hand)
    seen = []
    for found in every:
        found |= {name: DEFAULTS[name] for name in idle(found) if name not in wanted}
        if found not in seen:
            seen.append(found)
            yield found


def flag(name: str) -> str:
    """`--lr-warmup-rows`"""
    return "--" + name.replace("_", "-")


def listed(name: str, given: Any) -> tuple[Any, ...] | None:
    """The values of a field that a sweep varies, from what was given in Python or as a word."""
    if given is None:
        return None
    words = given.split(",") if isinstance(given, str) else given if isinstance(given, (tuple, list)) else (given,)
    found = tuple(coerced(name, word) for word in words)
    if not found or len(set(found)) < len(found):
        raise UsageError(
            f"{flag(name)} {given!r} names {'nothing' if not found else 'a value twice'}: each makes a model"
        )
    return None if found == (None,) else found


def coerced(name: str, given: Any) -> Any:
    """The value of a field of `Recipe` from a word, or from what Python or YAML gave; `UsageError` says what was expected."""
    hint = _HINTS[name] if name != "l1" else float | None  # None: the default of the site's stream
    kinds = get_args(hint) if get_origin(hint) is UnionType or isinstance(hint, UnionType) else (hint,)
    word = given.strip() if isinstance(given, str) else given
    if type(None) in kinds and (word is None or str(word).lower() == "none"):
        return None
    (kind,) = [one for one in kinds if one is not type(None)]
    if name == "autocast":
        kind = Literal["none", "bfloat16", "auto"]
    if get_origin(kind) is Literal:
        if word in get_args(kind):
            return word
        raise UsageError(f"{flag(name)} {given!r} is not one of {', '.join(get_args(kind))}")
    if get_origin(kind) is tuple:
        shares = word.split(",") if isinstance(word, str) else word if isinstance(word, (tuple, list)) else (word,)
        return tuple(_number(name, share, float) for share in shares)
    if kind is bool:
        if isinstance(word, bool):
            return word
        raise UsageError(f"{flag(name)} {given!r} must be true or false")
    return _number(name, word, kind)


def _number(name: str, given: Any, kind: type) -> Any:
    what = "a whole number" if kind is int else "a number"
    try:
        if isinstance(given, bool) or not isinstance(given, (str, int, float)):
            raise ValueError
        value = kind(given)
        if not math.isfinite(value) or (not isinstance(given, str) and value != given):
            raise ValueError
    except (ValueError, OverflowError):
        raise UsageError(f"{flag(name)} {given!r} is not {what}") from None
    return value
