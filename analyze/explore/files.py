"""Experiments of the page as files: what is saved here, `analyze steer --experiment` draws again, byte for byte; and back."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from analyze.explore.readings import readable
from analyze.explore.rows import EditRow, off_text, rows_of
from analyze.explore.settings import ExploreSettings
from analyze.explore.studio import Studio
from analyze.steering.documents import document_bytes
from analyze.steering.drawing import Shot
from analyze.steering.edits import Intervention, Method
from analyze.steering.experiment import ALL, Experiment, Variant
from analyze.steering.feature_changes import Key
from analyze.steering.interventions import needed
from analyze.steering.resolving import resolve
from analyze.steering.settings import SteerSettings
from store.errors import MismatchError, UsageError
from store.files import write_bytes

NAME = re.compile(r"[\w][\w .-]{0,79}")


def experiment_bytes(studio: Studio, shot: Shot, intervention: Intervention) -> bytes:
    """The experiment file, everything settled, of what the page draws; `UsageError` for an intervention that changes nothing."""
    if not intervention.edits and not intervention.off:
        raise UsageError("there is nothing to save yet: name a feature, such as img_3:66, or a stream that is off")
    studio.check(intervention)
    keys = needed([intervention], studio.shelf.outlines)
    settled = tuple(replace(edit, tokens=edit.tokens.resolved(studio.canvas.grid)) for edit in intervention.edits)
    return document_bytes(
        Experiment(
            name=intervention.name,
            shots=(shot,),
            variants=(Variant(replace(intervention, edits=settled)),),
            canvas=studio.canvas,
            batch_size=studio.painter.batch_size,
            supernodes={},
            identities={key: studio.shelf.identity(key) for key in keys},
            peaks=_peaks(studio, intervention),
            store=studio.store.id,
            judge=ALL if readable(studio, studio.canvas.height, studio.canvas.width) else None,
        ).document()
    )


def _peaks(studio: Studio, intervention: Intervention) -> dict[Key, dict[int, float]]:
    """The peaks that strengths count in, of the features that need them."""
    found: dict[Key, dict[int, float]] = {}
    for edit in intervention.edits:
        if edit.unit == "peak":
            assert studio.peaks is not None, "an edit that counts in peaks was checked without any"
            ((site, kind),) = needed([Intervention("one", (edit,))], studio.shelf.outlines)
            known = found.setdefault((site, kind), {})
            known |= {feature: float(studio.peaks[site, kind][feature]) for feature in edit.features}
    return {key: dict(sorted(known.items())) for key, known in sorted(found.items())}


def save(folder: Path, name: str, data: bytes) -> Path:
    """Where the experiment lies now, `folder/NAME.yaml`; `UsageError` for a name that is none, or one that is taken by another."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a file: write up to 80 letters, digits, blanks, points, _ and -")
    path = folder / f"{name.strip().replace(' ', '-')}.yaml"
    if path.exists() and path.read_bytes() != data:
        raise UsageError(f"{path.name} is there already and holds another experiment: choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path


@dataclass(frozen=True)
class Loaded:
    """An experiment file in the words of the page: its first shot and its first variant."""

    shot: Shot
    name: str
    method: Method
    rows: list[EditRow]
    off: str
    notes: list[str]
    """what of the file is not shown"""


def load(path: Path, studio: Studio, settings: ExploreSettings) -> Loaded:
    """What the page shows of an experiment file.

    Errors: whatever `analyze steer` refuses; `MismatchError` for one that is drawn in another size or other steps than here, or
    counts in other peaks; `UsageError` for one that the page has no words for.
    """
    resolved = resolve(
        SteerSettings(
            out=path.parent, store=settings.store, dictionaries=settings.dictionaries, experiment=path,
            analysis=settings.analysis, model=settings.model,
        )
    ).experiment  # fmt: skip
    if resolved.canvas != studio.canvas:
        raise MismatchError(
            f"{path.name} is drawn with other sizes, steps or guidance than this page: python -m analyze steer draws it"
        )
    for key, known in resolved.peaks.items():
        own = None if studio.peaks is None else studio.peaks.get(key)
        if own is None or any(float(own[feature]) != value for feature, value in known.items()):
            raise MismatchError(
                f"{path.name} counts strengths in peaks of another analysis: start explore with --analysis of that one"
            )
    shot, made = resolved.shots[0], resolved.variants[0].intervention
    notes = [
        f"of its {count} {what} the first is here"
        for what, count in (("shots", len(resolved.shots)), ("variants", len(resolved.variants))) if count > 1
    ]  # fmt: skip
    if resolved.batch_size != studio.painter.batch_size:
        notes.append(f"it was drawn in batches of {resolved.batch_size}, so last digits may differ here")
    return Loaded(shot, made.name, made.method, rows_of(made, studio.shelf.outlines), off_text(made.off), notes)
