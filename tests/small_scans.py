"""A planted store whose prompts share their seeds, scanned: the rows of what was found."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from analyze.scan.discovery import run
from analyze.scan.settings import ScanSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.truth.attributes import ATTRIBUTES, Attribute
from tests import analyze_planted
from tests.analyze_planted import Plan, planted_dictionaries, planted_store

SEEDS = 3


PLAN = Plan(n_images=120, seeds_per_prompt=SEEDS, grid=(6, 9), steps=2, chunk_images=16, pictures=False)


def where(folder: Path, **more: Any) -> dict[str, Any]:
    return {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / "out", **more}


def number(group: str, value: str) -> int:
    return ATTRIBUTES.index(Attribute(group, value))  # type: ignore[arg-type]


def scan(folder: Path, **more: Any) -> list[dict[str, Any]]:
    return run(ScanSettings(**where(folder, **more)))


def planted_scans(folder: Path) -> Path:
    """A planted store whose prompts all have the same three seeds, its dictionaries and their scores."""
    as_planted = analyze_planted._prompts

    def same_seeds(plan: Plan, images: range, *rest: Any) -> pa.Table:
        table = as_planted(plan, images, *rest)
        seeds = pa.array([7 + image % SEEDS for image in images], pa.int64())
        return table.set_column(table.column_names.index("seed"), "seed", seeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze_planted, "_prompts", same_seeds)
        planted_store(folder / "store", PLAN)
    planted_dictionaries(folder / "dictionaries", PLAN)
    scores.run(ScoresSettings(**where(folder)))
    return folder
