"""What is asked of `responsive`, checked whole before a model is loaded or a weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from analyze.features.clip import clip_for
from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.prompts import prompt_texts
from analyze.responsive.candidates import Candidate, best_images, candidates_of, scores_of
from analyze.responsive.concept import BEST
from analyze.responsive.settings import ResponsiveSettings
from analyze.steering.canvas import Canvas, canvas_of_store
from analyze.steering.distances import columns_at_hand
from analyze.steering.drawing import shots_of
from analyze.steering.edits import FeatureEdit, Intervention
from analyze.steering.interventions import Peaks, check
from analyze.steering.peaks import read_peaks
from analyze.steering.shelf import Shelf, shelf_of
from analyze.steering.token_choice import TokenChoice
from store.errors import UsageError
from store.sites import parse_numbers, parse_sites


@dataclass(frozen=True)
class Search:
    """One feature, the images it is tried on, and what is done to it."""

    subject: Subject
    feature: int
    candidates: tuple[Candidate, ...]
    best_images: tuple[int, ...]
    """the images on which it is strongest"""
    interventions: tuple[Intervention, ...]
    """one a strength"""
    peak: float = 1.0
    """the feature's greatest activation, where strengths count in it"""

    @property
    def place(self) -> str:
        """`img_3/66`"""
        return f"{self.subject.name}/{self.feature}"

    @property
    def target(self) -> str:
        """`img_3:66`, or `sae_img_3:66` where the site has both kinds: what `--features` names"""
        return f"{self.subject.name}:{self.feature}"


@dataclass(frozen=True)
class Question:
    """Everything that the command needs, checked."""

    settings: ResponsiveSettings
    analysis: Analysis
    canvas: Canvas
    shelf: Shelf
    peaks: Peaks | None
    searches: tuple[Search, ...]
    clip: str | None
    """what the CLIP model is loaded by; None: pictures are compared without"""
    prompts: tuple[str, ...]
    """of every image of the store"""

    @property
    def batch_size(self) -> int:
        """Pictures drawn at once."""
        return self.settings.batch_size or self.analysis.store.meta.batch_size

    def pictures_of(self, searches: Sequence[Search]) -> int:
        """How many pictures are drawn of these features: each candidate plain, and once a strength."""
        return sum(len(search.candidates) * (1 + len(search.interventions)) for search in searches)

    def forwards_of(self, searches: Sequence[Search]) -> int:
        """How often the transformer runs for them, an image of a batch and a step counted once."""
        return self.pictures_of(searches) * self.canvas.num_inference_steps


def ask(settings: ResponsiveSettings) -> Question:
    """The question that the settings ask.

    Errors: `UsageError` for a feature, step, token or site that is not there, a feature that is active nowhere or on no image of the
    band, a rank that cannot be measured here; `MismatchError` for dictionaries or an OUT of another model or store.
    """
    if settings.sites == "all":
        settings = replace(settings, sites=",".join(dict.fromkeys(_split(text)[1] for text in settings.features)))
    analysis = open_analysis(settings)
    choices = check_output(analysis)
    canvas = canvas_of_store(analysis.store, settings.model, settings.dtype)
    shelf = shelf_of(settings.dictionaries, canvas)
    clip = _clip(settings, analysis)
    peaks = read_peaks(settings.out, analysis.subjects) if settings.unit == "peak" else None
    prompts = prompt_texts(analysis.store)
    tokens = {str(stream): count for stream, count in canvas.tokens.items()}
    searches = []
    for subject, feature in _features(settings, analysis):
        interventions = _interventions(settings, subject, feature, canvas)
        for intervention in interventions:
            check(
                intervention, shelf.outlines, canvas.n_blocks, tokens, canvas.num_inference_steps, canvas.grid, peaks, canvas.d_model
            )  # fmt: skip
        scores = scores_of(analysis, subject, feature)
        chosen = candidates_of(
            scores, prompts, settings.low, settings.high, settings.candidates, float(choices["active_above"]),
            f"{subject.name}/{feature}",
        )  # fmt: skip
        shots_of(analysis.store, [candidate.image for candidate in chosen])  # refuses stores without prompts or seeds
        strongest = tuple(best_images(scores, prompts, BEST))
        known = None if peaks is None else peaks.get((subject.site, subject.outline.config.kind))
        peak = 1.0 if known is None else float(known[feature])
        searches.append(Search(subject, feature, tuple(chosen), strongest, interventions, peak))
    return Question(settings, analysis, canvas, shelf, peaks, tuple(searches), clip, tuple(prompts))


def _split(text: str) -> tuple[str, str, str]:
    """(name of the dictionary, its site, its features) of `img_3:66,70` or `transcoder_img_3:66,70`."""
    name, colon, features = text.strip().partition(":")
    site = name.removeprefix("transcoder_").removeprefix("sae_")
    if not (colon and site and features):
        raise UsageError(f"--features {text!r}: write a site and features, such as img_3:66,70")
    parse_sites(site)
    return name, site, features


def _features(settings: ResponsiveSettings, analysis: Analysis) -> list[tuple[Subject, int]]:
    """Every feature that is asked for, once, in the order of the words."""
    named: Mapping[str, Subject] = {subject.name: subject for subject in analysis.subjects}
    named = {**{subject.outline.name: subject for subject in analysis.subjects}, **named}
    found: dict[tuple[str, int], tuple[Subject, int]] = {}
    for text in settings.features:
        name, _, numbers = _split(text)
        if name not in named:
            there = ", ".join(sorted(subject.name for subject in analysis.subjects))
            raise UsageError(f"--features {text}: no dictionary {name} is analyzed; there are {there}")
        subject = named[name]
        for feature in parse_numbers(numbers, subject.n_features, f"feature of {subject.name}"):
            found[subject.name, feature] = (subject, feature)
    return list(found.values())


def _interventions(
    settings: ResponsiveSettings, subject: Subject, feature: int, canvas: Canvas
) -> tuple[Intervention, ...]:
    """What is done to a feature, one intervention a strength; named as `analyze steer` would."""
    steps = None
    if settings.at_steps.strip() != "all":
        steps = parse_numbers(settings.at_steps, canvas.num_inference_steps, "step")
    tokens = TokenChoice.parse(settings.tokens).resolved(canvas.grid)
    found = []
    for strength in settings.strengths if settings.mode != "zero" else (1.0,):
        edit = FeatureEdit(
            subject.site, (feature,), settings.mode, strength, steps, tokens, subject.outline.config.kind, settings.unit
        )
        found.append(Intervention(str(edit).partition(" ")[0], (edit,), method=settings.method))
    return tuple(found)


def _clip(settings: ResponsiveSettings, analysis: Analysis) -> str | None:
    """The CLIP model that pictures are compared with; None where none is known and none is needed."""
    if settings.rank not in (*columns_at_hand(clip=True), "concept"):
        raise UsageError(
            f"--rank {settings.rank}: it takes the package lpips and AlexNet's weights, which are not here"
        )
    try:
        name = clip_for(analysis.store, settings.clip)
    except UsageError:
        if settings.rank in ("clip", "concept"):
            raise
        return None
    if settings.rank == "concept" and analysis.store.meta.pictures == "none":
        raise UsageError("--rank concept compares with the store's pictures, and it keeps none: rank by flip or clip")
    return name
