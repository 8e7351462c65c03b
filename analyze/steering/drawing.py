"""Draws pictures again, plain or with interventions: the same pipeline, sampler and seeds that made a store.

    painter = open_painter(open_store("demo/store"), dictionaries="demo/dictionaries")
    shots = shots_of(store, range(8))
    plain = painter.draw(shots)
    changed = painter.draw(shots, Intervention("without red", edits=(FeatureEdit(Site.parse("img_3"), (66,), "zero"),)))

A picture depends on its prompt, seed and intervention; in its last digits also on the batch that it was drawn in, as every
matrix product does.  So a caller who wants the same bytes draws the same shots in the same order with the same batch size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from analyze.steering.canvas import PARTS, Canvas, canvas_of_model, canvas_of_store, check_weights
from analyze.steering.interventions import Intervention, Peaks, changes
from analyze.steering.shelf import Shelf, shelf_of
from harvest.capture import Captured
from harvest.replacing import Change, Part
from harvest.replacing import replace as replaced
from store import Site, Store
from store.errors import GranaryError, MismatchError, NonFiniteError, UsageError
from store.sizes import many
from train import Dictionary

if TYPE_CHECKING:
    from harvest.sample import Sampler

BATCH_SIZE = 8
OnStep = Callable[[int, int, Captured], None]
"""is told the number of the batch's first shot, the denoising step that ended, and what was captured of `sites` in it"""


@dataclass(frozen=True)
class Shot:
    """One (prompt, seed) that is drawn."""

    prompt: str
    seed: int
    image: int | None = None
    """its number in the store, where it comes from one"""


@dataclass(frozen=True)
class Drawing:
    """What was drawn, in the order of the shots."""

    pictures: list[Image.Image] | None
    """None where only latents were asked for"""
    latents: Float[Tensor, "shot token channel"]
    """after the last step, before the VAE: float32, on the CPU"""


@dataclass
class Painter:
    """The pipeline that made a store, or a named model, ready to draw."""

    sampler: "Sampler"
    canvas: Canvas
    dictionaries: Mapping[tuple[Site, str], Dictionary]
    """(site, kind) -> `Dictionary`, its weights read when they are first needed"""
    batch_size: int
    peaks: Peaks | None = None
    """greatest activations of features, for edits whose unit is "peak"""
    forwards: int = 0
    """passes through the transformer so far, one a row of a batch and denoising step"""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        return self.canvas.grid

    @property
    def num_steps(self) -> int:
        """Denoising steps of a picture."""
        return self.canvas.num_inference_steps

    def draw(
        self,
        shots: Sequence[Shot],
        interventions: Sequence[Intervention | None] | Intervention | None = None,
        extra: Mapping[tuple[Site, Part], Sequence[Change]] | None = None,
        pictures: bool = True,
        on_step: OnStep | None = None,
        sites: Sequence[Site] = (),
    ) -> Drawing:
        """Draw every shot, batch by batch.

        `interventions`: none, one for all shots, or one (or None) a shot; `extra`: further changes of the model, made after those;
        `on_step(first, step, captured)` is called as each step of each batch ends, with what was read of `sites`.
        Errors: `NonFiniteError` where an intervention drove the model to NaN or infinity, `GranaryError` where a batch does not
        fit into the device's memory.
        """
        each = self._a_row(shots, interventions)
        images: list[Image.Image] = []
        latents: list[Tensor] = []
        with threads(self.canvas.threads):
            for first in range(0, len(shots), self.batch_size):
                rows = slice(first, first + self.batch_size)
                drawn = self._draw_batch(shots[rows], each[rows], extra or {}, pictures, on_step, sites, first)
                images += drawn.pictures or []
                latents.append(drawn.latents)
        if not latents:
            raise UsageError("there is nothing to draw: no shots were given")
        return Drawing(images if pictures else None, torch.cat(latents))

    def _a_row(
        self, shots: Sequence[Shot], interventions: Sequence[Intervention | None] | Intervention | None
    ) -> list[Intervention | None]:
        """One intervention, or None, a shot."""
        if interventions is None or not isinstance(interventions, Sequence):
            return [interventions] * len(shots)
        if len(interventions) != len(shots):
            raise UsageError(
                f"{many(len(interventions), 'intervention')} for {many(len(shots), 'shot')}: give one a shot"
            )
        return list(interventions)

    def _draw_batch(
        self,
        shots: Sequence[Shot],
        interventions: Sequence[Intervention | None],
        extra: Mapping[tuple[Site, Part], Sequence[Change]],
        pictures: bool,
        on_step: OnStep | None,
        sites: Sequence[Site],
        first: int,
    ) -> Drawing:
        def step_ended(step: int, captured: Captured) -> None:
            self.forwards += len(shots)
            if on_step is not None:
                on_step(first, step, captured)

        changes = self._changes(interventions, extra)
        transformer = self.sampler.pipe.transformer
        with replaced(transformer, changes) if changes else nullcontext() as replacement, _memory_told(len(shots)):
            drawn = replace(self.sampler, sites=tuple(sites), pictures=pictures).draw(
                [shot.prompt for shot in shots],
                [shot.seed for shot in shots],
                step_ended,
                replacement=replacement,
                latents=True,
            )
        assert drawn.latents is not None
        self._refuse_non_finite(drawn.latents, shots, interventions)
        return Drawing(drawn.pictures, drawn.latents)

    def _changes(
        self, interventions: Sequence[Intervention | None], extra: Mapping[tuple[Site, Part], Sequence[Change]]
    ) -> dict[tuple[Site, Part], list[Change]]:
        """What the interventions of a batch change, and then the further changes, spot by spot."""
        found = changes(interventions, self.dictionaries, self.grid, self.peaks)
        for spot, further in extra.items():
            found[spot] = [*found.get(spot, ()), *further]
        return found

    def _refuse_non_finite(
        self, latents: Tensor, shots: Sequence[Shot], interventions: Sequence[Intervention | None]
    ) -> None:
        bad = [row for row, whole in enumerate(torch.isfinite(latents).flatten(1).all(1).tolist()) if not whole]
        if bad:
            made = interventions[bad[0]]
            under = "without any intervention" if made is None else f"under the intervention {made.name!r}"
            wider = "" if self.canvas.dtype == "float32" else f", or --dtype float32 (now {self.canvas.dtype})"
            raise NonFiniteError(
                f"the latents of {shots[bad[0]].prompt!r}, seed {shots[bad[0]].seed}, are not finite {under}: "
                f"choose a smaller strength{wider}"
            )


def shots_of(store: Store, images: Sequence[int]) -> list[Shot]:
    """The (prompt, seed) of images of a store; `UsageError` for one that it has not, and for stores without prompts or seeds."""
    table = store.prompts()
    beyond = [image for image in images if not 0 <= image < store.n_images]
    if beyond:
        raise UsageError(
            f"{store.path} has no image {beyond[0]}; it has {many(store.n_images, 'image')}, 0 to {store.n_images - 1}"
        )
    for column in ("prompt", "seed"):
        if column not in table.column_names:
            raise UsageError(
                f"{store.path} keeps no {column}s, so its pictures cannot be drawn again: give --prompt and --seeds"
            )
    rows = table.select(["prompt", "seed"]).take([int(image) for image in images]).to_pylist()
    for image, row in zip(images, rows, strict=True):
        if row["prompt"] is None or row["seed"] is None:
            raise UsageError(f"image {image} of {store.path} has no prompt or no seed: give --prompt and --seeds")
    return [Shot(row["prompt"], row["seed"], int(image)) for image, row in zip(images, rows, strict=True)]


def open_painter(
    store: Store | None,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    dictionaries: str | Path | Shelf | None = None,
    peaks: Peaks | None = None,
    canvas: Canvas | None = None,
) -> Painter:
    """The pipeline that made `store` (or the model named, where there is no store), loaded and checked to be the same.

    From the store: model id, dtype, sizes, steps, guidance, text length, threads, batch size.  `model` is a folder with the same
    model where the id does not lead to it.  `dtype`: the weights are loaded in the store's, compared, and then converted.
    `dictionaries`: their folder, or a `Shelf` of them; checked against the store before the model is loaded.
    Errors: `UsageError` for a model, device or dictionaries that are not there, `MismatchError` for those of another model.
    """
    from harvest.models import text
    from harvest.models.embeddings import Embeddings
    from harvest.models.loading import load_pipeline
    from harvest.models.model import DTYPES, choose_device
    from harvest.sample import Sampler
    from harvest.settings import HarvestSettings

    where = choose_device(device)
    if store is None and model is None and canvas is None:
        raise UsageError("nothing says what to draw with: give --store, or --model")
    canvas = canvas or (
        canvas_of_model(str(model), dtype, device) if store is None else canvas_of_store(store, model, dtype)
    )
    canvas.check("--dtype" if dtype else "the drawing")
    shelf = dictionaries if isinstance(dictionaries, Shelf) else shelf_of(dictionaries, canvas)
    settings = HarvestSettings(out=Path(), model=canvas.model, revision=canvas.revision)
    with _memory_told(0):
        pipe = load_pipeline(settings, where, canvas.weights_dtype)
        _check_loaded(pipe, canvas)
        if canvas.dtype != canvas.weights_dtype:
            pipe = pipe.to(DTYPES[canvas.dtype])
    length = canvas.max_sequence_length
    embeddings = Embeddings(  # of each prompt alone, so that they do not depend on the batch
        lambda unit: text.encode(pipe, unit, length), True, lambda: pipe._execution_device
    )
    sampler = Sampler(
        pipe, (), canvas.height, canvas.width, canvas.num_inference_steps, length, canvas.guidance, True, embeddings
    )
    own = batch_size or (store.meta.batch_size if store is not None else BATCH_SIZE)
    return Painter(sampler, canvas, shelf.on(where), own, peaks)


def _check_loaded(pipe: Any, canvas: Canvas) -> None:
    """`MismatchError` unless the pipeline has the sizes, and the weights, that were counted on."""
    from harvest.models.model import shape_of, weights_hash

    shape = shape_of(pipe)
    found = {"n_blocks": shape.double_blocks, "d_model": shape.d_model, "pixels_per_token": shape.pixels_per_token}
    for name, value in found.items():
        if value != getattr(canvas, name):
            raise MismatchError(
                f"{canvas.model} has {name} {value}, expected {getattr(canvas, name)}: it is another model"
            )
    if canvas.guidance and not shape.takes_guidance:
        raise UsageError(
            f"guidance is {canvas.guidance:g}, and {canvas.model} has no guidance embedding: leave it at 0"
        )
    check_weights(canvas, {part: weights_hash(getattr(pipe, part)) for part in canvas.weights if hasattr(pipe, part)})


def weights_of(painter: Painter) -> dict[str, str]:
    """Part -> SHA-256 of the weights that draw, in the dtype that they draw in."""
    from harvest.models.model import weights_hash

    return {part: weights_hash(getattr(painter.sampler.pipe, part)) for part in PARTS}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, PyTorch computes with so many threads: they decide in which parts sums are added up, and so their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _memory_told(rows: int) -> Iterator[None]:
    """Inside, running out of the device's memory is told in one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"a batch of {many(rows, 'picture')}" if rows else "the model"
        remedy = "Use a smaller --batch-size." if rows > 1 else "Use --dtype bfloat16, or a device with more memory."
        raise GranaryError(
            f"{what} does not fit into the device's memory: {str(error).splitlines()[0]} {remedy}"
        ) from None
