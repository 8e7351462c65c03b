"""`--plan`: everything that a harvest says before it begins, and nothing that it writes."""

from harvest.planning import budget, operating
from harvest.planning.estimate import announce
from harvest.planning.plan import make_outline
from harvest.remaining import is_extension, missing_parts
from harvest.settings import HarvestSettings
from harvest.workers.shares import worker_of


def rehearse(asked: HarvestSettings, settings: HarvestSettings) -> None:
    """Print the plan, with `--scale` what so many prompts take, with `--budget` what fits; `GranaryError` for what a harvest would refuse.

    `settings` are those `asked` for, with what `--resume` and `--extend` restored.
    """
    plan = make_outline(settings)
    if settings.scale is not None:
        operating.show(plan)
        return
    if settings.budget is not None:
        budget.show(plan)
        return
    chosen = settings.parts_of(plan.meta.n_parts)
    missing = [part for part in missing_parts(plan, is_extension(asked, plan)) if part in chosen]
    announce(plan, settings.out, missing, worker_of(settings, {}).share(missing))
