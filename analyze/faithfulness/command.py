"""`python -m analyze faithfulness`: the model run with dictionaries in the place of its MLPs, and compared with itself.

1. Store, dictionaries, sites, steps and images are checked against one another; with `--plan` the runs are counted, and that is all.
2. The plain pictures are drawn; then every splicing that OUT does not hold yet, each published whole.
3. With errors added back the plain latents must come out again: measured on a few images.
4. Tables, plots and a sheet of pictures are made of what OUT holds.
"""

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from analyze.faithfulness.exactness import exactness, pictures_of
from analyze.faithfulness.groups import Group, Splicing, groups_of, left_out, sites_text, splicings_of, steps_text
from analyze.faithfulness.judged import can_judge
from analyze.faithfulness.measuring import Plain, draw_plain, measure
from analyze.faithfulness.publishing import MOST_COLUMNS, PLAIN, SHOWN, Place, Results, publish_results
from analyze.faithfulness.settings import IMAGES, FaithfulnessSettings
from analyze.faithfulness.splicing import MeanOutput
from analyze.faithfulness.summing_up import printed
from analyze.features.clip import TINY_FLUX, Clip, clip_for, load_clip
from analyze.inputs import check_results, dictionary_identity, loaded
from analyze.steering.canvas import Canvas, canvas_of_store
from analyze.steering.drawing import Painter, Shot, open_painter, shots_of
from harvest.models.model import choose_device, library_versions
from store import Store, open_store
from store.errors import UsageError
from store.files import write_json
from store.layout import runs_folder
from store.sites import Site, parse_numbers, spans
from store.sizes import human_size, many, picture_size
from store.tables import write_table
from train import Dictionary
from train.claim import claimed, refuse_place
from train.dictionaries.provenance import model_name

RUN_FORMAT, RUN_VERSION, WHAT = "granary faithfulness", 2, "measured faithfulness"
SPLICING_BYTES, PAGE_BYTES = 60_000, 1_000_000
"""of a splicing's tables, twice, and of the page with its plots: more than they take"""


@dataclass(frozen=True)
class Inquiry:
    """What is measured, checked and settled before a model is loaded."""

    settings: FaithfulnessSettings
    store: Store
    canvas: Canvas
    groups: tuple[Group, ...]
    splicings: tuple[Splicing, ...]
    images: tuple[int, ...]
    shots: tuple[Shot, ...]
    judged: bool
    """whether tiny-flux's judge reads the pictures"""
    clip: Clip | None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that is spliced by some splicing."""
        return tuple(dict.fromkeys(site for group in self.groups for site in group.sites))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were asked for."""
        return parse_numbers(self.settings.steps, self.canvas.num_inference_steps, "step")

    @property
    def batch_size(self) -> int:
        """Pictures drawn at once."""
        return self.settings.batch_size or self.store.meta.batch_size

    @property
    def exact(self) -> tuple[Shot, ...]:
        """The shots that errors are added back in."""
        return self.shots[: self.settings.exact]


@dataclass(frozen=True)
class FaithfulnessMeasured:
    """What a run of `faithfulness` found; `results` is None with `--plan`."""

    results: Results | None
    pictures: int
    """drawn by this run"""
    forwards: int
    """passes through the transformer that they took, one a picture and step"""
    seconds: float = field(compare=False)


def run(settings: FaithfulnessSettings) -> FaithfulnessMeasured:
    """Measure every splicing that OUT does not hold yet, and make its tables, plots and sheet (`publishing`).

    Same bytes: the same command on the same store and dictionaries, wherever they lie, stopped and gone on with or not, on the same kind
    of device and versions of the libraries; OUT records them, and another batch size, device or version is refused there.

    Errors, all but the last before the model is loaded: `UsageError` for sites, steps, images and folders that are not there, or an OUT of
    other choices; `MismatchError` for dictionaries of another model; `NonFiniteError` where a splicing drives the model to NaN.
    """
    started = time.monotonic()
    inquiry = open_inquiry(settings)
    place = Place(settings.out)
    record = _record(inquiry)
    check_results(settings.out, record, WHAT)
    missing = [splicing for splicing in inquiry.splicings if not place.finished(splicing)]
    inexact = [
        group for group in inquiry.groups if inquiry.exact and group.outlines and not place.exactness(group).exists()
    ]
    for line in _announced(inquiry, missing, inexact):
        print(line)
    if settings.plan:
        return FaithfulnessMeasured(None, 0, 0, time.monotonic() - started)
    pictures = forwards = 0
    with claimed(settings.out, runs_folder(settings.out), "process measures faithfulness in"):
        check_results(settings.out, record, WHAT)  # another process may have had the lock
        write_json(settings.out / "run.json", record)
        if missing or inexact:
            pictures, forwards = _draw(inquiry, place, missing, inexact)
        shown = [(shot.image, shot.prompt) for shot in inquiry.shots[:SHOWN] if shot.image is not None]
        results = publish_results(
            place, inquiry.splicings, inquiry.groups, _facts(inquiry), shown if settings.pictures else ()
        )
    done = FaithfulnessMeasured(results, pictures, forwards, time.monotonic() - started)
    write_json(runs_folder(settings.out) / "faithfulness.json", {
        "command": sys.argv, "host": platform.node(), "ended": time.time(), "seconds": done.seconds, "pictures": pictures,
        "forwards": forwards,
    })  # fmt: skip
    print(printed(done.results, settings.out, len(missing), pictures, forwards, done.seconds))
    return done


def open_inquiry(settings: FaithfulnessSettings) -> Inquiry:
    """What `settings` ask for, checked; every refusal is a `GranaryError`, and no model is loaded."""
    refuse_place(settings.out)
    choose_device(settings.device)
    store = open_store(settings.store)
    canvas = canvas_of_store(store, settings.model, settings.dtype)
    groups = groups_of(settings, canvas)
    splicings = splicings_of(settings, groups, canvas.num_inference_steps)
    images = _images(settings, store)
    shots = tuple(shots_of(store, images))
    judged = settings.pictures and can_judge(store)
    clip = None
    if settings.pictures and (settings.clip is not None or store.meta.model.get("id") == TINY_FLUX):
        clip = load_clip(clip_for(store, settings.clip))
    return Inquiry(settings, store, canvas, tuple(groups), tuple(splicings), images, shots, judged, clip)


def _images(settings: FaithfulnessSettings, store: Store) -> tuple[int, ...]:
    if store.n_images == 0:
        raise UsageError("the store holds no images yet: harvest some first")
    if settings.images is None:
        return tuple(range(min(IMAGES, store.n_images)))
    return parse_numbers(settings.images, store.n_images, "image")


def _record(inquiry: Inquiry) -> dict[str, Any]:
    """What decides every byte under OUT."""
    settings, canvas, clip = inquiry.settings, inquiry.canvas, inquiry.clip
    return {
        "format": RUN_FORMAT, "version": RUN_VERSION, "store": inquiry.store.id,
        "model": {"id": inquiry.store.meta.model.get("id"), "weights_sha256": inquiry.store.meta.model.get("weights_sha256")},
        "groups": [
            {"label": group.label, "kind": group.kind, "sparsity": group.sparsity, "dictionaries": _identities(group)}
            for group in inquiry.groups
        ],
        "settings": {
            "images": list(inquiry.images), "sites": settings.sites, "scope": list(settings.scopes), "steps": list(inquiry.steps),
            "each_step": settings.each_step, "baseline": settings.baseline, "exact": len(inquiry.exact), "pictures": settings.pictures,
            "clip": None if clip is None else clip.identity, "dtype": canvas.dtype, "threads": canvas.threads,
            "batch_size": inquiry.batch_size, "device": choose_device(settings.device).type,
        },
        "versions": library_versions(),
    }  # fmt: skip


def _identities(group: Group) -> dict[str, str]:
    """Site -> SHA-256 of what its dictionary computes; one is held at a time."""
    return {
        str(site): dictionary_identity(outline if outline.place is None else loaded(outline.place))
        for site, outline in group.outlines.items()
    }


def _announced(inquiry: Inquiry, missing: Sequence[Splicing], inexact: Sequence[Group]) -> list[str]:
    """What would be, or will be, drawn."""
    count, steps = len(inquiry.shots), inquiry.canvas.num_inference_steps
    exact = sum(pictures_of(group, len(inquiry.exact)) for group in inexact)
    pictures = (count * (1 + len(missing)) if missing else 0) + exact
    there = len(inquiry.splicings) - len(missing)
    weights = max(sum(_weights(outline) for outline in group.outlines.values()) for group in inquiry.groups)
    lines = [
        f"faithfulness: {many(len(inquiry.groups), 'group')}, {many(len(inquiry.splicings), 'splicing')}"
        + (f" ({there} there already)" if there else "") + f" of {many(count, 'image')}, {steps_text(inquiry.steps)}",
        *(f"  {group.label:<24} {sites_text(group.sites)}" for group in inquiry.groups),
        f"  RUNS THE MODEL: {many(pictures, 'picture')} ({exact:,} of them to show that errors added back are exact), "
        f"{pictures * steps:,} passes through the transformer of {model_name(inquiry.store.meta.model)}",
        f"  memory       the model, and up to {human_size(weights)} of dictionaries in float32"
        + (f"; {human_size(_kept(inquiry, inexact))} for errors that are kept" if inexact else ""),
        f"  written      at most {human_size(_written(inquiry, missing))}",
        "  time         not known before the first batch; then the bar says it",
    ]  # fmt: skip
    unchecked = sorted({name for group in inquiry.groups for name in group.shelf.unchecked})
    if unchecked:
        lines.append(
            f"note: that {', '.join(unchecked)} belong to the store's model is not checked: the dictionaries or the store do not say what "
            "they come from (parent: unknown)"
        )
    single = left_out(inquiry.settings, inquiry.groups)
    if single:
        lines.append(f"note: {sites_text(single)} left out: single-stream blocks cannot be changed yet")
    return lines


def _kept(inquiry: Inquiry, inexact: Sequence[Group]) -> int:
    """Bytes of the errors that `exactness` keeps of one batch, of every site and step of a group."""
    canvas, images = inquiry.canvas, min(inquiry.batch_size, len(inquiry.exact))
    rows = max(sum(canvas.tokens[site.stream] for site in group.sites) for group in inexact)  # type: ignore[index]
    return 4 * images * canvas.num_inference_steps * rows * canvas.d_model


def _written(inquiry: Inquiry, missing: Sequence[Splicing]) -> int:
    """Bytes that come under OUT, at most: tables, the first pictures of each splicing, the sheet and plots of them all."""
    canvas, count = inquiry.canvas, len(inquiry.shots)
    pictures = (len(missing) + 1) * min(SHOWN, count) if missing and inquiry.settings.pictures else 0
    sheet = 2 * min(SHOWN, count) * (MOST_COLUMNS + 1) if inquiry.settings.pictures else 0  # with the differences
    pixels = 3 * canvas.height * canvas.width
    return (pictures + sheet) * pixels + len(inquiry.splicings) * SPLICING_BYTES + PAGE_BYTES


def _weights(outline: Dictionary) -> int:
    return sum(4 * parameter.numel() for parameter in outline.parameters())


def _facts(inquiry: Inquiry) -> list[str]:
    """What made the tables, for their head."""
    canvas = inquiry.canvas
    return [
        f"model: {model_name(inquiry.store.meta.model)}, {canvas.dtype}, {picture_size(canvas.width, canvas.height)}, "
        f"{canvas.num_inference_steps} steps",
        f"store: {inquiry.store.id}, images {spans(inquiry.images)}",
        f"spliced at {steps_text(inquiry.steps)}",
    ]


def _draw(inquiry: Inquiry, place: Place, missing: Sequence[Splicing], inexact: Sequence[Group]) -> tuple[int, int]:
    """Draw and measure what OUT does not hold; (pictures, passes through the transformer)."""
    settings, count = inquiry.settings, len(inquiry.shots)
    painter = open_painter(
        inquiry.store, settings.model, settings.device, settings.dtype, settings.batch_size, canvas=inquiry.canvas
    )
    total = (count * (1 + len(missing)) if missing else 0) + sum(pictures_of(g, len(inquiry.exact)) for g in inexact)
    with tqdm(total=total, desc="faithfulness", unit="picture", mininterval=0.5) as bar:
        plain = _plain(inquiry, place, painter, bar) if missing else None
        for group in inquiry.groups:
            ours = [splicing for splicing in missing if splicing.group == group]
            if ours or group in inexact:
                _measure_group(inquiry, place, painter, group, ours, plain, group in inexact, bar)
    return total, painter.forwards


def _plain(inquiry: Inquiry, place: Place, painter: Painter, bar: "tqdm[Any]") -> Plain:
    lengths = np.asarray(inquiry.store.prompts()["text_length"].to_numpy(), np.int64)[list(inquiry.images)]
    real = np.arange(inquiry.canvas.max_sequence_length)[None, :] < lengths[:, None]
    plain = draw_plain(painter, inquiry.shots, real, inquiry.sites, inquiry.settings.pictures, inquiry.judged, bar)
    place.write_pictures(PLAIN, inquiry.images, plain.drawing.pictures or [])
    return plain


def _measure_group(
    inquiry: Inquiry,
    place: Place,
    painter: Painter,
    group: Group,
    splicings: Sequence[Splicing],
    plain: Plain | None,
    exact: bool,
    bar: "tqdm[Any]",
) -> None:
    """Measure the splicings of one group; its dictionaries' weights are let go afterwards."""
    here = replace(group, shelf=group.shelf.on(torch.device(painter.sampler.pipe.transformer.device)))
    for splicing in splicings:
        assert plain is not None
        bar.set_postfix_str(splicing.name, refresh=False)
        dictionaries: dict[Site, Dictionary | MeanOutput] = {
            site: here.dictionary(site) if here.outlines else MeanOutput.of(plain.spreads, site)
            for site in splicing.sites
        }
        place.write(splicing, *measure(painter, splicing, dictionaries, plain, bar, inquiry.clip))
    if exact:
        bar.set_postfix_str(f"{group.label}, errors added back", refresh=False)
        write_table(place.exactness(group), exactness(painter, here, inquiry.steps, inquiry.exact, bar))
