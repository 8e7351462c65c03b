"""A dictionary on disk: a folder that is whole or says that it is not.

    transcoder_img_6/
      weights.safetensors   the parameters, float32, under their published names
      metrics.json          figures on held-out rows, or null
      log.jsonl             loss, L0, dead features, learning rate while training; no times
      config.json           everything else, length and SHA-256 of the others, and its own; written last
      resume.safetensors    only while training: parameters, AdamW moments, what the objective counts, position, log so far

No byte depends on path, time or host.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from store.errors import DamagedError, ForeignError, MismatchError, UnfinishedError, UsageError
from store.files import (
    json_bytes,
    publish,
    read_self_checked,
    self_checked,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
)
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import Dictionary, build
from train.dictionaries.provenance import model_name
from train.recipe import Recipe, usual_log_steps

CONFIG, WEIGHTS, METRICS, LOG, RESUME = (
    "config.json",
    "weights.safetensors",
    "metrics.json",
    "log.jsonl",
    "resume.safetensors",
)
COVERED = (WEIGHTS, METRICS, LOG)
METADATA_KEY = "granary"  # one key alone: the order of several differs from run to run
RESUME_VERSION = 3
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_DEFAULTS = {**Recipe().to_json(), "rows": None, "epochs": 1, "order_seed": 0, "log_steps": None, "world": 1}
"""what a training was whose record does not say so"""
_MAKE_AGAIN = "Take it from a copy, or remove the folder {} and train (or import) the dictionary again"
_START_AGAIN = "cannot be read ({}): remove it to train that model from the start"

LogLine = dict[str, float | int]


@dataclass
class Progress:
    """Where a training stands: all that is needed to go on bit for bit."""

    step: int = 0
    log: list[LogLine] = field(default_factory=list)


def save_dictionary(
    folder: Path, dictionary: Dictionary, metrics: Mapping[str, Any] | None, log: list[LogLine]
) -> None:
    """Publish a finished dictionary as `folder`; `config.json` comes last and makes it loadable."""
    contents = {
        WEIGHTS: safetensors.torch.save(_parameters(dictionary)),
        METRICS: json_bytes(metrics),
        LOG: "".join(json.dumps(line, sort_keys=True) + "\n" for line in log).encode(),
    }
    for name, content in contents.items():
        write_bytes(folder / name, content)
    files = {name: {"bytes": len(content), "sha256": sha256_bytes(content)} for name, content in contents.items()}
    write_json(folder / CONFIG, self_checked({**dictionary.config.to_json(), "files": files}))
    clear(folder)


def clear(folder: Path) -> None:
    """Remove what a killed run left in the folder of a finished dictionary, which is no part of it."""
    for path in (folder / RESUME, *folder.glob(".*.tmp")):
        path.unlink(missing_ok=True)


def read_config(folder: Path) -> DictionaryConfig:
    """What the dictionary in `folder` says about itself; its weights are not read."""
    return _read(folder)[0]


def load_dictionary(folder: str | Path) -> Dictionary:
    """The dictionary in `folder`, float32 on the CPU, in eval mode, without gradients.

    Errors: `UsageError` where there is no such folder, `UnfinishedError` for one whose training did not end,
    `ForeignError` for what is not ours or of another version, `DamagedError` for a file that differs from its checksum.
    """
    folder = Path(folder)
    check_whole(folder)
    config, _ = _read(folder)
    metrics = json.loads((folder / METRICS).read_bytes())
    dictionary = build(config, metrics, empty=True)
    fill(dictionary, safetensors.torch.load_file(folder / WEIGHTS), str(folder / WEIGHTS))
    dictionary.place = folder
    return frozen(dictionary)


def check_whole(folder: Path) -> None:
    """`DamagedError` names the first file of a finished dictionary that is missing or differs from its checksum."""
    _, files = _read(folder)
    for name in COVERED:
        _check(folder / name, files[name])


def outline(folder: Path) -> Dictionary:
    """The dictionary in `folder` without its weights, on the meta device: its config, metrics and name, for tables."""
    config, files = _read(folder)
    _check(folder / METRICS, files[METRICS])
    dictionary = build(config, json.loads((folder / METRICS).read_bytes()), empty=True)
    dictionary.place = folder
    return dictionary


def read_log(folder: Path) -> list[LogLine]:
    """The lines of a finished dictionary's log; `DamagedError` where they are not those that were written."""
    _check(folder / LOG, _read(folder)[1][LOG])
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def frozen(dictionary: Dictionary) -> Dictionary:
    """The same dictionary in eval mode, without gradients of its parameters."""
    dictionary.eval().requires_grad_(False)
    return dictionary


def fill(dictionary: Dictionary, state: Mapping[str, Tensor], where: str) -> None:
    """Load parameters; `ForeignError` names those that are missing, unknown, or of another shape."""
    expected = {name: tuple(value.shape) for name, value in dictionary.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        differing = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
        odd = [
            f"{name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
            for name in differing
        ]
        raise ForeignError(f"{where} does not hold the parameters of {dictionary.name}: " + "; ".join(odd))
    empty = dictionary.encoder.weight.is_meta  # it takes copies over then, one by one, and no memory is used twice
    values = {name: value.to(torch.float32, copy=empty).contiguous() for name, value in state.items()}
    dictionary.load_state_dict(values, assign=empty)


def save_progress(
    folder: Path,
    dictionary: Dictionary,
    optimizer: torch.optim.Optimizer,
    objective: Mapping[str, Tensor],
    progress: Progress,
) -> None:
    """Publish the state of a training in one file, so that no crash can tear weights from moments.

    `objective` is `Objective.state()`.  Size: 12 bytes a parameter (`progress_bytes`); the old file stays until the new one is whole.
    """
    tensors = {f"weights/{name}": value for name, value in _parameters(dictionary).items()}
    for name, parameter in dictionary.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    tensors |= {f"objective/{name}": value.detach().cpu().clone() for name, value in objective.items()}
    about = {
        "version": RESUME_VERSION, "config": dictionary.config.to_json(), "step": progress.step, "log": progress.log,
    }  # fmt: skip
    metadata = {METADATA_KEY: json.dumps(about, sort_keys=True)}
    publish(folder / RESUME, lambda path: safetensors.torch.save_file(tensors, path, metadata))


def load_progress(
    folder: Path,
    dictionary: Dictionary,
    optimizer: torch.optim.Optimizer,
    load_objective: Callable[[dict[str, Tensor]], None],
) -> Progress:
    """Bring dictionary, optimizer and objective to where `save_progress` left them; a fresh `Progress` when it never ran.

    `UsageError` when the folder holds the training of another dictionary, `MismatchError` when it is on another pack,
    `ForeignError` for the state of another version of Granary, `DamagedError` for what cannot be read.
    """
    path = folder / RESUME
    if not path.exists():
        return Progress()
    about = check_progress(folder, dictionary.config)
    try:
        tensors = safetensors.torch.load_file(path)
        by_kind: dict[str, dict[str, Tensor]] = {"weights": {}, "objective": {}}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            by_kind.setdefault(kind, {})[name] = value
        fill(dictionary, by_kind["weights"], str(path))
        for name, parameter in dictionary.named_parameters():
            moments = {kind: values[name] for kind, values in by_kind.items() if kind in MOMENTS and name in values}
            if moments:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True) for key, value in moments.items()
                }
        load_objective(by_kind["objective"])
        return Progress(about["step"], about["log"])
    except (safetensors.SafetensorError, LookupError, ValueError) as error:
        raise DamagedError(f"{path} {_START_AGAIN.format(error)}") from None


def check_progress(folder: Path, asked: DictionaryConfig, log_steps_asked: bool = False) -> dict[str, Any]:
    """What the unfinished training in `folder` says of itself, its weights unread; the errors of `load_progress`.

    `log_steps_asked` as for `refuse_other`.  `FileNotFoundError` where there is none (any more).
    """
    path = folder / RESUME
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[METADATA_KEY])
        version, config = about.get("version"), about["config"]
    except (safetensors.SafetensorError, LookupError, AttributeError, ValueError) as error:
        raise DamagedError(f"{path} {_START_AGAIN.format(error)}") from None
    if version != RESUME_VERSION:
        raise ForeignError(
            f"{path} is the state of a training by another version of Granary (version {version}, expected "
            f"{RESUME_VERSION}): finish it with that version, or remove the file to train from the start"
        )
    refuse_other(folder, DictionaryConfig.from_json(config, str(path)), asked, log_steps_asked=log_steps_asked)
    return dict(about)


def progress_bytes(dictionary: Dictionary) -> int:
    """About how long `resume.safetensors` is: weights and two moments of each, float32."""
    return sum(3 * value.numel() * value.element_size() for value in dictionary.state_dict().values())


def refuse_other(
    folder: Path,
    found: DictionaryConfig,
    asked: DictionaryConfig,
    ended: bool = False,
    log_steps_asked: bool = False,
) -> None:
    """`UsageError` naming every difference, unless both are the same training; `MismatchError` where the packs differ.

    A setting that a record does not name was added since, and is at its default there.  With `ended` it does not matter how
    often the training wrote a line of its log, unless that is asked for (`log_steps_asked`).  Records of before say null of
    it for the default: of a training that ended its steps tell what that was, and one that goes on has it still.
    """
    there, here = (config.trained(0, 0).to_json() for config in (found, asked))
    if isinstance(there["training"], dict) and isinstance(here["training"], dict):
        added = {key: value for key, value in _DEFAULTS.items() if key in here["training"]}
        there["training"] = {**added, **there["training"]}
        usual = there["training"].get("log_steps", 0) is None
        if (ended or usual) and not log_steps_asked:
            there["training"]["log_steps"] = here["training"].get("log_steps")
        elif usual and found.steps:
            there["training"]["log_steps"] = usual_log_steps(found.steps)
    if there["parent"] != here["parent"]:
        raise MismatchError(
            f"{folder} was trained on {_parent_name(found)}; now asked for is {_parent_name(asked)}: train on the same "
            "pack to go on, choose another --out, or remove that folder"
        )
    told = here["training"] if isinstance(there["training"], dict) else {}  # names these again
    differing = [key for key in here if there.get(key) != here[key] and key not in told]
    if not differing:
        return
    lines = []
    for key in differing:
        if key == "training" and isinstance(there[key], dict):
            names = sorted({*there[key], *here[key]})
            pairs = [(f"--{n}".replace("_", "-"), there[key].get(n), here[key].get(n)) for n in names]
            lines += [f"  {name}: there {old!r}, asked for {new!r}" for name, old, new in pairs if old != new]
        else:
            lines.append(f"  {key}: there {there[key]!r}, asked for {here[key]!r}")
    raise UsageError(
        f"{folder} holds another dictionary; it differs in\n"
        + "\n".join(lines)
        + "\nChoose another --out, or remove that folder."
    )


def _parent_name(config: DictionaryConfig) -> str:
    parent = config.parent
    if parent is None:
        return "nobody knows what (parent: unknown)"
    return f"pack {parent.pack} of store {parent.store}, {model_name(parent.model)}, targets {parent.targets}"


def _parameters(dictionary: Dictionary) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in dictionary.state_dict().items()}


def _read(folder: Path) -> tuple[DictionaryConfig, dict[str, Any]]:
    path = folder / CONFIG
    if not folder.is_dir():
        raise UsageError(f"there is no dictionary {folder}")
    if not path.exists() and (folder / RESUME).exists():
        raise UnfinishedError(
            f"{folder} did not finish training: run the same train command again, it goes on where it was"
        )
    if not path.exists():
        raise ForeignError(f"{folder} is no dictionary: it has no {CONFIG}")
    content = read_self_checked(path, _MAKE_AGAIN.format(folder))
    files = content.pop("files", None)
    del content["sha256"]
    config = DictionaryConfig.from_json(content, str(path))
    if not isinstance(files, dict) or set(files) != set(COVERED):
        raise ForeignError(f"{path} does not list {', '.join(COVERED)}")
    return config, files


def _check(path: Path, entry: dict[str, Any]) -> None:
    if not path.exists():
        raise DamagedError(f"{path} is missing: train or import the dictionary again")
    length = path.stat().st_size
    if length != entry["bytes"]:
        raise DamagedError(
            f"{path} has {length} bytes where {entry['bytes']} were written: train or import the dictionary again"
        )
    if sha256_file(path) != entry["sha256"]:
        raise DamagedError(f"{path} differs from the checksum in {CONFIG}: train or import the dictionary again")
