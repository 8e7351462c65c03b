"""What `guided` will draw, settled and checked before the model is loaded: pictures, features of every arm, strengths.

Every picture of the store has one part at most: its trace explained the circuit; or it is of the half on which the truth table chose
its features, and strengths are tuned on it; or it is judged.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analyze.guided.arms import Arm, Labelled, best_of_truth, features_of_arms, outlines_of, transcoders
from analyze.guided.settings import GuidedSettings
from analyze.guided.sources import (
    Feature,
    Member,
    Source,
    check_dictionaries,
    ranked_sources,
    read_members,
)
from analyze.guided.targets import alone, check_same_pictures, judges_of
from analyze.inputs import Analysis, open_analysis
from analyze.prompts import prompt_texts
from analyze.settings import Inputs
from analyze.steering.canvas import Canvas, canvas_of_store
from analyze.steering.edits import Intervention, edits_of
from analyze.steering.interventions import check
from analyze.truth.attributes import VALUES, Attribute, read_scenes
from analyze.truth.judges import Judges
from store import Store, open_store
from store.errors import MismatchError, UsageError
from store.sites import parse_numbers

LEAST_TUNING = 3
"""pictures without which no strength is chosen"""


@dataclass(frozen=True)
class Variant:
    """One way of intervening on one value: the features of an arm, all in one mode, at one strength."""

    arm: Arm
    features: tuple[Feature, ...]
    intervention: Intervention
    strength: float
    own: bool = False
    """whether the strength is the arm's own, or that of all arms"""

    @property
    def name(self) -> str:
        """`circuit`, or `single, own strength`."""
        return f"{self.arm}, own strength" if self.own else self.arm

    def at(self, strength: float) -> "Variant":
        """The same arm at a strength of its own."""
        return replace(self, intervention=self.intervention.with_strength(strength), strength=strength, own=True)


@dataclass(frozen=True)
class Case:
    """One value: its circuit, what is compared with it, and the pictures."""

    value: str
    circuit: tuple[Source, ...]
    targets: tuple[Feature, ...]
    variants: tuple[Variant, ...]
    """an arm each, all at the same strength"""
    judged: tuple[int, ...]
    tuning: tuple[int, ...]
    graphs: int
    """how many explain the value"""


@dataclass(frozen=True)
class GuidedPlan:
    """Everything that is settled before the model is loaded."""

    settings: GuidedSettings
    analysis: Analysis
    canvas: Canvas
    cases: tuple[Case, ...]
    left_out: int
    """graphs of images that show several values of the attribute, or one that is not asked for"""

    @property
    def pictures(self) -> int:
        """How many pictures are drawn if no value is finished yet."""
        own = len(self.settings.own_arms)
        each = (1 + len(self.settings.chosen_arms) + own, bool(own) + own * len(self.settings.sweep))
        return sum(each[0] * len(case.judged) + each[1] * len(case.tuning) for case in self.cases)


def open_plan(settings: GuidedSettings) -> GuidedPlan:
    """The plan; every refusal is a `GranaryError`, and the model is not loaded yet.

    `UsageError` for values without graphs, without a source or without pictures; `MismatchError` for graphs of another store or of
    other dictionaries.
    """
    analysis = open_analysis(Inputs(store=settings.store, dictionaries=settings.dictionaries, out=settings.analysis))
    canvas = canvas_of_store(analysis.store, settings.model)
    check_readable(canvas)
    judges, store = judges_of(analysis), analysis.store
    traced = store if settings.traces is None else open_store(settings.traces)
    check_same_pictures(traced, store)
    members = read_members(settings.graphs)
    _check_store(members, traced)
    check_dictionaries(members, {str(site): subject.identity for site, subject in transcoders(analysis).items()})
    by_value, left_out = _by_value(members, traced, settings.attribute)
    used = {(member.prompt, member.seed) for member in members}
    cases = tuple(_case(value, by_value, used, analysis, judges, settings) for value in settings.asked)
    for case in cases:
        _check(case, analysis, canvas)
    return GuidedPlan(settings, analysis, canvas, cases, left_out)


def check_readable(canvas: Canvas) -> None:
    """`UsageError` unless the judge can read what is drawn."""
    from harvest.tiny_flux.scenes import PIXELS

    if (canvas.height, canvas.width) != (PIXELS, PIXELS):
        raise UsageError(
            f"{canvas.model} draws {canvas.width}x{canvas.height} pixels here, the judge reads tiny-flux's {PIXELS}x{PIXELS}: steer "
            "other models with python -m analyze steer --edit, with the features that a graph names"
        )


def _check_store(members: Sequence[Member], traced: Store) -> None:
    for member in members:
        if member.store != traced.id:
            raise MismatchError(
                f"{member.folder} explains a picture of store {member.store[:23]}…, {traced.path} is {traced.id[:23]}…: say with "
                "--traces which store's traces the graphs explain"
            )


def _by_value(members: Sequence[Member], traced: Store, attribute: str) -> tuple[dict[str, list[Member]], int]:
    """The graphs of every value, those of pictures that show it alone; and how many others there are."""
    scenes = {scene.image: scene for scene in read_scenes(traced)}
    found: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        for value in VALUES[attribute]:  # type: ignore[index]
            if alone(scenes[member.image], Attribute(attribute, value)):
                found[value].append(member)
    return dict(found), len(members) - sum(map(len, found.values()))


def _case(
    value: str, members: Mapping[str, Sequence[Member]], used: set[tuple[str, int | None]], analysis: Analysis, judges: Judges,
    settings: GuidedSettings,
) -> Case:  # fmt: skip
    own = members.get(value, ())
    targets = tuple(sorted({feature for member in own for feature in member.targets}))
    circuit = _circuit(value, members, settings)
    choosing, judged = _pictures(Attribute(settings.attribute, value), used, analysis.store, judges)
    if not judged:
        raise UsageError(
            f"no picture of {analysis.store.path} is left that shows {settings.attribute} {value} and was not used for choosing: "
            "harvest more images, or leave this value out with --values"
        )
    if settings.own_arms and len(choosing) < LEAST_TUNING:
        raise UsageError(
            f"{len(choosing)} pictures of {settings.attribute} {value} are left to choose strengths on, at least {LEAST_TUNING} are "
            "needed: harvest more images, or say --own-strengths none"
        )
    labelled = _labelled(judges, Attribute(settings.attribute, value))
    single = best_of_truth(analysis, settings.attribute, value, transcoders(analysis))
    features = features_of_arms(settings.chosen_arms, circuit, targets, analysis, labelled, single, settings.seed)
    if settings.with_target and "circuit" in features:
        features["circuit"] = tuple(dict.fromkeys((*features["circuit"], *targets)))
    variants = tuple(_variant(arm, chosen, settings, analysis) for arm, chosen in features.items())
    return Case(
        value,
        circuit,
        targets,
        variants,
        tuple(judged[: settings.images]),
        tuple(choosing[: settings.tuning]),
        len(own),
    )


def _circuit(value: str, members: Mapping[str, Sequence[Member]], settings: GuidedSettings) -> tuple[Source, ...]:
    if settings.by == "supernode":
        return tuple(Source(*feature, 0.0, 0.0, 0) for feature in settings.supernodes[value])
    return tuple(ranked_sources(members, value, settings.by)[: settings.top])


def _pictures(
    attribute: Attribute, used: set[tuple[str, int | None]], store: Store, judges: Judges
) -> tuple[list[int], list[int]]:
    """Pictures that show a value and were not traced for the graphs: those of the choosing half, and those that are judged."""
    prompts, seeds = prompt_texts(store), store.prompts()["seed"].to_pylist()
    scenes = {scene.image: scene for scene in read_scenes(store)}
    found: tuple[list[int], list[int]] = ([], [])
    for image, judged in zip(judges.images.tolist(), judges.halves.score.tolist(), strict=True):
        if scenes[image].shows(attribute) and (prompts[image], seeds[image]) not in used:
            found[judged].append(image)
    return found


def _labelled(judges: Judges, attribute: Attribute) -> Labelled:
    """The choosing half, and which of it shows the value."""
    column = judges.attributes.index(attribute)
    choose = judges.halves.choose & judges.defined[:, column]
    return Labelled(judges.images[choose], np.asarray(judges.shown[choose, column], bool))


def _variant(arm: Arm, features: tuple[Feature, ...], settings: GuidedSettings, analysis: Analysis) -> Variant:
    steps = (
        None
        if settings.steps == "all"
        else parse_numbers(settings.steps, analysis.store.meta.num_inference_steps, "step")
    )
    strength = 1.0 if settings.mode == "zero" else settings.strength
    edits = edits_of(features, settings.mode, strength, "transcoder", steps=steps, tokens=settings.token_choice)
    return Variant(arm, features, Intervention(arm, edits), strength)


def _check(case: Case, analysis: Analysis, canvas: Canvas) -> None:
    for variant in case.variants:
        check(
            variant.intervention, outlines_of(analysis), canvas.n_blocks, {str(k): v for k, v in canvas.tokens.items()},
            canvas.num_inference_steps, canvas.grid, None, canvas.d_model,
        )  # fmt: skip
