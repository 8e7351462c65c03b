"""Harvest: runs FLUX over prompts and fills a store.  The only package that runs FLUX to do so.

`python -m harvest --model tiny-flux --images 256 --out STORE` and `harvest.run(HarvestSettings(…))` are the same.
"""

from harvest.settings import HarvestSettings

__all__ = ["HarvestSettings", "run"]


def run(settings: HarvestSettings) -> object:
    """Fill the store that `settings` describe; returns the run's summary.  Imports the model code on first use."""
    from harvest.fill import run as run_harvest

    return run_harvest(settings)
