"""What is analyzed: a store, the dictionaries that belong to its sites, the steps, and the folder of the results.

Everything that could make a result meaningless (a dictionary of another model, width or site; results of another store in
the output folder) is refused here, before anything is computed.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analyze.prompts import prompt_texts
from analyze.rows import StoreRows
from analyze.scoring.matrices import UNFINISHED, ScoreMatrix, step_folder
from analyze.settings import Inputs
from store import Store, open_store
from store.errors import ForeignError, MismatchError, UsageError
from store.files import is_temporary, json_bytes, read_json, remove_leftovers, write_json
from store.sites import Point, Site, choose_sites, parse_numbers, parse_sites
from store.tables import write_table
from train import Dictionary
from train.dictionaries.checkpoint import load_dictionary
from train.dictionaries.collection import outline_dictionaries
from train.dictionaries.hub import on_hub
from train.dictionaries.provenance import check_same_model, model_name
from train.dictionaries.published import import_file
from train.rows.recompute import points_given

RUN_FORMAT = "granary analysis"
RUN_VERSION = 2
IMAGE_COLUMNS = pa.schema(
    [("image", pa.int64()), ("prompt", pa.string()), ("seed", pa.int64()), ("split", pa.string())]
)


@dataclass(frozen=True)
class Subject:
    """One dictionary under analysis."""

    name: str
    """Its folder below OUT: the site, with the kind before it where the site has several dictionaries."""
    outline: Dictionary
    """What it says of itself, without its weights (or with them, for one that was never saved)."""
    identity: str
    """SHA-256 of its weights and of what makes it compute what it computes."""

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary with its weights: read when it is asked for, and again when `RECENT` others were since."""
        if self.place is None:
            return self.outline
        key = (self.place, self.identity)  # another may lie at the same place later in a long session
        with _lock:
            found = _recent.pop(key, None) or self.fresh()
            _recent[key] = found
            for old in list(_recent)[:-RECENT]:
                del _recent[old]
        return found

    def fresh(self) -> Dictionary:
        """The same, read again and kept nowhere; `MismatchError` when another lies at its place by now."""
        if self.place is None:
            return self.outline
        found = loaded(self.place)
        if (identity := dictionary_identity(found)) != self.identity:
            raise MismatchError(
                f"{self.place} holds another dictionary than when this command began: {identity[:16]}…, expected "
                f"{self.identity[:16]}…: run it again, with a new --out if scores of the old one are in this one"
            )
        return found

    @property
    def place(self) -> Path | None:
        """Where it lies, a folder or a `.pt` file: its labels are there; None for one that was never saved."""
        return self.outline.place

    @property
    def site(self) -> Site:
        """Where it reads."""
        return self.outline.site

    @property
    def point(self) -> Point:
        """What it reads: `mlp_in` for a transcoder, `mlp_out` for an SAE."""
        return self.outline.input_point

    @property
    def n_features(self) -> int:
        """Its width."""
        return int(self.outline.config.n_features)


RECENT = 4
"""dictionaries whose weights are kept"""
_recent: dict[tuple[Path, str], Dictionary] = {}
_lock = threading.Lock()


def loaded(place: Path) -> Dictionary:
    """The dictionary in a folder of ours or in a published file, with its weights."""
    return load_dictionary(place) if place.is_dir() else import_file(place)


@dataclass(frozen=True)
class Analysis:
    """A store, the dictionaries chosen for it, the steps, and where results go."""

    store: Store
    subjects: tuple[Subject, ...]
    steps: tuple[int, ...]
    out: Path
    unchecked: tuple[str, ...] = ()
    """Dictionaries of which it is not known whether they belong to the store's model, because one of both does not say."""

    @cached_property
    def rows(self) -> StoreRows:
        """Reads the store's activations, mlp_out computed where it is not stored."""
        return StoreRows(self.store)

    def matrix(self, subject: Subject, step: int) -> ScoreMatrix:
        """The scores of one dictionary and step.

        `UsageError` when they are not there, `MismatchError` when they are another's or made with other choices than OUT.
        """
        matrix = ScoreMatrix.open(step_folder(self.out, subject.name, step))
        found = matrix.attributes
        if found.get("dictionary") != subject.identity:
            raise MismatchError(
                f"{matrix.folder} holds scores of another dictionary: {found.get('dictionary_name')} "
                f"{str(found.get('dictionary'))[:16]}…, expected {subject.outline.name} {subject.identity[:16]}…: "
                "choose another --out for these dictionaries"
            )
        made = check_output(self)
        here = {
            "store": self.store.id, "site": str(subject.site), "step": step,
            "padding_counted": made.get("padding"), "active_above": made.get("active_above"),
        }  # fmt: skip
        for key, value in here.items():
            if found.get(key) != value:
                raise MismatchError(
                    f"{matrix.folder} holds scores of another {key}: {found.get(key)}, expected {value}: "
                    "choose another --out, or remove that folder"
                )
        return matrix

    def notes(self) -> list[str]:
        """What a reader of the results has to know of the inputs: recomputed targets, dictionaries of unknown parents."""
        found = []
        if self.store.recomputed:
            found.append("targets are recomputed: mlp_out = MLP(mlp_in) in float32, by the MLPs that the store carries")
        if self.unchecked:
            model = model_name(self.store.meta.model)
            found.append(
                f"note: that {', '.join(self.unchecked)} belong to the store's model, {model}, is not checked: "
                "the dictionaries or the store do not say what they come from (parent: unknown)"
            )
        return found

    def streams(self) -> tuple[str, ...]:
        """The streams of the dictionaries, `img` first."""
        found = {subject.site.stream for subject in self.subjects}
        return tuple(stream for stream in ("img", "txt", "joint") if stream in found)


def open_analysis(settings: Inputs) -> Analysis:
    """The store and dictionaries that `settings` name, checked against one another; every refusal is a `GranaryError`."""
    if settings.out.exists() and not settings.out.is_dir():
        raise UsageError(f"--out {settings.out} is a file: name a folder, which may be new")
    store = open_store(settings.store)
    steps = _steps(store, settings.steps)
    every = settings.sites.strip() == "all" or not on_hub(
        settings.dictionaries
    )  # a folder of others need not be fetched
    wanted = None if every else parse_sites(settings.sites)
    found = outline_dictionaries(settings.dictionaries, wanted)  # refuses a folder without any, or with one twice
    at = {dictionary.site for dictionary in found}
    chosen = set(choose_sites(settings.sites, sorted(at), str(settings.dictionaries)))
    dictionaries = [dictionary for dictionary in found if dictionary.site in chosen]
    unchecked = tuple(dictionary.name for dictionary in dictionaries if not check_fits(dictionary, store))
    several = {site for site in at if sum(dictionary.site == site for dictionary in found) > 1}
    subjects = [
        Subject(d.name if d.site in several else str(d.site), d, _identity(d))
        for d in sorted(dictionaries, key=lambda d: (d.site.kind, d.site.stream, d.site.layer, d.name))
    ]
    return Analysis(store, tuple(subjects), steps, settings.out, unchecked)


def check_fits(dictionary: Dictionary, store: Store) -> bool:
    """Whether a dictionary is known to be of the store's model; `MismatchError`, naming both, when it cannot belong to it."""
    name, there = dictionary.name, f"store {store.path}"
    if dictionary.site not in store.sites:
        has = ", ".join(map(str, store.sites))
        raise MismatchError(
            f"{name} is a dictionary of {dictionary.site}, which {there} has not; it has {has}: choose with --sites"
        )
    if dictionary.config.d_model != store.meta.d_model:
        raise MismatchError(
            f"{name} has d_model {dictionary.config.d_model}, the activations of {there} have {store.meta.d_model}: "
            "it was trained on another model; analyze it on a store of its own"
        )
    known = False
    if dictionary.config.parent is not None:
        known = check_same_model(
            name, dictionary.config.parent.model, there, store.meta.model, "analyze it on a store of its own model"
        )
    given = points_given(store.points, store.recomputed)
    if dictionary.input_point not in given:
        raise MismatchError(
            f"{name} reads {dictionary.input_point}, {there} keeps {', '.join(given)} only: harvest with "
            "--targets stored or recomputed, or choose other dictionaries"
        )
    return known


def dictionary_identity(dictionary: Dictionary) -> str:
    """SHA-256 over kind, site, activation and every weight: equal exactly when two dictionaries compute the same."""
    config = dictionary.config
    architecture = (config.kind, str(config.site), config.family, config.activation, config.k, config.time_embed_dim)
    digest = hashlib.sha256(repr(architecture).encode())
    for name, tensor in sorted(dictionary.state_dict().items()):
        values = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _identity(outline: Dictionary) -> str:
    """The identity of a dictionary whose weights are read, checked, and let go again: of many, one is held at a time."""
    assert outline.place is not None
    return dictionary_identity(loaded(outline.place))


def _steps(store: Store, text: str) -> tuple[int, ...]:
    steps = store.steps if text.strip() == "all" else parse_numbers(text, max(store.steps) + 1, "step")
    missing = [step for step in steps if step not in store.steps]
    if missing:
        raise UsageError(
            f"the store has no step {', '.join(map(str, missing))}; it has {', '.join(map(str, store.steps))}"
        )
    if store.n_images == 0:
        raise UsageError("the store holds no images yet: harvest some first")
    return steps


def claim_output(analysis: Analysis, choices: dict[str, Any]) -> None:
    """Mark OUT as the analysis of this store with these choices; refuses what `check_claim` refuses.  Nobody else may do so meanwhile."""
    check_claim(analysis, choices)
    record, images = analysis.out / "run.json", analysis.out / "images.parquet"
    for path in (record, images):
        remove_leftovers(path)
    if not record.exists():
        write_json(record, _record(analysis, choices))
    if not images.exists():
        write_table(images, _images(analysis.store))


def check_claim(analysis: Analysis, choices: dict[str, Any]) -> None:
    """Refuse an OUT that holds something else, or an analysis of another store or of other choices (see `check_output`)."""
    if (analysis.out / "run.json").exists():
        check_output(analysis, _record(analysis, choices))
    elif analysis.out.exists() and not all(is_temporary(p) or p.name == UNFINISHED for p in analysis.out.iterdir()):
        raise UsageError(f"{analysis.out} is not empty and holds no analysis: choose another --out")


def _record(analysis: Analysis, choices: dict[str, Any]) -> dict[str, Any]:
    return {"format": RUN_FORMAT, "version": RUN_VERSION, "store": analysis.store.id, **choices}


def check_output(analysis: Analysis, wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """The choices that OUT was made with.

    `UsageError` when it is no analysis or one of other choices, `MismatchError` when it is of another store.
    """
    path = analysis.out / "run.json"
    if not path.exists():
        raise UsageError(f"{analysis.out} holds no analysis: run python -m analyze scores with the same flags first")
    found = read_json(path)
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (RUN_FORMAT, RUN_VERSION):
        raise ForeignError(f"{path} is not the record of an analysis in format {RUN_VERSION}: choose another --out")
    wanted = wanted or {}
    if found.get("store") != analysis.store.id:
        raise MismatchError(
            f"{analysis.out} holds the analysis of store {found.get('store')}, not of {analysis.store.path}, which is "
            f"{analysis.store.id}: choose another --out, or the store that it was made from"
        )
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UsageError(
                f"{analysis.out} holds another run ({key} {found.get(key)!r}, now {value!r}): choose another --out"
            )
    return found


def check_results(out: Path, record: Mapping[str, Any], what: str) -> None:
    """Refuse an OUT that holds something else than `what`, or what another record (its `run.json`, with format and version) made.

    `UsageError` says the first difference; `ForeignError` where the record there is none of this format.
    """
    path = out / "run.json"
    if not path.exists():
        if out.exists() and not all(is_temporary(each) for each in out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no {what}: choose another --out")
        return
    found, now = read_json(path), json.loads(json_bytes(dict(record)))
    if not isinstance(found, dict) or any(found.get(name) != now[name] for name in ("format", "version")):
        raise ForeignError(
            f"{path} is not the record of {what} in format {now['version']}: choose another --out, or finish it with the version of "
            "Granary that began it"
        )
    if (difference := _difference(found, now)) is not None:
        raise UsageError(f"{out} was made with {difference}: choose another --out")


def _difference(before: Any, now: Any) -> str | None:
    """The first thing that differs, in words; None where nothing does."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))
        return f"{name} {_difference(before.get(name), now.get(name))}"
    if all(isinstance(value, list) and all(isinstance(each, dict) for each in value) for value in (before, now)):
        if len(before) != len(now):
            return f"({len(before)} of them, now {len(now)})"
        place = next(place for place, (one, other) in enumerate(zip(before, now, strict=True)) if one != other)
        return f"{place} {_difference(before[place], now[place])}"
    return f"{_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _images(store: Store) -> pa.Table:
    """What belongs to the rows of every score matrix: image, prompt, seed, split."""
    table = store.prompt_columns("image", "prompt", "seed", "split", if_there=True)  # texts are not kept in memory
    if "prompt" not in table.column_names:
        table = table.append_column("prompt", pa.array(prompt_texts(store), pa.string()))
    return table.select(["image", "prompt", "seed", "split"]).cast(IMAGE_COLUMNS).replace_schema_metadata(None)


def sigmas(store: Store, step: int) -> np.ndarray:
    """Sigma of every image at one step, as the transformer received it: float32 (image,)."""
    return np.asarray(pc.list_element(store.prompts()["sigma"], step).to_numpy(), np.float32)
