"""Scores, coherence, the truth table and the report, one after the other: each where the store has what it needs.

1. What was asked for and cannot be (a CLIP folder that is none, dictionaries of another model) is refused before anything is
   computed; what the store merely lacks (pictures, a truth) makes its part be left out, and the reason is said.
2. Scores that are there already are kept, and so are embeddings: the same command goes on where it was stopped.
3. The closing summary says of every part what came out, or why it was left out.
"""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from analyze.features import coherence
from analyze.features.clip import clip_for, load_clip
from analyze.features.coherence import CoherenceSummary
from analyze.features.embeddings import given_embeddings, refuse_without_pictures
from analyze.features.settings import CoherenceSettings
from analyze.inputs import Analysis, open_analysis
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.scoring import scores
from analyze.scoring.scores import ScoresSummary
from analyze.scoring.settings import ScoresSettings
from analyze.settings import AllSettings, Inputs
from analyze.truth import judging as truth
from analyze.truth.attributes import why_unknown
from analyze.truth.settings import TruthSettings
from analyze.truth.table import verdict_line
from store.errors import UsageError


@dataclass(frozen=True)
class Everything:
    """What a run of `all` made; None for a part that was left out."""

    scores: ScoresSummary
    coherence: CoherenceSummary | None
    truth: dict[str, Any] | None
    report: report.Report
    left_out: dict[str, str]
    """Part -> why it was left out."""
    seconds: float = field(compare=False)


def run(settings: AllSettings) -> Everything:
    """Make all parts that the store allows, and say at the end what each found.

    Errors: those of the parts; whatever can be known beforehand is refused before scores are paid for.
    """
    started = time.monotonic()
    inputs = {each.name: getattr(settings, each.name) for each in fields(Inputs)}
    passed = ("padding", "top", "active_above", "dtype", "memory", "workers", "scheduler", "device")
    scoring = ScoresSettings(**inputs, **{name: getattr(settings, name) for name in passed})
    device = None if settings.device == "auto" else settings.device
    comparing = CoherenceSettings(
        **inputs, clip=settings.clip, embeddings=settings.embeddings, top_m=settings.top_m, device=device
    )
    judging = TruthSettings(**inputs, images=settings.images, any_picture=settings.any_picture, seed=settings.seed)
    top = min(ReportSettings.top, settings.top)
    reporting = ReportSettings(
        **inputs,
        title=settings.title,
        top=top,
        graphs=settings.graphs,
        steering=settings.steering,
        faithfulness=settings.faithfulness,
    )
    analysis = open_analysis(scoring)
    left_out = _left_out(analysis, comparing, judging)
    for part, reason in left_out.items():
        print(f"all: no {part}: {reason}", flush=True)
    scored = scores.run(scoring)
    compared = None if "coherence" in left_out else coherence.run(comparing)
    judged = None if "truth" in left_out else truth.run(judging)
    written = report.run(reporting)
    assert isinstance(written, report.Report)  # it was not asked for its plan
    made = Everything(
        scores=scored,
        coherence=compared,
        truth=judged,
        report=written,
        left_out=left_out,
        seconds=time.monotonic() - started,
    )
    print(_summary(made, analysis, settings))
    return made


def _left_out(analysis: Analysis, comparing: CoherenceSettings, judging: TruthSettings) -> dict[str, str]:
    """Part -> why the store does not allow it; raises what is wrong with what was asked for by name."""
    found = {
        "coherence": _no_coherence(analysis, comparing),
        "truth": (
            _reason(lambda: truth.choose_judges(analysis, judging))
            if "truth" in analysis.store.prompts().column_names
            else why_unknown(analysis.store)
        ),
    }
    return {part: reason for part, reason in found.items() if reason is not None}


def _no_coherence(analysis: Analysis, comparing: CoherenceSettings) -> str | None:
    """Why there can be no coherence; None where there can."""
    store = analysis.store
    if comparing.embeddings is not None:
        given_embeddings(comparing.embeddings, store.n_images)
        return None
    if comparing.clip is None:
        reason = _reason(lambda: refuse_without_pictures(store)) or _reason(lambda: clip_for(store, None))
        if reason is not None:
            return reason
    refuse_without_pictures(store)
    load_clip(clip_for(store, comparing.clip), comparing.device)  # so that one that is none is refused now
    return None


def _reason(check: Callable[[], object]) -> str | None:
    """What a check has against it; None when it passes."""
    try:
        check()
    except UsageError as error:
        return str(error)
    return None


def _summary(made: Everything, analysis: Analysis, settings: AllSettings) -> str:
    """What came out, a line a part, and what to do next."""
    found, pairs = made.scores, f"{len(analysis.subjects)} dictionaries x {len(analysis.steps)} steps"
    there = f"; {found.found} were there already" if found.found else ""
    said = {
        "scores": f"{found.computed + found.found} matrices ({pairs}) of {found.n_images} images{there}",
        "coherence": "" if made.coherence is None else _coherence_line(made.coherence),
        "truth": "" if made.truth is None else verdict_line(made.truth),
        "report": f"open {made.report.index} in a browser; the folder can be sent as it is",
    }
    where = shlex.quote(str(settings.dictionaries))
    label = f'python -m analyze label --dictionaries {where} {analysis.subjects[0].name}/FEATURE "…"'
    lines = [f"all: {made.seconds:.0f} s -> {settings.out}"]
    lines += [f"  {part:<11}{text or 'left out: ' + made.left_out[part]}" for part, text in said.items()]
    lines.append(f"  next       say what you recognise: {label}")
    if analysis.store.traced is not None and not settings.graphs:
        lines.append(
            f"             what made one fire, in {analysis.store.traced.text()}: python -m analyze graph --help"
        )
    return "\n".join(lines)


def _coherence_line(found: CoherenceSummary) -> str:
    if not found.medians:
        return "no feature is active on two images of different prompts"
    (name, step), best = max(found.medians.items(), key=lambda item: item[1])
    return f"medians up to {best:.3f} ({name}, step {step}); unrelated pictures have {found.baseline:.3f}"
