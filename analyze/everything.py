"""Scores, the truth table where the store knows the truth, and the report, one after the other."""

from dataclasses import fields

from analyze import report, scores, truth
from analyze.settings import AllSettings, Inputs, ReportSettings, ScoresSettings, TruthSettings
from store import open_store


def run(settings: AllSettings) -> report.Report:
    """The report, after everything that it is made from."""
    inputs = {field.name: getattr(settings, field.name) for field in fields(Inputs)}
    scores.run(ScoresSettings(**inputs, padding=settings.padding))
    if "truth" in open_store(settings.store).prompts().column_names:
        truth.run(TruthSettings(**inputs, images=settings.images, seed=settings.seed))
    return report.run(ReportSettings(**inputs, title=settings.title))
