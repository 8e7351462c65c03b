"""The rows of the page, each a few features and what becomes of them, as an intervention; and an intervention as rows.

img_3:66,70+txt_2:5      features as everywhere, of several sites too; img_3/66 is read as well
sae_img_2:5              the dictionary by its kind, where a site has two
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from analyze.steering.edits import FeatureEdit, Intervention, Method, Mode, StreamOff, Unit
from analyze.steering.feature_changes import Key
from analyze.steering.interventions import KINDS
from analyze.steering.wording import edits_from, off_in
from store.errors import UsageError
from store.sites import Site, spans
from train import Dictionary
from train.dictionaries.config import Kind

MOST_ROWS = 6
PIECE = re.compile(rf"(?:({'|'.join(KINDS)})_)?((?:img|txt|joint)_\d+)\s*[:/]\s*([\d,\-\s]+)")
EXAMPLE = "write img_3:66, or img_3:66,70+txt_2:5 for several"


@dataclass(frozen=True)
class EditRow:
    """One row, in the words of the page."""

    features: str = ""
    mode: Mode = "zero"
    strength: float = 1.0
    tokens: str = "all"
    steps: str = "all"
    unit: Unit = "absolute"


def intervention_of(
    name: str, rows: Sequence[EditRow], method: Method, off: str, n_blocks: int, outlines: Mapping[Key, Dictionary]
) -> Intervention:
    """What the rows ask for together; rows without features ask for nothing.

    `off`: streams that are switched off, `txt 0-3 @steps=0`, several with `;` between them.  `UsageError`, which names the row,
    for what cannot be read; `interventions.check` says whether there is such a thing.
    """
    edits: list[FeatureEdit] = []
    for number, row in enumerate(rows, start=1):
        if row.features.strip():
            edits += _edits(number, row, outlines)
    offs = tuple(off_in(text, n_blocks) for text in off.split(";") if text.strip())
    return Intervention(name.strip() or "explored", tuple(edits), offs, method)


def _edits(number: int, row: EditRow, outlines: Mapping[Key, Dictionary]) -> tuple[FeatureEdit, ...]:
    targets, kinds = [], set()
    for piece in row.features.split("+"):
        found = PIECE.fullmatch(piece.strip())
        if found is None:
            raise UsageError(f"row {number}: {piece.strip()!r} names no feature: {EXAMPLE}")
        kind, site, features = found.groups()
        targets.append(f"{site}:{features.strip()}")
        kinds.add(kind or _only_kind(number, Site.parse(site), outlines))
    if len(kinds) > 1:
        raise UsageError(f"row {number} names features of transcoders and of SAEs: give each kind a row of its own")
    asked = {
        "mode": row.mode, "target": "+".join(targets), "kind": kinds.pop(), "tokens": row.tokens.strip() or "all",
        "steps": row.steps.strip() or "all",
        "strength": 1.0 if row.mode == "zero" else row.strength,
        "unit": row.unit if row.mode in ("set", "add") else "absolute",
    }  # fmt: skip
    return edits_from(f"row {number}", asked, {})


def _only_kind(number: int, site: Site, outlines: Mapping[Key, Dictionary]) -> Kind:
    kinds: list[Kind] = [kind for kind in KINDS if (site, kind) in outlines]
    if not kinds:
        there = spans_of(outlines)
        raise UsageError(f"row {number}: there is no dictionary of {site}; there are {there}")
    if len(kinds) > 1:
        raise UsageError(f"row {number}: {site} has a transcoder and an SAE: write transcoder_{site}:… or sae_{site}:…")
    return kinds[0]


def spans_of(outlines: Mapping[Key, Dictionary]) -> str:
    """The sites that have a dictionary whose features can be changed, `img_0-4, txt_0-4`: those of double blocks."""
    layers: dict[str, list[int]] = {}
    for site, _ in sorted(changeable(outlines)):
        if site.layer not in layers.setdefault(site.stream, []):
            layers[site.stream].append(site.layer)
    return ", ".join(f"{stream}_{spans(found)}" for stream, found in layers.items()) or "none"


def changeable(outlines: Mapping[Key, Dictionary]) -> list[Key]:
    """The dictionaries whose features can be changed: those of double blocks."""
    return [(site, kind) for site, kind in outlines if site.kind == "double"]


def rows_of(intervention: Intervention, outlines: Mapping[Key, Dictionary]) -> list[EditRow]:
    """The rows that ask for an intervention again; neighbours that do the same at several sites are one row.

    `UsageError` for what the page has no words for: more than six rows, masks of pictures, spliced sites, normalised columns.
    """
    if intervention.splice or any(edit.normalised for edit in intervention.edits):
        raise UsageError(
            f"{intervention.name}: spliced sites and normalised columns cannot be shown here; python -m analyze steer draws them"
        )
    rows = [
        EditRow("+".join(_target(edit, outlines) for edit in group), *doing)
        for doing, group in groupby(intervention.edits, _doing)
    ]
    if len(rows) > MOST_ROWS:
        raise UsageError(
            f"{intervention.name} has {len(rows)} different edits, and the page has {MOST_ROWS} rows: "
            "python -m analyze steer draws it"
        )
    return rows


def _doing(edit: FeatureEdit) -> tuple[Mode, float, str, str, Unit]:
    return edit.mode, edit.strength, str(edit.tokens), steps_text(edit.steps), edit.unit


def _target(edit: FeatureEdit, outlines: Mapping[Key, Dictionary]) -> str:
    several = edit.kind is not None and all((edit.site, kind) in outlines for kind in KINDS)
    return f"{f'{edit.kind}_' if several else ''}{edit.site}:{','.join(map(str, edit.features))}"


def steps_text(steps: tuple[int, ...] | None) -> str:
    """`2-3`, or `all`."""
    return "all" if steps is None else spans(sorted(steps))


def off_text(off: Sequence[StreamOff]) -> str:
    """What `intervention_of` reads: `txt 0-3 @steps=0; img 2 @parts=attn`."""
    return "; ".join(
        f"{each.stream} {spans(sorted(each.layers))}"
        + ("" if each.steps is None else f" @steps={spans(sorted(each.steps))}")
        + ("" if each.parts == ("mlp",) else f" @parts={','.join(each.parts)}")
        for each in off
    )
