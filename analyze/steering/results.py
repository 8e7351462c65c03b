"""What a run of `steer` leaves in OUT, and what of it is there already.

    OUT/run.json                          what made it: store, model, dictionaries, device, versions
    OUT/experiment.yaml                   the experiment, resolved
    OUT/pictures/0003/01-strength-2.png   shot 3 under variant 1; 00-plain.png without an intervention
    OUT/latents/01-strength-2/0000.safetensors   final latents of a batch (shot, token, channel); its last file, which says it is whole
    OUT/results.parquet                   a row a shot and variant: distances from plain, what the judge reads
    OUT/summary.md                        medians of these, by variant
    OUT/grid.png, grid-2.png …            shots below one another, variants beside one another

A shot is always drawn in the same batch, whichever variant: what differs from plain is the intervention's doing alone.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from analyze.pictures.drawing import png_bytes
from analyze.steering.distances import measured_by
from analyze.steering.documents import document_bytes
from analyze.steering.drawing import Drawing
from analyze.steering.experiment import Experiment
from store.errors import DamagedError, ForeignError, MismatchError, UsageError
from store.files import is_temporary, read_json, sha256_bytes, sha256_file, write_bytes, write_json
from train.claim import refuse_place

RUN, EXPERIMENT = "run.json", "experiment.yaml"
FORMAT, VERSION = "granary steering", 1
SLUG_CHARACTERS = 48


@dataclass(frozen=True)
class Results:
    """The folder of one experiment."""

    out: Path
    experiment: Experiment

    @cached_property
    def files(self) -> tuple[str, ...]:
        """What the files of plain and of each variant are called, without ending: `01-strength-2`."""
        return tuple(f"{place:02d}-{_slug(name)}" for place, name in enumerate(self.experiment.names))

    @property
    def batches(self) -> range:
        """The batches in which every variant is drawn."""
        return range(-(-len(self.experiment.shots) // self.experiment.batch_size))

    def shots(self, batch: int) -> range:
        """Numbers of a batch's shots."""
        first = batch * self.experiment.batch_size
        return range(first, min(first + self.experiment.batch_size, len(self.experiment.shots)))

    def picture_name(self, shot: int, variant: int) -> str:
        """Where the picture of a shot lies below OUT; variant 0 is plain."""
        return f"pictures/{shot:04d}/{self.files[variant]}.png"

    def picture(self, shot: int, variant: int) -> Image.Image:
        """The picture of a shot, RGB."""
        with Image.open(self.out / self.picture_name(shot, variant)) as picture:
            return picture.convert("RGB")

    def latents(self, batch: int, variant: int) -> Float[Tensor, "shot token channel"]:
        """Final latents of a batch, float32; `DamagedError` for a file that cannot be read."""
        try:
            with safetensors.safe_open(self._latents(batch, variant), "pt") as file:
                found: Tensor = file.get_tensor("latents")
                return found
        except (OSError, SafetensorError) as error:
            raise DamagedError(
                f"{self._latents(batch, variant)} cannot be read ({error}): run the command again"
            ) from None

    def keep(self, batch: int, variant: int, drawing: Drawing) -> None:
        """Publish what was drawn of a batch: its pictures, then its latents, which say that it is whole."""
        assert drawing.pictures is not None
        hashes = []
        for shot, picture in zip(self.shots(batch), drawing.pictures, strict=True):
            data = png_bytes(picture, small=False)
            hashes.append(sha256_bytes(data))
            write_bytes(self.out / self.picture_name(shot, variant), data)
        about = {"pictures": json.dumps(hashes)}  # one key: safetensors writes several in any order
        write_bytes(self._latents(batch, variant), save({"latents": drawing.latents.contiguous()}, about))

    def missing(self) -> list[tuple[int, int]]:
        """(variant, batch) of what is still to be drawn, or was damaged since, in the order of drawing."""
        variants = range(len(self.experiment.names))
        return [(variant, batch) for variant in variants for batch in self.batches if not self._whole(batch, variant)]

    def _whole(self, batch: int, variant: int) -> bool:
        """Whether a batch's latents are there, and its pictures are those that they were published with."""
        try:
            with safetensors.safe_open(self._latents(batch, variant), "pt") as file:
                hashes = json.loads((file.metadata() or {})["pictures"])
                file.get_tensor("latents")
            pictures = [self.out / self.picture_name(shot, variant) for shot in self.shots(batch)]
            return bool(hashes == [sha256_file(picture) for picture in pictures])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False

    def _latents(self, batch: int, variant: int) -> Path:
        return self.out / "latents" / self.files[variant] / f"{batch:04d}.safetensors"

    def leftovers(self) -> Iterator[Path]:
        """Temporary files of a run that was killed."""
        return (path for path in self.out.rglob(".*.tmp") if is_temporary(path))

    def check_claim(self, record: dict[str, Any]) -> None:
        """Refuse an OUT that holds something else, another experiment, or pictures made on another device or by other versions."""
        refuse_place(self.out)
        if not (self.out / RUN).exists():
            if self.out.exists() and not all(is_temporary(path) for path in self.out.iterdir()):
                raise UsageError(
                    f"{self.out} is not empty and holds no experiment of analyze steer: choose another --out"
                )
            return
        found = read_json(self.out / RUN)
        if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise ForeignError(
                f"{self.out / RUN} is not the record of analyze steer in format {VERSION}: choose another --out"
            )
        for key in ("store", "model", "dictionaries"):
            if found.get(key) != record[key] and not (key == "model" and _weights_unknown(found, record)):
                raise MismatchError(
                    f"{self.out} holds an experiment on another {key}: {_short(found.get(key))}, now {_short(record[key])}: "
                    "choose another --out"
                )
        if found.get("asked") != record["asked"]:
            raise UsageError(
                f"{self.out} holds another experiment ({_difference(found.get('asked'), record['asked'])}): choose another --out, or run "
                f"that one with --experiment {self.out / EXPERIMENT}"
            )
        for key in ("device", "versions", "clip", "lpips"):
            if found.get(key) != record[key]:
                raise UsageError(
                    f"{self.out} was begun with another {key}: {_short(found.get(key))}, now {_short(record[key])}; its pictures would "
                    "not be comparable to the last bit: choose another --out"
                )

    def claim(self, record: dict[str, Any]) -> None:
        """Mark OUT as this experiment's."""
        for leftover in list(self.leftovers()):
            leftover.unlink()
        write_bytes(self.out / EXPERIMENT, document_bytes(self.experiment.document()))
        if not (self.out / RUN).exists():
            write_json(self.out / RUN, record)


def record_of(experiment: Experiment, device: str) -> dict[str, Any]:
    """What `run.json` says: what the results were made of and by, the same wherever and whenever they are made."""
    document = experiment.document()
    drawing = document.pop("drawing")
    model = {key: drawing.pop(key) for key in ("model", "revision", "weights_sha256", "weights_dtype")}
    asked = {key: document[key] for key in ("name", "variants", "shots", "judge")} | {
        "peaks": document.get("peaks", {})
    }
    versions, lpips = measured_by()
    return {
        "format": FORMAT, "version": VERSION, "store": experiment.store, "model": model,
        "dictionaries": document["dictionaries"], "device": device, "versions": versions, "lpips": lpips,
        "clip": None if experiment.clip is None else dict(experiment.clip),
        "asked": {**{key: _digest(value) for key, value in asked.items()}, **drawing},
        "pictures": experiment.pictures, "transformer_runs": experiment.forwards,
    }  # fmt: skip


def _digest(value: Any) -> Any:
    """A short value as it is, a long one by its hash: `run.json` says which experiment, `experiment.yaml` what it is."""
    return value if isinstance(value, str) else sha256_bytes(json.dumps(value, sort_keys=True).encode())[:16]


def _difference(before: Any, now: dict[str, Any]) -> str:
    """The first thing in which two experiments differ."""
    before = before if isinstance(before, dict) else {}
    key = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
    return f"its {key.replace('_', ' ')}: {_short(before.get(key))}, now {_short(now.get(key))}"


def _weights_unknown(found: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether the models differ only in that the weights of one are not known before they are loaded."""
    model = found.get("model")
    return isinstance(model, dict) and not record["model"]["weights_sha256"] and {
        **model, "weights_sha256": {}
    } == record["model"]  # fmt: skip


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
    return text if len(text) <= 120 else text[:119] + "…"


def _slug(name: str) -> str:
    """The name in letters, digits, points and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:SLUG_CHARACTERS].strip("-.") or "variant"
