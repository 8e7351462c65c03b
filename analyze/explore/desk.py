"""What the page does when something is pressed in it: draw, save, load.  The page itself is `page` and its tabs."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyze.explore import html
from analyze.explore.files import experiment_bytes, save
from analyze.explore.readings import readings
from analyze.explore.rows import EditRow, intervention_of
from analyze.explore.settings import ExploreSettings
from analyze.explore.studio import Studio
from analyze.steering.drawing import Shot
from analyze.steering.edits import METHODS, OF_PEAKS, Intervention, Mode, Unit
from store.errors import GranaryError, UsageError

FIELDS = 6
"""inputs of a row: features, mode, strength, tokens, steps, unit"""
LISTED = 1000
"""images of the store that can be chosen by their prompts"""
MOST_SEED = 2**53 - 1
"""beyond it a browser's numbers are not exact"""
QUICK = 1.0
"""seconds of a picture up to which sliders are followed while they move"""
BEGIN = {"zero": 1.0, "amplify": 4.0, "invert": 1.0, "set": 1.0, "add": 1.0}
"""strength that a mode begins with"""


@dataclass(frozen=True)
class Range:
    """The slider of a mode."""

    low: float
    high: float
    step: float
    label: str


def range_of(mode: Mode, unit: Unit, strength: float = 0.0) -> Range:
    """Where a mode's slider goes, far enough for a strength that comes from a file."""
    if mode in OF_PEAKS:
        low, high, step, label = (-3.0, 3.0, 0.05, "peaks of the feature")
        if unit == "absolute":
            low, high, step, label = (-100.0, 100.0, 0.5, "activation" if mode == "set" else "times its direction")
    else:
        low, high, step, label = 0.0, 10.0, 0.1, "times" if mode == "amplify" else "times minus one, times"
    return Range(min(low, strength), max(high, strength), step, label)


@dataclass
class Desk:
    """What can be done with a studio from a page."""

    studio: Studio
    settings: ExploreSettings
    folder: Path
    """temporary, where files to be downloaded are put"""
    saved: int = 0
    """experiments"""
    quick: bool = False
    """whether the last picture took so little time that a slider can be followed while it moves"""

    def __post_init__(self) -> None:
        table = self.studio.store.prompts()
        there = {"prompt", "seed"} <= set(table.column_names)
        pairs = zip(table["prompt"].to_pylist(), table["seed"].to_pylist(), strict=True) if there else ()
        self.images: dict[tuple[str, int], int] = {}
        for image, (prompt, seed) in enumerate(pairs):
            if prompt is not None and seed is not None:
                self.images.setdefault((prompt, seed), image)

    @property
    def first(self) -> Shot:
        """What the page begins with."""
        prompt, seed = next(iter(self.images), ("", 0))
        asked = self.settings
        begin = asked.prompt or prompt, asked.seed if asked.seed is not None else seed
        return Shot(*begin, self.images.get(begin))

    @property
    def unit(self) -> Unit:
        """What strengths of set and add count in where nothing else is said."""
        return "peak" if self.studio.peaks is not None else "absolute"

    def choices(self) -> list[tuple[str, int]]:
        """Images of the store by number and prompt."""
        return [(f"{image} · {prompt}", image) for (prompt, _), image in list(self.images.items())[:LISTED]]

    def shot(self, prompt: str | None, seed: int | float | None) -> Shot:
        """The shot that is asked for, with its number in the store where it is one of those; `UsageError` for none."""
        if not prompt or not prompt.strip():
            raise UsageError("the prompt is empty: write what is to be drawn")
        if seed is None or not 0 <= seed <= MOST_SEED or seed != int(seed):
            raise UsageError(f"the seed is {seed}: write a whole number from 0 to {MOST_SEED}")
        return Shot(prompt, int(seed), self.images.get((prompt, int(seed))))

    def intervention(self, name: str | None, rows: Sequence[EditRow], method: Any, off: str | None) -> Intervention:
        """What the rows ask for."""
        canvas, outlines = self.studio.canvas, self.studio.shelf.outlines
        return intervention_of(name or "", rows, method, off or "", canvas.n_blocks, outlines)

    def draw(self, shot: Shot, intervention: Intervention) -> tuple[str, str]:
        """The pictures and what is said of them, as HTML."""
        seen = self.studio.draw(shot, intervention)
        self.quick = seen.seconds < QUICK
        words = readings(self.studio, [seen.plain, seen.changed])
        return html.figure(seen.plain, seen.changed, words, shot.prompt), html.report(seen)

    def begin(self) -> str:
        """The pictures before anything was drawn: the store's own, where it has one of the first shot."""
        first, store = self.first, self.studio.store
        if first.image is None or store.meta.pictures == "none":
            return html.figure(None, None)
        picture = store.picture(first.image)
        return html.figure(picture, None, readings(self.studio, [picture]) if picture else (), first.prompt)

    def keep(self, name: str, shot: Shot, intervention: Intervention) -> tuple[Path, str]:
        """Save: the file, in the temporary folder and in OUT where there is one, and what to say of it, as HTML."""
        data = experiment_bytes(self.studio, shot, intervention)
        path, asked = save(self.folder / str(self.saved), name, data), self.settings
        where = path if asked.out is None else save(asked.out, name, data)
        self.saved += 1
        command = ["python", "-m", "analyze", "steer", "--experiment", where.name if asked.out is None else where]
        command += ["--store", asked.store, "--dictionaries", asked.dictionaries]
        command += ["--model", asked.model] if asked.model is not None else []
        said = "The same pictures again:" if asked.out is None else f"Saved as {where}. The same pictures again:"
        return path, html.message(said, "good", shlex.join(map(str, [*command, "--out", "steered"])))


def rows_in(values: Sequence[Any], shown: int) -> list[EditRow]:
    """The rows from the values of their inputs, those that are shown."""
    groups = [values[start : start + FIELDS] for start in range(0, shown * FIELDS, FIELDS)]
    return [
        EditRow(features or "", mode, 0.0 if strength is None else float(strength), tokens or "all", steps or "all", unit)
        for features, mode, strength, tokens, steps, unit in groups
    ]  # fmt: skip


def told(act: Callable[[], Any], otherwise: Callable[[str], Any]) -> Any:
    """What an act gives; what `otherwise` makes of the message where it fails in a way that we foresaw."""
    try:
        return act()
    except GranaryError as error:
        return otherwise(html.message(str(error)))


def methods() -> list[tuple[str, str]]:
    """The methods, as they are chosen."""
    said = {"difference": "add the difference", "replacement": "replace the MLP"}
    return [(said[method], method) for method in METHODS]
