"""An experiment: shots, and the interventions under which each is drawn besides plain; and the file that says all of it.

An experiment file is a mapping in YAML or JSON.  By hand, a few keys do:

    images: 0-7                      # of the store; or prompts: [a red circle …] with seeds: 0-3
    supernodes: {red: img_3:66+txt_2:5}
    edits: ["amplify red @steps=2-3"]
    strengths: [0, 1, 2, 4]          # a variant each

OUT/experiment.yaml is the same with everything resolved: shots, features, positions, dictionaries and weights by their SHA-256,
the sampler's settings, batch size and threads.  `--experiment OUT/experiment.yaml` draws the same bytes again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analyze.steering.canvas import Canvas
from analyze.steering.drawing import Shot
from analyze.steering.edits import FeatureEdit, Intervention, StreamOff
from analyze.steering.feature_changes import Key
from analyze.steering.wording import (
    Members,
    edits_from,
    edits_in,
    members_text,
    method_in,
    number,
    off_from,
    off_in,
    splice_text,
    splices_in,
    strengths_in,
)
from store.errors import ForeignError, UsageError
from train import Dictionary

FORMAT, VERSION = "granary experiment", 1
PLAIN = "plain"
"""the name of what every shot is drawn as first: without an intervention"""
NONE, ALL = "none", "all"
"""the judge is left out; the judge says only what was kept"""
NAME_CHARACTERS = 60
NOTHING_REPLACED = "the method replacement is about edits, and there is none: leave it out, or splice a site"
OF_A_VARIANT = ("name", "edits", "off", "method", "splice", "strength")
OF_AN_EXPERIMENT = (
    "format", "version", "name", "store", "images", "prompts", "seeds", "shots", "supernodes", "edits", "off", "splice", "method",
    "strengths", "variants", "drawing", "dictionaries", "peaks", "clip", "judge",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way in which every shot is drawn."""

    intervention: Intervention
    strength: float | None = None
    """its place in a sweep, where it is of one"""

    @property
    def name(self) -> str:
        """As tables and grids call it."""
        return self.intervention.name


@dataclass(frozen=True)
class Experiment:
    """What is drawn, everything settled: equal experiments give equal bytes on one kind of device."""

    name: str
    shots: tuple[Shot, ...]
    variants: tuple[Variant, ...]
    canvas: Canvas
    batch_size: int
    supernodes: Mapping[str, Members]
    identities: Mapping[Key, str]
    """SHA-256 of the dictionaries that the variants use"""
    peaks: Mapping[Key, Mapping[int, float]]
    """greatest activations of the features whose strength counts in peaks"""
    store: str | None
    """id of the store that shots or drawing come from"""
    judge: str | None
    """what tiny-flux's judge is asked: `colour=red`, `colour`, `all` (only what was kept); None where it cannot read the pictures"""
    clip: Mapping[str, str] | None = None
    """name and identity of the CLIP model that compares pictures"""

    @property
    def interventions(self) -> tuple[Intervention | None, ...]:
        """Plain, then each variant's."""
        return None, *(variant.intervention for variant in self.variants)

    @property
    def names(self) -> tuple[str, ...]:
        """Plain, then each variant's."""
        return PLAIN, *(variant.name for variant in self.variants)

    @property
    def pictures(self) -> int:
        """How many pictures are drawn."""
        return len(self.shots) * (len(self.variants) + 1)

    @property
    def forwards(self) -> int:
        """How many passes through the transformer that takes, one a picture and step."""
        return self.pictures * self.canvas.num_inference_steps

    def document(self) -> dict[str, Any]:
        """As the file carries it; `experiment_of` reads it back."""
        found: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": self.name}
        if self.supernodes:
            found["supernodes"] = {name: members_text(members) for name, members in self.supernodes.items()}
        found["variants"] = [_variant_document(variant) for variant in self.variants]
        found["shots"] = [_shot_document(shot) for shot in self.shots]
        found["drawing"] = {**self.canvas.document(), "batch_size": self.batch_size}
        found["store"] = self.store
        found["dictionaries"] = {f"{kind}_{site}": identity for (site, kind), identity in self.identities.items()}
        if self.peaks:
            found["peaks"] = {f"{kind}_{site}": dict(known) for (site, kind), known in self.peaks.items()}
        found["judge"] = self.judge or NONE
        if self.clip is not None:
            found["clip"] = dict(self.clip)
        return found


def peak_arrays(peaks: Mapping[Key, Mapping[int, float]], outlines: Mapping[Key, Dictionary]) -> dict[Key, np.ndarray]:
    """The peaks as `interventions.changes` takes them: (feature,) float32, NaN where none is known."""
    found = {}
    for key, known in peaks.items():
        values = np.full(outlines[key].config.n_features, np.nan, np.float32)
        values[list(known)] = list(known.values())
        found[key] = values
    return found


def _shot_document(shot: Shot) -> dict[str, Any]:
    image = {} if shot.image is None else {"image": shot.image}
    return {**image, "seed": shot.seed, "prompt": shot.prompt}


def _variant_document(variant: Variant) -> dict[str, Any]:
    made = variant.intervention
    found: dict[str, Any] = {"name": made.name}
    if variant.strength is not None:
        found["strength"] = variant.strength
    found["method"] = made.method
    if made.edits:
        found["edits"] = [_edit_document(edit) for edit in made.edits]
    if made.off:
        found["off"] = [_off_document(off) for off in made.off]
    if made.splice:
        found["splice"] = [splice_text(each) for each in made.splice]
    return found


def _edit_document(edit: FeatureEdit) -> dict[str, Any]:
    found: dict[str, Any] = {"mode": edit.mode}
    if edit.mode != "zero":
        found["strength"] = edit.strength
    found |= {"site": str(edit.site), "features": list(edit.features), "kind": edit.kind}
    if edit.steps is not None:
        found["steps"] = list(edit.steps)
    found["tokens"] = str(edit.tokens)
    if edit.unit != "absolute":
        found["unit"] = edit.unit
    return {**found, "normalised": True} if edit.normalised else found


def _off_document(off: StreamOff) -> dict[str, Any]:
    steps = {} if off.steps is None else {"steps": list(off.steps)}
    return {"stream": off.stream, "layers": list(off.layers), **steps, "parts": list(off.parts)}


def check_keys(document: Mapping[Any, Any], where: str) -> None:
    """`UsageError` for a key that no experiment has, `ForeignError` for another format or version."""
    unknown = [key for key in document if key not in OF_AN_EXPERIMENT]
    if unknown:
        raise UsageError(f"{where}: {unknown[0]!r} is no key of an experiment; there are {', '.join(OF_AN_EXPERIMENT)}")
    found = document.get("format", FORMAT), document.get("version", VERSION)
    if found != (FORMAT, VERSION):
        raise ForeignError(
            f"{where} is {found[0]!r}, version {found[1]!r}; this Granary reads {FORMAT!r}, version {VERSION}"
        )


def variants_of(
    document: Mapping[str, Any], supernodes: Mapping[str, Members], n_blocks: int, where: str
) -> tuple[Variant, ...]:
    """The variants that a file or the flags ask for, those of a sweep one after another.  `UsageError` says what is wrong with them."""
    method = method_in(document.get("method", "difference"))
    alone = {key: document[key] for key in ("edits", "off", "splice") if document.get(key)}
    listed = document.get("variants")
    if listed is not None and alone:
        raise UsageError(f"{where}: {next(iter(alone))} belongs into one of the variants, or leave out variants")
    if listed is None:
        listed = [{"name": document.get("name"), **alone}] if alone else []
    if not isinstance(listed, list) or not listed:
        raise UsageError(
            f'{where} changes nothing: say what, for example --edit "zero img_3:66,70" or --off "txt 0-3", or in a file edits, off, '
            "splice or variants"
        )
    if document.get("method") == "replacement" and not any(_replaces(each) for each in listed):
        raise UsageError(f"{where}: {NOTHING_REPLACED}")
    sweep = strengths_in(document["strengths"]) if document.get("strengths") is not None else None
    found: list[Variant] = []
    for place, each in enumerate(listed):
        variant = _variant(each, place, method, supernodes, n_blocks, where)
        found += [variant] if sweep is None else _swept(variant, sweep, len(listed) > 1, where)
    names = [PLAIN, *(variant.name for variant in found)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{where}: two variants are called {twice[0]!r}; every one needs a name of its own" + (
            " (plain is what is drawn without an intervention)" if twice[0] == PLAIN else ""
        ))  # fmt: skip
    return tuple(found)


def _replaces(asked: Any) -> bool:
    """Whether a variant has edits or splices, which a method is about."""
    return not isinstance(asked, dict) or bool(asked.get("edits") or asked.get("splice"))


def _variant(
    asked: Any, place: int, method: Any, supernodes: Mapping[str, Members], n_blocks: int, where: str
) -> Variant:
    """One variant from its mapping, or from the text of its only edit."""
    if isinstance(asked, str):
        asked = {"name": asked, "edits": [asked]}
    if not isinstance(asked, dict):
        raise UsageError(
            f"{where}: variant {place} is {asked!r}; write an edit such as zero img_3:66, or a mapping with edits"
        )
    unknown = [key for key in asked if key not in OF_A_VARIANT]
    if unknown:
        raise UsageError(f"{where}: {unknown[0]!r} is no key of a variant; there are {', '.join(OF_A_VARIANT)}")
    edits = tuple(edit for each in _listed(asked, "edits", where) for edit in _edits(each, supernodes))
    off = tuple(_off(each, n_blocks) for each in _listed(asked, "off", where))
    splice = tuple(found for each in _listed(asked, "splice", where) for found in splices_in(str(each)))
    name = told(asked, where) if asked.get("name") is None else asked["name"]
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{where}: variant {place} is named {name!r}; a name is a text")
    if not edits and not off and not splice:
        raise UsageError(f"{where}: variant {name!r} changes nothing: give it edits, off or splice")
    own = method_in(asked.get("method", method))
    if asked.get("method") == "replacement" and not (edits or splice):
        raise UsageError(f"{where}: variant {name!r}: {NOTHING_REPLACED}")
    made = Intervention(name, edits, off, own if edits else "difference", tuple(dict.fromkeys(splice)))
    if asked.get("strength") is None:
        return Variant(made)
    strength = number(f"variant {name!r}: strength", asked["strength"])
    return Variant(_with_strength(made, asked, strength, where), strength)


def _with_strength(made: Intervention, asked: Mapping[str, Any], strength: float, where: str) -> Intervention:
    """The variant at the strength that it is given, where its edits have none of their own; those that have one must agree."""
    own = [each for each in _listed(asked, "edits", where) if _says_strength(each)]
    if not own:
        return made.with_strength(strength)
    if other := [edit for edit in made.edits if edit.mode != "zero" and edit.strength != strength]:
        raise UsageError(
            f"{where}: variant {made.name!r} has strength {strength:g}, and its edit is {other[0]}: say the strength once"
        )
    return made


def _says_strength(asked: Any) -> bool:
    """Whether an edit says its strength itself."""
    if isinstance(asked, str):
        return ":" in asked.split()[0]
    return asked.get("strength") is not None


def _swept(variant: Variant, sweep: tuple[float, ...], several: bool, where: str) -> list[Variant]:
    """The variant at each strength of a sweep."""
    if variant.strength is not None:
        raise UsageError(f"{where}: variant {variant.name!r} has a strength already: leave out strengths")
    found = []
    for strength in sweep:
        name = f"{variant.name}, strength {strength:g}" if several else f"strength {strength:g}"
        found.append(Variant(replace(variant.intervention.with_strength(strength), name=name), strength))
    return found


def _listed(asked: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = asked.get(key)
    value = [] if value is None else [value] if isinstance(value, str | dict) else value
    if not isinstance(value, list | tuple):
        raise UsageError(f"{where}: {key} is {value!r}; write a list")
    return list(value)


def _edits(asked: Any, supernodes: Mapping[str, Members]) -> tuple[FeatureEdit, ...]:
    if isinstance(asked, str):
        return edits_in(asked, supernodes)
    if not isinstance(asked, dict):
        raise UsageError(f"edit {asked!r} is neither a text such as zero img_3:66 nor a mapping")
    return edits_from(str(asked), asked, supernodes)


def _off(asked: Any, n_blocks: int) -> StreamOff:
    if isinstance(asked, str):
        return off_in(asked, n_blocks)
    if not isinstance(asked, dict):
        raise UsageError(f"off {asked!r} is neither a text such as txt 0-3 nor a mapping")
    return off_from(str(asked), asked, n_blocks)


def told(asked: Mapping[str, Any], where: str) -> str:
    """A name for a variant without one: what it does, cut where it grows long."""
    words = [each if isinstance(each, str) else str(each) for each in _listed(asked, "edits", where)]
    words += [f"{each} off" for each in _listed(asked, "off", where)]
    words += [f"splice {each}" for each in _listed(asked, "splice", where)]
    told = " + ".join(words)
    return told if len(told) <= NAME_CHARACTERS else told[: NAME_CHARACTERS - 1] + "…"
