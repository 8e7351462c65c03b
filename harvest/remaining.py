"""Which parts of a store are still to be made, and whether this run may make them."""

from collections.abc import Sequence
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


def missing_parts(plan: Outline, extending: bool) -> Sequence[int]:
    """The parts that are not there yet; `UsageError` where another run lies there, or one that cannot be extended so."""
    out = plan.settings.out
    if out is None:
        return range(plan.meta.n_parts)
    if extending:
        _refuse_other_prompts(plan, out)
        there = peek(out)
        if isinstance(plan, Plan) or there is None:
            refuse_extension(out, plan.meta, plan.settings.allow_mixed)
        return [part for part in range(plan.meta.n_parts) if not (out / layout.part_commit(part)).exists()]
    if isinstance(plan, Plan):  # an outline does not know what the store says of its model
        refuse_other(out, plan.meta, plan.settings.allow_mixed)
    return uncommitted(out, plan.meta)


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
