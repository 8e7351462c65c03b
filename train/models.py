"""The list of models that a run trains: sites x settings x seeds, each with its recipe, its folder and its config.

With one model a site (and kind) the folders are OUT/transcoder_img_6/.  With several, a folder more says what differs between
them, such as OUT/l1-0.0003_seed-1/transcoder_img_6/: it holds the same model at all sites, as `--dictionaries` wants it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from store.errors import UsageError
from store.shards import Pack
from store.sites import Point, Site, Stream, choose_sites
from train.dictionaries.config import DictionaryConfig, Parent
from train.recipe import COUNTED, DEFAULTS, L1_OF_RECORD, Autocast, Recipe, idle, usual_log_steps
from train.settings import SWEPT, TrainSettings, coerced, combinations, flag, listed

UNNAMED: Mapping[str, Any] = MappingProxyType({**DEFAULTS, "l1": None})
"""what a folder does not name"""


@dataclass(frozen=True)
class Model:
    """One dictionary that is to be trained."""

    site: Site
    recipe: Recipe
    folder: Path
    """relative to --out"""
    config: DictionaryConfig

    @property
    def name(self) -> str:
        """`transcoder_img_6`, or `l1-0.0003_seed-1/transcoder_img_6`: how messages and the log name it."""
        return self.folder.as_posix()


def points_of(models: Sequence[Model]) -> tuple[Point, ...]:
    """The points that some of the models read or write, each once."""
    return tuple(dict.fromkeys(p for m in models for p in (m.config.input_point, m.config.target_point)))


def models_of(settings: TrainSettings, pack: Pack, world: int = 1) -> tuple[Model, ...]:
    """The models of a run, site by site.

    `world`: ranks that share each model's batches (`--parallel rows`).  `UsageError` for a site that the pack lacks, settings
    that contradict each other, and two models that are the same.
    """
    sites = choose_sites(settings.sites, pack.sites, str(pack.path))
    places, entries = entries_of(settings)
    labels = labels_of(entries)
    device = device_of(settings)
    models = []
    for site in sites:
        steps = steps_of(settings, pack, site, world)
        for place, entry, label in zip(places, entries, labels, strict=True):
            with _said_where(place):
                recipe = recipe_of(entry, site.stream, device)
                config = config_of(recipe, pack, site, training_of(settings, recipe, device, world, steps))
            models.append(Model(site, recipe, Path(label) / config.name, config))
    _refuse_twins(models)
    return tuple(models)


def entries_of(settings: TrainSettings) -> tuple[list[str], list[dict[str, Any]]]:
    """The models of one site: where each was asked for ("" by flags), and its values of `Recipe`'s fields.

    l1 may be None, the default of the site's stream.
    """
    choices, by_hand = settings.choices(), settings.by_hand()
    if settings.models is None:
        entries = list(combinations(choices, by_hand))
        return [""] * len(entries), entries
    places: list[str] = []
    found: list[dict[str, Any]] = []
    lists = [name for name in choices if name in by_hand and len(choices[name]) > 1]
    decided: set[str] = set()
    for number, mapping in enumerate(_read(settings.models), start=1):
        place = f"{settings.models}, model {number}"
        with _said_where(place):
            if twice := [name for name in lists if name in mapping]:
                raise UsageError(
                    f"it names its {twice[0]}, and {flag(twice[0])} {','.join(map(_text, choices[twice[0]]))} lists others: leave the "
                    "flag out, and say in the file which model has which"
                )
            given = {name: _values(name, value) for name, value in mapping.items()}
            entries = list(combinations({**choices, **given}, given))  # a flag's k is for those that need one
            for entry in entries:
                recipe_of(entry, "img", torch.device("cpu"))
        found += entries
        places += [place] * len(entries)
        decided |= {name for name in by_hand - mapping.keys() if not all(name in idle(entry) for entry in entries)}
    if nowhere := sorted(by_hand - decided):
        raise UsageError(
            f"{flag(nowhere[0])} means nothing for any model of {settings.models}, or each says its own: leave it out"
        )
    return places, found


@contextlib.contextmanager
def _said_where(place: str) -> Iterator[None]:
    """A `UsageError` inside names the place in the list of models; "" for none."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{place}: {error}" if place else str(error)) from None


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}: --models names a YAML list of models") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): --models names a YAML list of models") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, list) or not content or not all(isinstance(one, dict) for one in content):
        raise UsageError(f"{path} must hold a list of mappings, such as: - {{activation: topk, k: 64}}")
    known = tuple(Recipe.__dataclass_fields__)
    for number, mapping in enumerate(content, start=1):
        if odd := [str(name) for name in mapping if name not in known]:
            raise UsageError(
                f"{path}, model {number}: a model has no {', '.join(odd)}; it has {', '.join(known)} "
                "(batch, rows, epochs and the order of the rows belong to the whole run)"
            )
    return content


def _values(name: str, given: Any) -> tuple[Any, ...]:
    if name in SWEPT and given is not None:
        return listed(name, given) or (None,)
    return (coerced(name, given),)


def recipe_of(entry: Mapping[str, Any], stream: Stream, device: torch.device) -> Recipe:
    """The recipe of a model at a site of a stream, on a device: what was left to them is filled in."""
    values = {**entry, "autocast": autocast_on(device, entry["autocast"])}
    if values["l1"] is None:
        counted = values["activation"] in COUNTED
        if values["loss"] != "record" and not counted:
            raise UsageError(
                f"--loss {values['loss']} with --activation {values['activation']} needs --l1: it has no default"
            )
        values["l1"] = 0.0 if counted else L1_OF_RECORD[stream]
    return Recipe(**values)


def autocast_on(device: torch.device, asked: str) -> Autocast:
    """What `none`, `bfloat16` or `auto` is on a device.

    With the matrix units of a CPU (AMX) bfloat16 is three times as fast; with vector instructions alone (avx512_bf16, on a Xeon
    whose AMX is hidden) it was slower than float32, 153 beside 266 GFLOP/s, and rounded for nothing.
    """
    if asked != "auto":
        return "bfloat16" if asked == "bfloat16" else "none"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if found.get("amx_bf16") else "none"


def device_of(settings: TrainSettings, rank: int = 0) -> torch.device:
    """Where a rank computes; `UsageError` where that device is not there."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(settings.device or ("cuda" if there else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {settings.device}: dictionaries are trained on cpu or cuda")
    if device.type == "cpu":
        return device
    index = rank % max(there, 1) if device.index is None else device.index
    if index >= there:
        raise UsageError(
            f"--device {settings.device}: this machine shows {there} CUDA devices to torch; use --device cpu"
        )
    return torch.device("cuda", index)


def steps_of(settings: TrainSettings, pack: Pack, site: Site, world: int) -> int:
    """Steps that every model of a site takes; a batch never crosses a shard.  0 where a shard has fewer rows than a batch."""
    batches = sum(rows // settings.batch for rows in pack.shard_rows(site.stream))
    steps = settings.epochs * batches // world
    return steps if settings.rows is None else min(steps, -(-settings.rows // (settings.batch * world)))


def training_of(
    settings: TrainSettings, recipe: Recipe, device: torch.device, world: int, steps: int
) -> dict[str, Any]:
    """What `config.json` says of the training: all that decides weights and log beside pack and site; no paths."""
    run = {name: getattr(settings, name) for name in ("batch", "rows", "epochs", "order_seed")}
    run["log_steps"] = settings.log_steps or usual_log_steps(steps)
    threads = settings.threads or torch.get_num_threads()
    return {**recipe.to_json(), **run, "threads": threads, "world": world, "device": device.type}


def config_of(recipe: Recipe, pack: Pack, site: Site, training: dict[str, Any]) -> DictionaryConfig:
    """What the dictionary of a site will say about itself."""
    n_features = recipe.expansion * pack.d_model
    return DictionaryConfig(
        kind=recipe.kind,
        site=site,
        d_model=pack.d_model,
        n_features=n_features,
        activation=recipe.activation,
        k=recipe.k,
        time_embed_dim=recipe.time_embed_dim,
        family=recipe.family,
        skip=recipe.skip,
        nested=tuple(round(share * n_features) for share in recipe.nested),
        parent=Parent(pack.id, pack.store_id, pack.model, pack.targets),
        training=training,
    )


def labels_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each model of a site the folder that tells it from the others, such as `l1-0.0003_seed-1`; "" where none is needed.

    It names what differs among models of one kind: the fields that flags vary, and the others where they are not at their
    default; `plain` where nothing is left to be named.
    """
    labels = []
    for entry in entries:
        peers = [other for other in entries if other["kind"] == entry["kind"]]
        varying = [name for name in entry if name != "kind" and len({other[name] for other in peers}) > 1]
        named = [
            name for name in varying if (name in SWEPT and entry[name] is not None) or entry[name] != UNNAMED[name]
        ]
        labels.append("_".join(f"{name}-{_text(entry[name])}" for name in named) or ("plain" if varying else ""))
    return labels


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "-".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _refuse_twins(models: Sequence[Model]) -> None:
    seen: dict[tuple[Site, Recipe], Model] = {}
    for model in models:
        other = seen.setdefault((model.site, model.recipe), model)
        if other is not model:
            raise UsageError(
                f"{model.config.name} is asked for twice with the same settings ({other.folder} and {model.folder}): "
                "give each model its own"
            )
