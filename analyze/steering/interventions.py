"""Interventions, from what is asked for to what `harvest.replacing.replace` installs.

    check(intervention, outlines, …)        everything that can be refused, before a model or a weight is read
    needed(interventions, outlines)         which dictionaries have to be loaded for them
    changes(interventions, dictionaries, …) what changes the model's outputs, for `replace`

A dictionary goes by its key, (site, kind): `by_key` makes the mapping of what `load_dictionaries` and
`outline_dictionaries` give.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analyze.steering.edits import (
    KINDS,
    METHODS,
    MODES,
    FeatureEdit,
    Intervention,
    Method,
    Mode,
    StreamOff,
    Unit,
    edits_of,
)
from analyze.steering.feature_changes import FeatureChange, FeaturePlan, Key, Off, Peaks
from analyze.steering.token_choice import ALL, TokenChoice
from harvest.replacing import Change, Part
from store.errors import MismatchError, UsageError
from store.sites import Site, spans
from train.dictionaries.config import Kind
from train.dictionaries.dictionary import Dictionary

__all__ = [
    "ALL", "KINDS", "METHODS", "MODES", "FeatureEdit", "Intervention", "Key", "Method", "Mode", "Peaks", "StreamOff",
    "TokenChoice", "Unit", "by_key", "changes", "check", "edits_of", "needed",
]  # fmt: skip


def by_key(dictionaries: Iterable[Dictionary]) -> dict[Key, Dictionary]:
    """The dictionaries by (site, kind)."""
    return {(dictionary.site, dictionary.config.kind): dictionary for dictionary in dictionaries}


def check(
    intervention: Intervention,
    outlines: Mapping[Key, Dictionary],
    n_blocks: int,
    tokens: Mapping[str, int],
    num_steps: int,
    grid: tuple[int, int] | None = None,
    peaks: Peaks | None = None,
    d_model: int | None = None,
) -> None:
    """Nothing, or the error that names what cannot be: an unknown site, layer, feature, step, token; a mask; two dictionaries.

    `outlines` need no weights; `n_blocks` are the model's double blocks; `tokens` how many each stream has.  `grid` (rows,
    columns) is needed for masks, `peaks` for strengths in peaks.  With `d_model`, a dictionary of another width is a
    `MismatchError`; everything else is a `UsageError`.
    """
    _check_off(intervention, n_blocks, num_steps)
    for edit in intervention.edits:
        what = _named(intervention, str(edit))
        _check_blocks(what, (edit.site.layer,), n_blocks)
        outline = outlines[_key(edit.site, edit.kind, outlines)]
        beyond = [feature for feature in edit.features if feature >= outline.config.n_features]
        if beyond:
            raise UsageError(
                f"{intervention.name}: {outline.name} has no feature {', '.join(map(str, beyond))}; "
                f"it has {outline.config.n_features}, 0 to {outline.config.n_features - 1}"
            )
        _check_steps(what, edit.steps, num_steps)
        _check_tokens(intervention, edit, tokens, grid)
        _check_peaks(intervention, edit, outlines, peaks)
        _check_not_off(intervention, edit, num_steps)
    for site in intervention.spliced:
        _check_blocks(_named(intervention, f"splice {site}"), (site.layer,), n_blocks)
    for site in {*intervention.spliced, *(edit.site for edit in intervention.edits)}:
        _replacing(intervention, site, outlines)
    for key in needed([intervention], outlines):
        width = outlines[key].config.d_model
        if d_model is not None and width != d_model:
            raise MismatchError(
                f"{outlines[key].name} has d_model {width}, the model has {d_model}: it was trained on another model"
            )


def needed(interventions: Iterable[Intervention | None], outlines: Mapping[Key, Dictionary]) -> tuple[Key, ...]:
    """The keys of the dictionaries that these interventions use, each once, by site."""
    found: set[Key] = set()
    for intervention in interventions:
        if intervention is not None:
            found |= {_key(edit.site, edit.kind, outlines) for edit in intervention.edits}
            found |= {key for site in intervention.spliced if (key := _replacing(intervention, site, outlines))}
    return tuple(sorted(found))


def changes(
    interventions: Sequence[Intervention | None] | Intervention,
    dictionaries: Mapping[Key, Dictionary],
    grid: tuple[int, int],
    peaks: Peaks | None = None,
) -> dict[tuple[Site, Part], list[Change]]:
    """What `replace` installs to carry interventions out: one for each row of the batch, or a single one for all rows.

    The interventions are those that `check` let pass; `dictionaries` hold at least the `needed` ones, in float32 on the
    model's device, whose `grid` of image tokens is (rows, columns).  At a site with both kinds the transcoder comes first, and
    the SAE reads what it left.  Where nothing is asked for, nothing is in the mapping.

    Rows are computed one by one, so that what becomes of a row depends on no other row of its batch.

    Cost of a row, site and step: one product with the encoder rows of the edited features and one with their decoder columns.
    Of FLUX (1,024 tokens, d_model 3,072), ten features take 0.13 GFLOP beside the 155 of the MLP.  TopK, replacement and splice
    need the whole encoder: 309 GFLOP for 49,152 features, and as much again for the whole decoder but for TopK alone.  On tiny-flux
    with TopK dictionaries of 1,024 features, one CPU core, 8 pictures: a tenth longer for an edit at one site, 2.5 to 3 times as
    long with edits at all ten (roughly: measured beside other work).
    Memory: the dictionaries; a copy of the edited features' rows and columns, 8 * features * d_model bytes; while a row is computed,
    16 * tokens * (features + d_model) bytes, and for TopK, replacement and splice up to 0.8 GB (three times `ENCODED` floats).
    """
    rows = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    shared = isinstance(interventions, Intervention)
    there = [row for row in rows if row is not None]
    found: dict[tuple[Site, Part], list[Change]] = {}
    made: dict[Any, FeaturePlan] = {}
    for kind in KINDS:  # transcoders first
        for site, _ in (key for key in needed(there, dictionaries) if key[1] == kind):
            plans = [_plan(row, (site, kind), dictionaries, grid, peaks, made) for row in rows]
            found.setdefault((site, "mlp"), []).append(FeatureChange(plans, shared))
    for spot in dict.fromkeys(spot for row in there for off in row.off for spot in off.spots()):
        offs = [tuple(off for off in row.off if spot in off.spots()) if row is not None else () for row in rows]
        found.setdefault(spot, []).append(Off(offs, shared))
    return found


def _plan(
    row: Intervention | None, key: Key, dictionaries: Mapping[Key, Dictionary], grid: tuple[int, int],
    peaks: Peaks | None, made: dict[Any, FeaturePlan],
) -> FeaturePlan | None:  # fmt: skip
    """What a row's intervention does with a dictionary, the same object for rows that do the same; None for nothing."""
    if row is None:
        return None
    edits = tuple(edit for edit in row.edits if _key(edit.site, edit.kind, dictionaries) == key)
    replaces = _replacing(row, key[0], dictionaries) == key
    spliced = replaces and key[0] in row.spliced
    if not edits and not spliced:
        return None
    same = key, edits, replaces, spliced
    if same not in made:
        peak = None if peaks is None else peaks.get(key)
        made[same] = FeaturePlan(dictionaries[key], edits, grid, replaces, spliced, peak)
    return made[same]


def _key(site: Site, kind: Kind | None, outlines: Mapping[Key, Dictionary]) -> Key:
    """The dictionary that is meant."""
    kinds = [known for known in KINDS if (site, known) in outlines and kind in (None, known)]
    if not kinds:
        what = "dictionary" if kind is None else kind
        there = ", ".join(f"{known}_{at}" for at, known in sorted(outlines)) or "none"
        raise UsageError(f"there is no {what} of {site}; there are {there}")
    if len(kinds) > 1:
        raise UsageError(f"{site} has a transcoder and an SAE: say which is meant (kind transcoder or sae)")
    return site, kinds[0]


def _replacing(intervention: Intervention, site: Site, outlines: Mapping[Key, Dictionary]) -> Key | None:
    """The dictionary that stands for the MLP of a site; None where the MLP stays.  `UsageError` where there would be two."""
    spliced = intervention.spliced
    if intervention.method == "difference" and site not in spliced:
        return None
    kind = spliced.get(site)
    found = {_key(site, kind, outlines)} if kind is not None else set()
    if (
        kind is None or intervention.method == "replacement"
    ):  # beside a dictionary that is named, a difference may be made
        found |= {_key(edit.site, edit.kind, outlines) for edit in intervention.edits if edit.site == site}
    if len(found) > 1:
        raise UsageError(
            f"{intervention.name}: both the transcoder and the SAE of {site} would stand for its MLP: edit one of them, or use "
            "the method difference without a splice there"
        )
    if found or site not in spliced:
        return found.pop() if found else None
    if all((site, known) in outlines for known in KINDS):
        names = " or ".join(f"{known}_{site}" for known in KINDS)
        raise UsageError(f"{intervention.name}: {site} has a transcoder and an SAE: splice {names}")
    return _key(site, None, outlines)


def _named(intervention: Intervention, part: str) -> str:
    """What messages call a part of an intervention, whose own name often says it already."""
    return intervention.name if part in intervention.name else f"{intervention.name}: {part}"


def _check_off(intervention: Intervention, n_blocks: int, num_steps: int) -> None:
    for off in intervention.off:
        what = _named(intervention, f"{off.stream} {spans(off.layers)} off")
        _check_blocks(what, off.layers, n_blocks)
        _check_steps(what, off.steps, num_steps)


def _check_blocks(what: str, layers: Sequence[int], n_blocks: int) -> None:
    beyond = sorted({layer for layer in layers if layer >= n_blocks})
    if beyond:
        raise UsageError(f"{what}: there is no block {spans(beyond)}; the model has double blocks 0 to {n_blocks - 1}")


def _check_steps(what: str, steps: Sequence[int] | None, num_steps: int) -> None:
    beyond = sorted({step for step in steps or () if step >= num_steps})
    if beyond:
        raise UsageError(f"{what}: there is no step {spans(beyond)}; pictures are drawn in steps 0 to {num_steps - 1}")


def _check_tokens(
    intervention: Intervention, edit: FeatureEdit, tokens: Mapping[str, int], grid: tuple[int, int] | None
) -> None:
    what, count = _named(intervention, str(edit)), tokens[edit.site.stream]
    beyond = sorted({token for token in edit.tokens.positions or () if token >= count})
    if beyond:
        raise UsageError(f"{what}: {edit.site.stream} has no token {spans(beyond)}; it has {count}, 0 to {count - 1}")
    if edit.tokens.mask is not None:
        if edit.site.stream != "img":
            raise UsageError(f"{what}: a mask lies over the picture; choose txt tokens by their positions")
        if grid is None:
            raise UsageError(f"{what}: a mask needs the grid of image tokens")
        edit.tokens.resolved(grid)


def _check_peaks(
    intervention: Intervention, edit: FeatureEdit, outlines: Mapping[Key, Dictionary], peaks: Peaks | None
) -> None:
    if edit.unit == "absolute":
        return
    known = None if peaks is None else peaks.get(_key(edit.site, edit.kind, outlines))
    if known is None:
        raise UsageError(
            f"{_named(intervention, str(edit))} counts in peaks, and no analysis says what they are: give --analysis OUT of "
            "analyze scores over this site, or a strength in activations"
        )
    dead = [feature for feature in edit.features if not known[feature] > 0]
    if dead:
        raise UsageError(
            f"{_named(intervention, str(edit))}: feature {', '.join(map(str, dead))} was never active in the analysis, so it has no "
            "peak to count in: give a strength in activations"
        )


def _check_not_off(intervention: Intervention, edit: FeatureEdit, num_steps: int) -> None:
    """An edit whose MLP is off at all its steps would do nothing."""
    offs = [off for off in intervention.off if (edit.site, "mlp") in off.spots()]
    if all(any(off.at(step) for off in offs) for step in range(num_steps) if edit.at(step)):
        raise UsageError(
            f"{_named(intervention, str(edit))}: the {edit.site.stream} stream is off there at all its steps: it would do nothing"
        )
