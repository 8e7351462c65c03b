"""Draws and judges one value of `guided`: plain pictures, every arm, strengths of their own; then its files, the table last."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from analyze.guided.planning import Case, GuidedPlan, Variant
from analyze.guided.results import PICTURES, best_strength, edge_of, measured
from analyze.guided.sources import Feature
from analyze.prompts import prompt_texts
from analyze.steering.collages import grid
from analyze.steering.drawing import Painter, Shot, shots_of
from analyze.steering.judging import Rate, readings, told, verdicts
from store.files import write_bytes, write_json
from store.tables import write_table

Strengths = dict[float, dict[str, Rate]]


def names_of(features: Sequence[Feature]) -> list[str]:
    """`img_3:66` of each."""
    return [f"{site}:{feature}" for site, feature in features]


def place_of(out: Path, case: Case) -> Path:
    """Where the files of a value lie, without ending."""
    return out / "values" / case.value.replace(" ", "-")


@dataclass
class Session:
    """One value, from plain pictures to its files."""

    plan: GuidedPlan
    case: Case
    painter: Painter
    progress: Any
    place: Path
    """of its files, without ending"""

    def finish(self) -> None:
        """Draw, judge, and publish; the table last."""
        case = self.case
        shots = shots_of(self.plan.judged, case.judged)
        plain = self._drawn(shots, None)
        variants, tried = list(case.variants), self._tuned()
        variants += [variant.at(strength) for variant, strength in self._own(tried)]
        columns: list[tuple[str, list[Image.Image], list[str]]] = [
            ("plain", plain, list(told(self._judged(plain, plain))))
        ]
        tables = []
        for variant in variants:
            changed = self._drawn(shots, variant)
            found = self._judged(plain, changed)
            tables.append(self._facts(found, variant))
            columns.append((f"{variant.name} ({variant.strength:g})", changed, list(told(found))))
        write_bytes(self.place.with_suffix(".png"), self._collage(columns))
        write_json(self.place.with_suffix(".json"), self._about(tried))
        write_table(self.place.with_suffix(".parquet"), pa.concat_tables(tables))

    def _drawn(self, shots: Sequence[Shot], variant: Variant | None) -> list[Image.Image]:
        drawing = self.painter.draw(shots, None if variant is None else variant.intervention)
        self.progress.update(len(shots))
        assert drawing.pictures is not None
        return drawing.pictures

    def _judged(self, plain: Sequence[Image.Image], changed: Sequence[Image.Image]) -> pa.Table:
        return verdicts(readings(plain), readings(changed), self.plan.settings.attribute, self.case.value)

    def _tuned(self) -> dict[str, Strengths]:
        """For each arm of --own what every strength did to the pictures that are not judged."""
        settings = self.plan.settings
        own = [variant for variant in self.case.variants if variant.arm in settings.own_arms]
        if not own:
            return {}
        shots = shots_of(self.plan.analysis.store, self.case.tuning)
        plain = self._drawn(shots, None)
        return {
            variant.arm: {
                strength: measured(self._judged(plain, self._drawn(shots, variant.at(strength))), settings.attribute)
                for strength in settings.sweep
            }
            for variant in own
        }

    def _own(self, tried: dict[str, Strengths]) -> list[tuple[Variant, float]]:
        return [(variant, best_strength(tried[variant.arm])) for variant in self.case.variants if variant.arm in tried]

    def _facts(self, found: pa.Table, variant: Variant) -> pa.Table:
        """The verdicts with what they are of."""
        store, count = self.plan.judged, len(found)
        prompts, seeds = prompt_texts(store), store.prompts()["seed"].to_pylist()
        facts: dict[str, list[Any]] = {
            "value": [self.case.value] * count,
            "image": list(self.case.judged),
            "prompt": [prompts[image] for image in self.case.judged],
            "seed": [seeds[image] for image in self.case.judged],
            "arm": [variant.arm] * count,
            "own_strength": [variant.own] * count,
            "strength": [variant.strength] * count,
            "features": [len(variant.features)] * count,
        }
        made = {name: pa.array(values, PICTURES.field(name).type) for name, values in facts.items()}
        return pa.table({**made, **{name: found[name] for name in found.schema.names}}, schema=PICTURES)

    def _about(self, tried: dict[str, Strengths]) -> dict[str, Any]:
        case = self.case
        return {
            "value": case.value, "graphs": case.graphs, "targets": names_of(case.targets),
            "circuit": [
                {"feature": str(source), "share": source.share, "elsewhere": source.elsewhere, "graphs": source.graphs}
                for source in case.circuit
            ],
            "arms": {
                variant.arm: {"features": names_of(variant.features), "edits": list(map(str, variant.intervention.edits))}
                for variant in case.variants
            },
            "strengths_tried": {
                arm: {
                    f"{strength:g}": {name: [rate.count, rate.n] for name, rate in found.items()}
                    for strength, found in strengths.items()
                }
                for arm, strengths in tried.items()
            },
            "own_strengths": {
                arm: {"strength": best_strength(strengths), "edge": edge_of(strengths)} for arm, strengths in tried.items()
            },
            "judged": list(case.judged), "tuned_on": list(case.tuning),
        }  # fmt: skip

    def _collage(self, columns: Sequence[tuple[str, list[Image.Image], list[str]]]) -> bytes:
        """The first pictures of the value: a line a picture, a column a variant, what the judge reads below each."""
        settings, count = self.plan.settings, min(self.plan.settings.shown, len(self.case.judged))
        shots = shots_of(self.plan.judged, self.case.judged[:count])
        picture = grid(
            [[pictures[row] for _, pictures, _ in columns] for row in range(count)],
            [f"{shot.prompt} (image {shot.image})" for shot in shots],
            [name for name, _, _ in columns],
            f"Suppressing {settings.attribute} {self.case.value}",
            [f"{settings.mode}, its strength in brackets; below each picture what the judge reads"],
            [[said[row] for _, _, said in columns] for row in range(count)],
        )
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()
