"""What the page draws with: one model, one picture at a time; plain pictures are kept, so a slider costs one run.

    studio = open_studio(settings)                      # everything is refused here, before the model is loaded
    seen = studio.draw(Shot("a red circle", 3), made)   # plain, changed, their distances, what it cost

A picture is drawn alone, in a batch of one, as `analyze steer` draws it again from the saved file: so both give the same bytes.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from PIL import Image
from torch import Tensor

from analyze.explore.settings import ExploreSettings
from analyze.inputs import Subject
from analyze.steering.canvas import Canvas, canvas_of_store
from analyze.steering.distances import distances
from analyze.steering.drawing import Painter, Shot, open_painter
from analyze.steering.interventions import Intervention, Peaks, check
from analyze.steering.peaks import read_peaks
from analyze.steering.shelf import Shelf, shelf_of
from store import Store, open_store
from store.errors import Interrupted, UsageError

KEPT = 32
"""plain pictures that are kept"""


@dataclass(frozen=True)
class Seen:
    """One drawing: what it shows, and what it cost."""

    shot: Shot
    intervention: Intervention
    plain: Image.Image
    changed: Image.Image
    distances: Mapping[str, float]
    forwards: int
    """passes through the transformer, those of the plain picture included where it was not kept from before"""
    seconds: float


@dataclass
class Studio:
    """A model with its dictionaries, ready to draw for one page after another."""

    store: Store
    canvas: Canvas
    shelf: Shelf
    peaks: Peaks | None
    painter: Painter
    drawn: int = 0
    """pictures so far"""
    stopping: bool = False
    """set when the program ends: a picture that is being drawn is given up at its next step"""
    _plain: "OrderedDict[Shot, tuple[Image.Image, Tensor]]" = field(default_factory=OrderedDict, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    @property
    def forwards(self) -> int:
        """Passes through the transformer so far."""
        return self.painter.forwards

    def check(self, intervention: Intervention) -> None:
        """Nothing, or the error that says what of it this model and these dictionaries have not; nothing is drawn."""
        canvas, tokens = self.canvas, {str(stream): count for stream, count in self.canvas.tokens.items()}
        check(
            intervention, self.shelf.outlines, canvas.n_blocks, tokens, canvas.num_inference_steps, canvas.grid,
            self.peaks, canvas.d_model,
        )  # fmt: skip

    def draw(self, shot: Shot, intervention: Intervention) -> Seen:
        """The picture without and with the intervention; others wait meanwhile.  Errors: those of `check` and of `Painter.draw`."""
        self.check(intervention)
        with self._lock:
            started, before = time.monotonic(), self.painter.forwards
            plain, latents = self._drawn_plain(shot)
            changed, changed_latents = self._one(shot, intervention)
            found = distances([plain], [changed], latents, changed_latents)
            return Seen(
                shot, intervention, plain, changed, {name: float(values[0]) for name, values in found.items()},
                self.painter.forwards - before, time.monotonic() - started,
            )  # fmt: skip

    def _drawn_plain(self, shot: Shot) -> tuple[Image.Image, Tensor]:
        if shot not in self._plain:
            self._plain[shot] = self._one(shot, None)
        self._plain.move_to_end(shot)
        while len(self._plain) > KEPT:
            self._plain.popitem(last=False)
        return self._plain[shot]

    def _one(self, shot: Shot, intervention: Intervention | None) -> tuple[Image.Image, Tensor]:
        drawing = self.painter.draw([shot], intervention, on_step=self._step_ended)
        assert drawing.pictures is not None
        self.drawn += 1
        return drawing.pictures[0], drawing.latents

    def _step_ended(self, _first: int, _step: int, _captured: Any) -> None:
        if self.stopping:
            raise Interrupted("the program ends: this picture was given up")


@dataclass(frozen=True)
class Prepared:
    """Everything but the model: checked, and cheap to make."""

    store: Store
    canvas: Canvas
    shelf: Shelf
    peaks: Peaks | None


def prepare(settings: ExploreSettings) -> Prepared:
    """What the settings name, checked against one another; no model and no weights are loaded.

    Errors: `UsageError` and `MismatchError` for a store, dictionaries or an analysis that are not there or do not belong together.
    """
    store = open_store(settings.store)
    canvas = canvas_of_store(store, settings.model, settings.dtype)
    shelf = shelf_of(settings.dictionaries, canvas)
    if not any(site.kind == "double" for site, _ in shelf):
        raise UsageError(
            f"{settings.dictionaries} has no dictionary of a double block: nothing there can be steered by yet"
        )
    return Prepared(store, canvas, shelf, None)


def load(prepared: Prepared, settings: ExploreSettings, subjects: "tuple[Subject, ...]" = ()) -> Studio:
    """The studio, its model loaded: what takes a minute with FLUX."""
    device = None if settings.device == "auto" else settings.device
    peaks = read_peaks(settings.analysis, subjects) if settings.analysis is not None else None
    painter = open_painter(
        prepared.store, settings.model, device, settings.dtype, 1, prepared.shelf, peaks, prepared.canvas
    )
    shelf = painter.dictionaries if isinstance(painter.dictionaries, Shelf) else prepared.shelf
    return Studio(prepared.store, prepared.canvas, shelf, peaks, painter)
