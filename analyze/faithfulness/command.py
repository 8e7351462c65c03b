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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from analyze.faithfulness.exactness import exactness, pictures_of
from analyze.faithfulness.groups import Group, Splicing, groups_of, sites_text, splicings_of, steps_text
from analyze.faithfulness.judged import can_judge
from analyze.faithfulness.measuring import Plain, draw_plain, measure
from analyze.faithfulness.publishing import PLAIN, SHOWN, Place, Results, publish_results
from analyze.faithfulness.settings import IMAGES, FaithfulnessSettings
from analyze.faithfulness.splicing import MeanOutput
from analyze.faithfulness.summing_up import printed
from analyze.features.clip import TINY_FLUX, Clip, clip_for, load_clip
from analyze.inputs import dictionary_identity, loaded
from analyze.steering.canvas import Canvas, canvas_of_store
from analyze.steering.drawing import Painter, Shot, open_painter, shots_of
from harvest.model import choose_device, library_versions
from store import Store, open_store
from store.errors import UsageError
from store.files import read_json, write_json
from store.layout import runs_folder
from store.sites import Site, parse_numbers, spans
from store.sizes import human_size, many
from store.tables import write_table
from train import Dictionary
from train.claim import claimed, refuse_place
from train.dictionaries.provenance import model_name

RUN_FORMAT, RUN_VERSION = "granary faithfulness", 1


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
    _check_out(settings.out, record)
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
        _check_out(settings.out, record)
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
            "batch_size": settings.batch_size or inquiry.store.meta.batch_size, "device": choose_device(settings.device).type,
        },
        "versions": library_versions(),
    }  # fmt: skip


def _identities(group: Group) -> dict[str, str]:
    """Site -> SHA-256 of what its dictionary computes; one is held at a time."""
    return {
        str(site): dictionary_identity(outline if outline.place is None else loaded(outline.place))
        for site, outline in group.outlines.items()
    }


def _check_out(out: Path, record: dict[str, Any]) -> None:
    """Refuse an OUT that holds something else, or was made with other choices."""
    path = out / "run.json"
    if not path.exists():
        if out.exists() and any(not each.name.startswith(".") for each in out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no measured faithfulness: choose another --out")
        return
    found = read_json(path)
    for key, value in record.items():
        there = found.get(key) if isinstance(found, dict) else None
        if there != value:
            what = key
            if isinstance(value, dict) and isinstance(there, dict):
                what = ", ".join(sorted(name for name in {*value, *there} if value.get(name) != there.get(name)))
            raise UsageError(f"{out} was made with other choices ({what}): choose another --out")


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
        f"  memory       the model, and up to {human_size(weights)} of dictionaries in float32",
        "  time         not known before the first batch; then the bar says it",
    ]  # fmt: skip
    unchecked = sorted({name for group in inquiry.groups for name in group.shelf.unchecked})
    if unchecked:
        lines.append(
            f"note: that {', '.join(unchecked)} belong to the store's model is not checked: the dictionaries or the store do not say what "
            "they come from (parent: unknown)"
        )
    return lines


def _weights(outline: Dictionary) -> int:
    return sum(4 * parameter.numel() for parameter in outline.parameters())


def _facts(inquiry: Inquiry) -> list[str]:
    """What made the tables, for their head."""
    canvas = inquiry.canvas
    return [
        f"model: {model_name(inquiry.store.meta.model)}, {canvas.dtype}, {canvas.height}x{canvas.width} pixels, "
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
