"""What `guided` will draw, settled and checked before the model is loaded: pictures, features of every arm, strengths.

Every picture of the store has one part at most: its trace explained the circuit; or it is of the half on which the truth table chose
its features, and strengths are tuned on it; or it is judged.  With a store to be judged no picture of this one is judged, and none
of that one whose scene this one (or the traced one) shows.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analyze.guided.arms import (
    Arm,
    Labelled,
    best_of,
    best_of_truth,
    features_of_arms,
    outlines_of,
    told_by_truth,
    transcoders,
)
from analyze.guided.settings import GuidedSettings
from analyze.guided.sources import (
    Feature,
    Member,
    Source,
    check_dictionaries,
    ranked_sources,
    read_members,
)
from analyze.guided.targets import alone, check_same_pictures, image_sites, judges_of, truth_settings
from analyze.inputs import Analysis, open_analysis
from analyze.prompts import prompt_texts
from analyze.settings import Inputs
from analyze.steering.canvas import Canvas, canvas_of_store
from analyze.steering.edits import Intervention, edits_of
from analyze.steering.interventions import check
from analyze.truth.attributes import VALUES, Attribute, Scene, read_scenes
from analyze.truth.judges import Judges
from store import Store, open_store
from store.errors import MismatchError, UsageError
from store.sites import parse_numbers
from store.sizes import picture_size

LEAST_TUNING = 3
"""pictures without which no strength is chosen"""
FEW_TUNING = 12
"""pictures below which the choice is said to stand on few"""


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
    """images of `GuidedPlan.judged`"""
    tuning: tuple[int, ...]
    """images of the analysed store"""
    graphs: int
    """how many explain the value"""


@dataclass(frozen=True)
class GuidedPlan:
    """Everything that is settled before the model is loaded."""

    settings: GuidedSettings
    analysis: Analysis
    canvas: Canvas
    cases: tuple[Case, ...]
    judged: Store
    """the store whose pictures are judged"""
    truth: dict[str, Any]
    """what the truth table was made with"""
    left_out: int
    """graphs of images that show several values of the attribute"""
    foreign: int
    """graphs that explain something else than what `targets` chooses for the value of their picture"""


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
    by_value, left_out, foreign = _by_value(members, traced, analysis, settings.attribute)
    prompts, seeds = prompt_texts(traced), traced.prompts()["seed"].to_pylist()
    used = {(prompts[member.image], seeds[member.image]) for member in members}
    pool = _pool(settings, canvas, store, traced, judges, used)
    cases = tuple(_case(value, by_value, pool, analysis, canvas, judges, settings) for value in settings.asked)
    return GuidedPlan(settings, analysis, canvas, cases, pool.judged_store, truth_settings(analysis), left_out, foreign)


def check_readable(canvas: Canvas) -> None:
    """`UsageError` unless the judge can read what is drawn."""
    from harvest.tiny_flux.scenes import PIXELS

    if (canvas.height, canvas.width) != (PIXELS, PIXELS):
        raise UsageError(
            f"{canvas.model} draws {picture_size(canvas.width, canvas.height)} here, the judge reads tiny-flux's {PIXELS}x{PIXELS}: steer "
            "other models with python -m analyze steer --edit, with the features that a graph names"
        )


def _check_store(members: Sequence[Member], traced: Store) -> None:
    for member in members:
        if member.store != traced.id:
            raise MismatchError(
                f"{member.folder} explains a picture of store {member.store[:23]}…, {traced.path} is {traced.id[:23]}…: say with "
                "--traces which store's traces the graphs explain"
            )


def _by_value(
    members: Sequence[Member], traced: Store, analysis: Analysis, attribute: str
) -> tuple[dict[str, list[Member]], int, int]:
    """The graphs of every value; how many are of pictures that show several, and how many explain nothing that tells their value.

    A value's graph is of a picture that shows it alone, and explains what `targets` chooses for it at that step (whatever its --last):
    what else a red picture makes active has a circuit too, and it is not that of red.
    """
    scenes, told = {scene.image: scene for scene in read_scenes(traced)}, told_by_truth(analysis, attribute)
    sites = image_sites(analysis)
    found: dict[str, list[Member]] = defaultdict(list)
    several = 0
    for member in members:
        values = [v for v in VALUES[attribute] if alone(scenes[member.image], Attribute(attribute, v))]  # type: ignore[index]
        several += not values
        for value in values:
            chosen = {best_of(told, value, sites[-last:], member.step) for last in range(1, len(sites) + 1)}
            if set(member.targets) <= chosen:
                found[value].append(member)
    return dict(found), several, len(members) - several - sum(map(len, found.values()))


def _case(
    value: str, members: Mapping[str, Sequence[Member]], pool: "_Pool", analysis: Analysis, canvas: Canvas, judges: Judges,
    settings: GuidedSettings,
) -> Case:  # fmt: skip
    own = members.get(value, ())
    targets = tuple(sorted({feature for member in own for feature in member.targets}))
    if not own and (settings.with_target or {"target", "matched"} & set(settings.chosen_arms)):
        raise UsageError(
            f"no graph of a picture that is all {value} explains what analyze targets chooses for it: make graphs of those"
            + (", or leave out the arms target and matched and --with-target" if settings.by == "supernode" else "")
        )
    circuit = _circuit(value, members, settings)
    features = tuple(source.key for source in circuit)
    if settings.with_target:  # before the other arms are counted: they have as many
        features = tuple(dict.fromkeys((*features, *targets)))
    _check(_variant("circuit", features, settings, analysis), analysis, canvas)  # of a supernode it may be anything
    choosing, judged = pool.pictures(Attribute(settings.attribute, value))
    if not judged:
        raise UsageError(
            f"no picture of {pool.judged_store.path} is left that shows {settings.attribute} {value} and was not used for choosing: "
            "harvest more images (with pictures), or leave this value out with --values"
        )
    if settings.own_arms and len(choosing) < LEAST_TUNING:
        raise UsageError(
            f"{len(choosing)} pictures of {settings.attribute} {value} are left to choose strengths on, at least {LEAST_TUNING} are "
            "needed: harvest more images, or say --own-strengths none"
        )
    labelled = _labelled(judges, Attribute(settings.attribute, value))
    single = best_of_truth(analysis, settings.attribute, value, transcoders(analysis))
    arms = features_of_arms(settings.chosen_arms, features, targets, analysis, labelled, single, settings.seed)
    variants = tuple(_variant(arm, chosen, settings, analysis) for arm, chosen in arms.items())
    for variant in variants:
        _check(variant, analysis, canvas)
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


@dataclass(frozen=True)
class _Pool:
    """The pictures that are left: of the choosing half for strengths, of the other half or of another store for the judge."""

    choosing: tuple[Scene, ...]
    judged: tuple[Scene, ...]
    judged_store: Store

    def pictures(self, attribute: Attribute) -> tuple[list[int], list[int]]:
        """Images that show a value: those to choose on, those to be judged."""
        choosing, judged = (
            [scene.image for scene in scenes if scene.shows(attribute)] for scenes in (self.choosing, self.judged)
        )
        return choosing, judged


def _pool(
    settings: GuidedSettings, canvas: Canvas, store: Store, traced: Store, judges: Judges, used: set[tuple[str, Any]]
) -> _Pool:
    prompts, seeds = prompt_texts(store), store.prompts()["seed"].to_pylist()
    scenes = {scene.image: scene for scene in read_scenes(store)}
    halves: tuple[list[Scene], list[Scene]] = ([], [])
    for image, judged in zip(judges.images.tolist(), judges.halves.score.tolist(), strict=True):
        if (prompts[image], seeds[image]) not in used:
            halves[judged].append(scenes[image])
    if settings.judge is None:
        return _Pool(tuple(halves[0]), tuple(halves[1]), store)
    other = open_store(settings.judge)
    _check_same_drawing(other, canvas, settings.model)
    known = {scene.said for each in (store, traced) for scene in read_scenes(each)}
    split = other.prompts()["split"].to_pylist()
    fresh = [
        scene for scene in read_scenes(other) if scene.drawn and scene.said not in known and split[scene.image] == "val"
    ]
    return _Pool(tuple(halves[0]), tuple(fresh), other)


def _check_same_drawing(other: Store, canvas: Canvas, model: str | None) -> None:
    """`MismatchError` unless another store's pictures are of the same model, and drawn in the same way."""
    there = canvas_of_store(other, model)
    names = (
        "weights", "dtype", "height", "width", "num_inference_steps", "max_sequence_length", "guidance",
    )  # fmt: skip
    for name in names:
        if getattr(there, name) != getattr(canvas, name):
            raise MismatchError(
                f"--judge {other.path}: {name} is {getattr(there, name)!r}, that of --store is {getattr(canvas, name)!r}: judge pictures "
                "of the same model, drawn in the same way"
            )


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


def _check(variant: Variant, analysis: Analysis, canvas: Canvas) -> None:
    check(
        variant.intervention, outlines_of(analysis), canvas.n_blocks, {str(k): v for k, v in canvas.tokens.items()},
        canvas.num_inference_steps, canvas.grid, None, canvas.d_model,
    )  # fmt: skip
