"""From flags or a file to an `Experiment`: everything is read, checked and settled, and no model is loaded.

1. How is drawn: the store's canvas, or the file's, or a model's defaults, with what the file or the flags choose otherwise.
2. What is drawn: shots from images, prompts and seeds.
3. What is changed: supernodes, variants; each is checked against the dictionaries' outlines and the model's sizes.
4. Dictionaries' identities, peaks: read, compared with those that the file names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analyze.inputs import Subject
from analyze.steering.canvas import (
    TINY_FLUX,
    Canvas,
    canvas_of_document,
    canvas_of_model,
    canvas_of_store,
    transformer_of_files,
)
from analyze.steering.comparing import judged
from analyze.steering.documents import read_document
from analyze.steering.drawing import BATCH_SIZE
from analyze.steering.edits import KINDS, FeatureEdit, Intervention
from analyze.steering.experiment import ALL, NONE, Experiment, Variant, check_keys, peak_arrays, told, variants_of
from analyze.steering.feature_changes import Key
from analyze.steering.interventions import check, needed
from analyze.steering.judging import check_asked
from analyze.steering.peaks import read_peaks
from analyze.steering.settings import OF_SHOTS, SteerSettings
from analyze.steering.shelf import Shelf, checked_against, shelf_of
from analyze.steering.shots import shots_asked
from analyze.steering.wording import Members, number, supernode_in, supernode_members
from store import Site, Store, open_store
from store.errors import MismatchError, UsageError
from train.dictionaries.config import Kind

FLAGS = "the command"
"""what messages call the flags, where a file would be named"""
Peaks = dict[Key, dict[int, float]]


@dataclass(frozen=True)
class Resolved:
    """An experiment that can be drawn, and what it is drawn with."""

    experiment: Experiment
    shelf: Shelf
    store: Store | None


def resolve(settings: SteerSettings) -> Resolved:
    """The experiment that the settings ask for.

    Errors: `UsageError` for anything that cannot be (unknown keys, features, layers, steps, tokens, strengths that are no numbers, empty
    supernodes …), `MismatchError` for a store, dictionaries or a model other than the file was made with.
    """
    document, where, folder = _document(settings)
    check_keys(document, where)
    store = None if settings.store is None else open_store(settings.store)
    if store is not None and document.get("store") not in (None, store.id):
        raise MismatchError(
            f"{where} was made with store {document['store']}, {store.path} is {store.id}: give that store, or take the keys store, "
            "shots and drawing out of the file to run it on another"
        )
    canvas, batch_size = _canvas(settings, document, where, store)
    shots = shots_asked(document, where, folder, store)
    supernodes = _supernodes(document.get("supernodes"), where)
    variants = variants_of(document, supernodes, canvas.n_blocks, where)
    shelf = shelf_of(settings.dictionaries, canvas)
    for made in (variant.intervention for variant in variants):
        if settings.dictionaries is None and (made.edits or made.splice):
            raise UsageError(f"{made.name}: give --dictionaries, the folder of the dictionaries that it changes")
    variants = tuple(replace(v, intervention=_with_files(v.intervention, folder)) for v in variants)
    peaks = _peaks(settings, document, where, variants, shelf)
    settled = document.get("dictionaries") is not None  # a file that was written by a program, every strength in it
    for variant in variants:
        _check(variant.intervention, shelf, canvas, peaks)
        if variant.strength is None and variant.intervention.idle and not settled:
            raise UsageError(
                f"{variant.name} changes nothing, its strength leaves everything as it is: write amplify:4, or give --strengths"
            )
    variants = tuple(replace(v, intervention=_settled(v.intervention, shelf, canvas)) for v in variants)
    name = document.get("name")
    if name is None:
        name = told(document, where) or (variants[0].name if len(variants) == 1 else "steering")
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{where}: the name {name!r} is no text")
    if store is None and "transformer" not in canvas.weights:
        keys = needed([variant.intervention for variant in variants], shelf.outlines)
        shelf = checked_against(shelf, keys, canvas, transformer_of_files(canvas) if keys else None)
    experiment = Experiment(
        name=name,
        shots=shots,
        variants=variants,
        canvas=canvas,
        batch_size=batch_size,
        supernodes=supernodes,
        identities=_identities(document, where, variants, shelf),
        peaks=peaks,
        store=store.id if store is not None else document.get("store"),
        judge=_judge(document.get("judge"), canvas, where),
        clip=_clip(document.get("clip"), where),
    )
    return Resolved(experiment, shelf, store)


def _document(settings: SteerSettings) -> tuple[dict[str, Any], str, Path]:
    """What is asked for, what messages call it, and the folder that its file names start from."""
    if settings.experiment is None:
        return settings.document(), FLAGS, Path()
    found, where = read_document(settings.experiment), str(settings.experiment)
    asked = settings.shots()
    if asked and any(found.get(key) is not None for key in ("shots", *OF_SHOTS)):
        raise UsageError(f"{where} says what is drawn: leave out --{next(iter(asked))}, or take it out of the file")
    if asked.get("prompts") and settings.prompts is not None:
        asked["prompts"] = str(settings.prompts.absolute())
    return {**found, **asked}, where, settings.experiment.parent


def _canvas(
    settings: SteerSettings, document: Mapping[str, Any], where: str, store: Store | None
) -> tuple[Canvas, int]:
    """How is drawn, and how many pictures at once."""
    drawing = document.get("drawing") or {}
    if not isinstance(drawing, dict):
        raise UsageError(f"{where}: drawing is {drawing!r}; write a mapping with keys such as num_inference_steps")
    for flag in ("dtype", "batch_size"):
        asked = getattr(settings, flag)
        if asked is not None and drawing.get(flag, asked) != asked:
            raise UsageError(
                f"{where} was drawn with {flag.replace('_', ' ')} {drawing[flag]}, --{flag.replace('_', '-')} is {asked}: leave the flag "
                "out, or take it out of the file"
            )
    if store is not None:
        canvas = canvas_of_store(store, settings.model, settings.dtype)
    elif "weights_dtype" in drawing or settings.model is None:
        canvas = canvas_of_document({**drawing, **_given(settings)}, where, settings.model)
    else:
        canvas = canvas_of_model(settings.model, settings.dtype, settings.device)
    canvas = canvas.changed(drawing, where)
    own = BATCH_SIZE if store is None else store.meta.batch_size
    batch_size = settings.batch_size or drawing.get("batch_size", own)
    if type(batch_size) is not int or batch_size < 1:
        raise UsageError(f"{where}: batch_size is {batch_size!r}; it must be a whole number from 1 on")
    return canvas, batch_size


def _given(settings: SteerSettings) -> dict[str, Any]:
    return {} if settings.dtype is None else {"dtype": settings.dtype}


def _judge(asked: Any, canvas: Canvas, where: str) -> str | None:
    """What tiny-flux's judge is asked; None where it is left out, or cannot read such pictures and was not asked for."""
    from harvest.tiny_flux.scenes import PIXELS

    readable = canvas.model_name == TINY_FLUX and (canvas.height, canvas.width) == (PIXELS, PIXELS)
    if asked == NONE or (asked is None and not readable):
        return None
    if not readable:
        raise UsageError(
            f"{where}: judge {asked!r}: the judge reads tiny-flux's pictures of {PIXELS} x {PIXELS} pixels, these are of "
            f"{canvas.model_name}, {canvas.width} x {canvas.height}: leave the judge out"
        )
    if asked is None or asked == ALL:
        return ALL
    if not isinstance(asked, str):
        raise UsageError(f"{where}: judge is {asked!r}; write colour=red, colour, {ALL} or {NONE}")
    attribute, value = judged(asked)
    check_asked(attribute, [value])
    return asked


def _clip(asked: Any, where: str) -> dict[str, str] | None:
    """Name and identity of the CLIP model that a file names."""
    found = {"name": asked} if isinstance(asked, str) else asked
    if found is not None and not (
        isinstance(found, dict) and "name" in found and set(found) <= {"name", "identity"}
        and all(isinstance(value, str) for value in found.values())
    ):  # fmt: skip
        raise UsageError(
            f"{where}: clip is {asked!r}; write the name of a CLIP model, or a mapping with name and identity"
        )
    return found


def _supernodes(asked: Any, where: str) -> dict[str, Members]:
    """The supernodes of a file (a mapping) or of the flags (a list of texts)."""
    if asked is None:
        return {}
    if isinstance(asked, dict):
        return {name: supernode_members(name, members) for name, members in asked.items()}
    if not isinstance(asked, list) or not all(isinstance(each, str) for each in asked):
        raise UsageError(f"{where}: supernodes is {asked!r}; write a mapping such as red: img_3:66+txt_2:5")
    found: dict[str, Members] = {}
    for text in asked:
        name, members = supernode_in(text)
        if name in found:
            raise UsageError(f"supernode {name!r} is given twice")
        found[name] = members
    return found


def _with_files(made: Intervention, folder: Path) -> Intervention:
    """The same with its mask files found from the folder of the experiment file."""

    def found(edit: FeatureEdit) -> FeatureEdit:
        mask = edit.tokens.mask
        return replace(edit, tokens=replace(edit.tokens, mask=folder / mask)) if isinstance(mask, Path) else edit

    return replace(made, edits=tuple(found(edit) for edit in made.edits))


def _check(made: Intervention, shelf: Shelf, canvas: Canvas, peaks: Peaks) -> None:
    """Refuse what cannot be drawn."""
    arrays = peak_arrays(peaks, shelf.outlines)
    tokens = {str(stream): count for stream, count in canvas.tokens.items()}
    check(
        made, shelf.outlines, canvas.n_blocks, tokens, canvas.num_inference_steps, canvas.grid, arrays, canvas.d_model
    )


def _settled(made: Intervention, shelf: Shelf, canvas: Canvas) -> Intervention:
    """The same with the kind of every dictionary said, and positions in place of masks."""

    def settled(edit: FeatureEdit) -> FeatureEdit:
        ((_, kind),) = needed([Intervention("one", (edit,))], shelf.outlines)
        return replace(edit, kind=kind, tokens=edit.tokens.resolved(canvas.grid))  # type: ignore[arg-type]

    both = [site for site in made.spliced if all((site, kind) in shelf.outlines for kind in KINDS)]
    splice = tuple(
        (site, kind or _standing(made, site, shelf)) if site in both else site for site, kind in made.spliced.items()
    )
    return replace(made, edits=tuple(settled(edit) for edit in made.edits), splice=splice)


def _standing(made: Intervention, site: Site, shelf: Shelf) -> Kind:
    """The kind of the dictionary that is edited at a spliced site, and so stands for its MLP."""
    keys = needed([made], shelf.outlines)
    return next(kind for kind in KINDS if (site, kind) in keys)


def _identities(document: Mapping[str, Any], where: str, variants: tuple[Variant, ...], shelf: Shelf) -> dict[Key, str]:
    """SHA-256 of the dictionaries that are used; `MismatchError` where the file names others."""
    named = document.get("dictionaries")
    if named is not None and not isinstance(named, dict):
        raise UsageError(f"{where}: dictionaries is {named!r}; write a mapping of names to SHA-256, or leave it out")
    keys = needed([variant.intervention for variant in variants], shelf.outlines)
    found = {key: shelf.identity(key) for key in keys}
    for (site, kind), identity in found.items():
        wanted = identity if named is None else named.get(f"{kind}_{site}")
        if wanted != identity:
            raise MismatchError(
                f"{where} was made with another {kind}_{site}: {str(wanted)[:16]}…, here it is {identity[:16]}…; give those dictionaries, "
                "or take the key dictionaries out of the file to run it with others"
            )
    return found


def _peaks(
    settings: SteerSettings, document: Mapping[str, Any], where: str, variants: tuple[Variant, ...], shelf: Shelf
) -> Peaks:
    """The peaks that strengths count in: those of the file, or of the analysis."""
    wanted: dict[Key, set[int]] = {}
    for edit in (edit for variant in variants for edit in variant.intervention.edits if edit.unit == "peak"):
        for key in needed([Intervention("one", (edit,))], shelf.outlines):
            width = shelf.outlines[key].config.n_features
            wanted.setdefault(key, set()).update(feature for feature in edit.features if feature < width)
    if not wanted or document.get("peaks") is not None:
        return _peaks_of_file(document.get("peaks") or {}, where, wanted)
    if settings.analysis is None:
        return {}  # which `check` refuses with the edit's name
    subjects = [Subject(_scored_as(key, shelf), shelf.outlines[key], shelf.identity(key)) for key in wanted]
    known = read_peaks(settings.analysis, subjects)
    return {
        key: {feature: float(known[key][feature]) for feature in sorted(features)}
        for key, features in sorted(wanted.items())
        if key in known
    }


def _scored_as(key: Key, shelf: Shelf) -> str:
    """What `analyze scores` calls a dictionary's folder: its site, with its kind where the site has several."""
    site, kind = key
    several = sum(other == site for other, _ in shelf.outlines) > 1
    return f"{kind}_{site}" if several else str(site)


def _peaks_of_file(asked: Any, where: str, wanted: Mapping[Key, set[int]]) -> Peaks:
    if not isinstance(asked, dict):
        raise UsageError(f"{where}: peaks is {asked!r}; write a mapping such as transcoder_img_3: {{66: 3.2}}")
    found: Peaks = {}
    for key, features in sorted(wanted.items()):
        name = f"{key[1]}_{key[0]}"
        known = asked.get(name)
        if not isinstance(known, dict) or any(
            feature not in known and str(feature) not in known for feature in features
        ):
            raise UsageError(
                f"{where}: peaks says not all of {name} {sorted(features)}, whose strengths count in peaks"
            )
        found[key] = {
            feature: number(f"{where}: the peak of {name} {feature}", known.get(feature, known.get(str(feature))))
            for feature in sorted(features)
        }
    return found
