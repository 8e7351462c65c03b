"""`--plan`: everything that a harvest says before it begins, and nothing that it writes."""

from collections.abc import Sequence
from pathlib import Path

from harvest import budget
from harvest.estimate import announce
from harvest.plan import Outline, Plan, make_outline
from harvest.settings import HarvestSettings
from store.errors import UsageError
from store.opening import peek, refuse_other, uncommitted
from store.writer import refuse_extension


def rehearse(settings: HarvestSettings, extending: bool) -> None:
    """Print the plan, or with `--budget` what fits; `GranaryError` for what a harvest would refuse."""
    plan = make_outline(settings)
    if settings.budget is not None:
        budget.show(plan)
        return
    chosen = settings.parts_of(plan.meta.n_parts)
    announce(plan, settings.out, [part for part in missing_parts(plan, extending) if part in chosen])


def missing_parts(plan: Outline, extending: bool) -> Sequence[int]:
    """The parts that are not there yet; `UsageError` where another run lies there, or one that cannot be extended so."""
    out = plan.settings.out
    if out is None:
        return range(plan.meta.n_parts)
    if extending:
        _refuse_other_prompts(plan, out)
        return refuse_extension(out, plan.meta)
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
