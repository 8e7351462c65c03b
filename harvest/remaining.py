"""Which parts of a store are still to be made, and whether this run may make them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harvest.planning.plan import Outline, Plan
from harvest.settings import HarvestSettings
from store import layout
from store.errors import UsageError
from store.opening import peek, refuse_extension, refuse_other, uncommitted


def is_extension(asked: HarvestSettings, plan: Outline) -> bool:
    """Whether a store is to become longer: by `--extend`, or by `--resume` of an extension that was stopped before it began."""
    there = peek(plan.settings.out) if asked.resume is not None and plan.settings.out is not None else None
    return asked.extend is not None or (there is not None and there.n_images < plan.meta.n_images)


def missing_parts(plan: Outline, extending: bool, whole: bool | None = None) -> Sequence[int]:
    """The parts that are not there yet; `UsageError` where another run lies there, or one that cannot be extended so.

    `whole`: whether the plan knows all that a store says of its run; default: it does when its model was loaded.
    """
    out, whole = plan.settings.out, isinstance(plan, Plan) if whole is None else whole
    if out is None:
        return range(plan.meta.n_parts)
    if extending:
        _refuse_other_prompts(plan, out)
        there = peek(out)
        if whole or there is None:
            refuse_extension(out, plan.meta, plan.settings.allow_mixed)
        return [part for part in range(plan.meta.n_parts) if not (out / layout.part_commit(part)).exists()]
    if whole:  # an outline does not know what the store says of its model
        refuse_other(out, plan.meta, plan.settings.allow_mixed)
    return uncommitted(out, plan.meta)


def missing_before_encoding(asked: HarvestSettings, plan: Outline) -> Sequence[int]:
    """The same as far as it can be told without weights, as if those were the store's: what `make_plan` shows to its `accept`."""
    meta, there = plan.meta, peek(plan.settings.out) if plan.settings.out is not None else None
    if there is not None:
        same = meta.weights.get("policy") == there.weights.get("policy")
        hashes = {"weights_sha256": there.model.get("weights_sha256")}
        meta = replace(meta, model=meta.model | hashes, weights=there.weights if same else meta.weights)
        if meta.traces is not None and there.traces is not None:
            meta = replace(meta, traces=meta.traces | {"weights": there.traces.get("weights")})
    return missing_parts(replace(plan, meta=meta), is_extension(asked, plan), True)


def _refuse_other_prompts(plan: Outline, out: Path) -> None:
    """`UsageError` unless the prompts begin as those that the store was made of."""
    there = peek(out)
    if there is None or plan.prompts is None:
        return
    begins = plan.prompts.source_of_first(there.n_images)
    if there.n_images <= plan.meta.n_images and begins["sha256"] != there.prompts["sha256"]:
        raise UsageError(
            f"{out} was made of prompts of SHA-256 {there.prompts['sha256']}, and the first {there.n_images} images of "
            f"{begins['source']} now have prompts of SHA-256 {begins['sha256']}: extend with a file that begins as the old one"
        )
