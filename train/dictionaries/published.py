"""The `.pt` files of the two published systems, read and written.

Files are told apart by their keys: DifFRACT's is a bare state dict, FLUX-SAE's is
`{model_state_dict, config{use_topk, topk_k, input_dim, hidden_dim, l1_coeff}}`.  They are loaded with
`weights_only=True`, always: a pickle that holds code is refused.
"""

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from store import labels
from store.errors import ForeignError, UsageError
from store.files import is_temporary, write_bytes
from store.sites import Site
from train.dictionaries.checkpoint import CONFIG, COVERED, fill, frozen, load_dictionary, save_dictionary
from train.dictionaries.config import DictionaryConfig, Kind
from train.dictionaries.dictionary import Dictionary, build

_NAME = re.compile(r"(transcoder|sae)_((?:img|txt|joint)_\d+)\.pt")
_CONDITIONED = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"} | {
    f"{layer}.{part}" for layer in ("time_mlp.0", "time_mlp.2", "mod_linear") for part in ("weight", "bias")
}
_PRE_BIAS = {"pre_bias", "encoder.weight", "encoder.bias", "decoder.weight"}


@dataclass(frozen=True)
class ExportSettings:
    """Write a dictionary as the `.pt` file that the published code loads."""

    dictionary: tyro.conf.Positional[Path]
    """folder of the dictionary"""
    out: Path
    """the file to write, such as transcoder_img_6.pt"""
    force: bool = False
    """write over a file that is there"""

    def __post_init__(self) -> None:
        if self.out.suffix != ".pt":
            raise UsageError(f"--out {self.out} is no .pt file: name one, such as transcoder_img_6.pt")


@dataclass(frozen=True)
class ImportSettings:
    """Turn a published `.pt` file into a dictionary folder."""

    file: tyro.conf.Positional[Path]
    """a file such as transcoder_img_6.pt or sae_best.pt"""
    out: Path
    """folder in which the dictionary's own folder is made"""
    site: Annotated[str | None, tyro.conf.arg(metavar="img_6")] = None
    """the site it belongs to, where the file's name does not say it"""
    kind: Kind | None = None
    """transcoder or sae, where neither the file's name nor its keys say it"""


def is_published_name(name: str) -> bool:
    """Whether a file is named as published dictionaries are: `transcoder_img_6.pt`."""
    return _NAME.fullmatch(name) is not None


def run_export(settings: ExportSettings) -> None:
    """Write `settings.out`, and the labels beside it.

    Nothing is written when it is there already, when the layout cannot say what the dictionary is, or when labels cannot be
    read or lie there for another dictionary.
    """
    out = settings.out
    if out.is_dir():
        raise UsageError(f"{out} is a folder: choose another --out")
    if out.exists() and not settings.force:
        raise UsageError(f"{out} exists: choose another --out, or say --force to write over it")
    dictionary = load_dictionary(settings.dictionary)
    content, beside = to_bytes(dictionary), labels.labels_file(out)
    found = _labels_for(settings.dictionary, out)
    if out.exists() and beside.exists() and out.read_bytes() != content:
        raise UsageError(
            f"{out} holds another dictionary, whose labels {beside} would name the features of this one: move both away, "
            "or choose another --out"
        )
    if beside.exists() and not out.exists():
        labels.note_leftover(beside)
    write_bytes(out, content)
    if found:
        labels.add_labels(beside, found)
    print(f"{settings.out}: {dictionary.name} in the layout of {dictionary.config.family}")


def run_import(settings: ImportSettings) -> None:
    """Write the dictionary folder below `settings.out`; goes on where an import was killed."""
    dictionary = import_file(settings.file, settings.site, settings.kind)
    folder = settings.out / dictionary.name
    if folder.exists() and not _begun(folder) and not _same(folder, dictionary):
        raise UsageError(f"{folder} exists and holds something else: choose another --out, or remove it")
    found, beside = _labels_for(settings.file, folder), labels.labels_file(folder)
    if beside.exists() and not (folder / CONFIG).exists():
        labels.note_leftover(beside)
    for leftover in folder.glob(".*.tmp"):  # of an import that was killed while it wrote
        leftover.unlink()
    save_dictionary(folder, dictionary, None, [])
    if found:
        labels.add_labels(beside, found)
    config = dictionary.config
    print(
        f"{folder}: d_model {config.d_model}, {config.n_features} features, {config.activation}, "
        f"layout of {config.family}"
    )


def _labels_for(source: Path, target: Path) -> frozenset[labels.Label]:
    """The labels of a dictionary at one place, which those at another will be merged with; both can be read."""
    labels.read_labels(labels.labels_file(target))
    return labels.read_labels(labels.labels_file(source))


def to_bytes(dictionary: Dictionary) -> bytes:
    """The `.pt` file of a dictionary; `UsageError` says why where the published layout has no words for it."""
    config = dictionary.config
    why = why_not_flux_sae(config) if config.family == "flux-sae" else why_not_difract(config)
    if why is not None:
        raise UsageError(f"{dictionary.name} cannot be exported: {why}. Share its folder instead.")
    state = OrderedDict(
        (name, value.detach().cpu().contiguous().clone()) for name, value in dictionary.state_dict().items()
    )
    content: Any = state
    if config.family == "flux-sae":
        l1 = (config.training or {}).get("l1")
        about = {
            "use_topk": config.activation == "topk",
            "topk_k": config.k or 0,
            "l1_coeff": l1 if isinstance(l1, float) else 0.0,
        }
        content = {
            "model_state_dict": state,
            "config": {**about, "input_dim": config.d_model, "hidden_dim": config.n_features},
        }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def why_not_difract(config: DictionaryConfig) -> str | None:
    """Why DifFRACT's layout, a bare state dict whose readers apply ReLU, has no words for a dictionary; None: it has.

    Nested prefixes are a way of training: the whole decodes like any other ReLU dictionary.
    """
    if config.family != "difract":
        return f"DifFRACT's layout knows no pre_bias, and it is of the family {config.family}"
    if config.activation != "relu":
        detail = f" (k = {config.k})" if config.k is not None else ""
        return f"readers of DifFRACT's layout apply ReLU, and it is {config.activation}{detail}"
    if config.time_embed_dim is None:
        return "DifFRACT's layout needs time_mlp and mod_linear, and it is not conditioned on the timestep"
    return "DifFRACT's layout has no place for a skip connection" if config.skip else None


def why_not_flux_sae(config: DictionaryConfig) -> str | None:
    """Why FLUX-SAE's layout has no words for an SAE of its family; None: it has."""
    if config.activation not in ("relu", "topk"):
        return f"readers of FLUX-SAE's layout apply ReLU or TopK, and it is {config.activation}"
    return None


def import_file(path: Path, site: str | None = None, kind: Kind | None = None) -> Dictionary:
    """The dictionary in a published `.pt` file; its parent is unknown and its metrics are None.

    `site` and `kind` are only needed where the name does not say them.  `ForeignError` for a file that is
    neither layout, or that holds more than tensors and plain values.
    """
    config, state = _read(path, site, kind)
    dictionary = build(config, empty=True)
    fill(dictionary, state, str(path))
    dictionary.place = path
    return frozen(dictionary)


def outline_file(path: Path) -> Dictionary:
    """The dictionary in a published file without its weights, on the meta device; errors as for `import_file`."""
    config, _ = _read(path, None, None)
    dictionary = build(config, empty=True)
    dictionary.place = path
    return dictionary


def _read(path: Path, site: str | None, kind: Kind | None) -> tuple[DictionaryConfig, Mapping[str, Tensor]]:
    """What a published file says of its dictionary, and its parameters, mapped where the file can be."""
    content = _load(path)
    named = _NAME.fullmatch(path.name)
    if site is None and named is None:
        raise UsageError(
            f"{path.name} does not say which site it belongs to: add --site img_6 (or rename it to sae_img_6.pt)"
        )
    place = Site.parse(site if site is not None else named[2])  # type: ignore[index]  # one of both is there
    said: Kind | None = kind or (named[1] if named else None)  # type: ignore[assignment]
    state, about = (
        (content["model_state_dict"], content.get("config")) if "model_state_dict" in content else (content, None)
    )
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ForeignError(f"{path} is no state dict of a dictionary: it holds {type(state).__name__}")
    if set(state) == _PRE_BIAS:
        return _pre_bias_config(path, place, said, state, about), state
    if set(state) == _CONDITIONED and about is None:
        if said is None:
            raise UsageError(f"{path.name} does not say whether it is a transcoder or an SAE: add --kind transcoder")
        return _conditioned_config(path, place, said, state), state
    odd = ", ".join(sorted(map(str, set(state) ^ _CONDITIONED)))
    raise ForeignError(
        f"{path} is neither DifFRACT's layout nor FLUX-SAE's; against DifFRACT's these keys are missing or "
        f"unknown: {odd}"
    )


def _begun(folder: Path) -> bool:
    """Whether a folder holds nothing, or what an import writes before `config.json` makes it a dictionary."""
    if not folder.is_dir():
        return False
    there = {path.name for path in folder.iterdir() if not is_temporary(path)}
    return there <= {*COVERED, labels.FILE}


def _same(folder: Path, dictionary: Dictionary) -> bool:
    if not (folder / CONFIG).exists():
        return False
    there = load_dictionary(folder)
    return there.config == dictionary.config and to_bytes(there) == to_bytes(dictionary)


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders about pickles that it did not write, and then refuses them
            mapped = zipfile.is_zipfile(
                path
            )  # not copied as a whole before its tensors are: `fill` does that, one by one
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "global" in str(error):  # torch's word for a name that a pickle wants to call
            raise ForeignError(
                f"{path} is refused: it holds more than tensors and plain values, and such a pickle can run code"
            ) from None
        raise ForeignError(f"{path} is no file that torch.save wrote") from None
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
        raise ForeignError(f"{path} is no file that torch.save wrote ({type(error).__name__})") from None
    if not isinstance(content, Mapping):
        raise ForeignError(f"{path} holds a {type(content).__name__}, not the state dict of a dictionary")
    return content


def _conditioned_config(path: Path, site: Site, kind: Kind, state: Mapping[str, Tensor]) -> DictionaryConfig:
    n_features, d_model = _matrix(path, state)
    return DictionaryConfig(
        kind, site, d_model, n_features, time_embed_dim=_matrix(path, state, "time_mlp.0.weight")[1]
    )


def _pre_bias_config(
    path: Path, site: Site, kind: Kind | None, state: Mapping[str, Tensor], about: Any
) -> DictionaryConfig:
    if kind == "transcoder":
        raise UsageError(f"{path} is an SAE by its keys (pre_bias), not a transcoder")
    if not isinstance(about, Mapping) or "use_topk" not in about:
        raise ForeignError(
            f"{path} has pre_bias but no config with use_topk: whether it is ReLU or TopK cannot be told"
        )
    n_features, d_model = _matrix(path, state)
    topk = bool(about["use_topk"])
    k = about.get("topk_k") if topk else None
    if topk and (not isinstance(k, int) or isinstance(k, bool)):
        raise ForeignError(f"{path}: its config says use_topk with topk_k = {k!r}, expected a whole number")
    l1 = about.get("l1_coeff")
    return DictionaryConfig(
        "sae",
        site,
        d_model,
        n_features,
        "topk" if topk else "relu",
        k,
        family="flux-sae",
        training={"l1": float(l1)} if isinstance(l1, (int, float)) and l1 else None,
    )


def _matrix(path: Path, state: Mapping[str, Tensor], name: str = "encoder.weight") -> tuple[int, int]:
    shape = tuple(state[name].shape)
    if len(shape) != 2:
        raise ForeignError(f"{path}: {name} has shape {shape}, expected a matrix")
    return shape
