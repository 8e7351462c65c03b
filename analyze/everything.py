"""Scores, the truth table where the store knows the truth, and the report, one after the other."""

from dataclasses import fields

from analyze.inputs import open_analysis
from analyze.pictures.sheets import refuse_without_pictures
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import AllSettings, Inputs
from analyze.truth import judging as truth
from analyze.truth.settings import TruthSettings


def run(settings: AllSettings) -> report.Report:
    """The report, after everything that it is made from."""
    inputs = {field.name: getattr(settings, field.name) for field in fields(Inputs)}
    judging = TruthSettings(**inputs, images=settings.images, any_picture=settings.any_picture, seed=settings.seed)
    analysis = open_analysis(judging)
    knows_truth = "truth" in analysis.store.prompts().column_names
    refuse_without_pictures(analysis, analysis.subjects)  # before the scores are paid for
    if knows_truth:
        truth.choose_judges(analysis, judging)
    scores.run(ScoresSettings(**inputs, padding=settings.padding))
    if knows_truth:
        truth.run(judging)
    return report.run(ReportSettings(**inputs, title=settings.title))
