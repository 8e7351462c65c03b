"""`--plan`: everything that a harvest says before it begins, and nothing that it writes."""

from harvest import budget
from harvest.estimate import announce
from harvest.plan import make_outline
from harvest.remaining import is_extension, missing_parts
from harvest.settings import HarvestSettings


def rehearse(asked: HarvestSettings, settings: HarvestSettings) -> None:
    """Print the plan, or with `--budget` what fits; `GranaryError` for what a harvest would refuse.

    `settings` are those `asked` for, with what `--resume` and `--extend` restored.
    """
    plan = make_outline(settings)
    if settings.budget is not None:
        budget.show(plan)
        return
    chosen = settings.parts_of(plan.meta.n_parts)
    announce(plan, settings.out, [part for part in missing_parts(plan, is_extension(asked, plan)) if part in chosen])
