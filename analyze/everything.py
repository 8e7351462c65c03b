"""Scores, the truth table where the store knows the truth, and the report, one after the other."""

from dataclasses import fields

from analyze import report, scores, truth
from analyze.inputs import open_analysis
from analyze.settings import AllSettings, Inputs, ReportSettings, ScoresSettings, TruthSettings
from analyze.sheets import refuse_without_pictures
from store import open_store


def run(settings: AllSettings) -> report.Report:
    """The report, after everything that it is made from."""
    inputs = {field.name: getattr(settings, field.name) for field in fields(Inputs)}
    knows_truth = "truth" in open_store(settings.store).prompts().column_names
    judging = TruthSettings(**inputs, images=settings.images, any_picture=settings.any_picture, seed=settings.seed)
    analysis = open_analysis(judging)
    refuse_without_pictures(analysis, analysis.subjects)  # before the scores are paid for
    if knows_truth:
        truth.choose_judges(analysis, judging)
    scores.run(ScoresSettings(**inputs, padding=settings.padding))
    if knows_truth:
        truth.run(judging)
    return report.run(ReportSettings(**inputs, title=settings.title))
