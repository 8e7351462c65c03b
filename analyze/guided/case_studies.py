"""The four published case studies of DifFRACT (arXiv:2606.15796) as recipes: features of a graph in, interventions to draw out.

    colour prior             the image feature alone, its text context alone, both together
    concept against context  the concept's features, the context's features, both: which of them carries the picture
    suppressor               a feature that inhibits the target: without it, and stronger
    temporal                 how much of a target comes from each stream at each step, and a stream switched off step by step

Each gives a list for `Painter.draw` or `analyze steer`; with what they are compared is up to who draws.  Features come from
`guided.sources`: what excites a target (`ranked_sources`), what inhibits it (`suppressors`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from analyze.guided.sources import Feature, Member, Source, mean_strengths
from analyze.steering.edits import Intervention, Mode, StreamOff, edits_of
from store.errors import UsageError
from store.sites import Stream


def colour_prior(
    image: Sequence[Feature], context: Sequence[Feature], mode: Mode = "invert", strength: float = 3.0
) -> list[Intervention]:
    """Image features alone, their text context alone, and both: what an image feature does without the text that feeds it."""
    parts = {
        "image features alone": image,
        "text context alone": context,
        "image features and text context": [*image, *context],
    }
    return [Intervention(name, edits_of(features, mode, strength)) for name, features in parts.items()]


def concept_and_context(
    concept: Sequence[Feature], context: Sequence[Feature], mode: Mode = "zero", strength: float = 1.0
) -> list[Intervention]:
    """The concept's features, those of its context, and both."""
    parts = {"concept": concept, "context": context, "concept and context": [*concept, *context]}
    return [Intervention(name, edits_of(features, mode, strength)) for name, features in parts.items()]


def suppressor(features: Sequence[Feature], strengths: Sequence[float] = (2.0, 4.0)) -> list[Intervention]:
    """Features that inhibit a target taken away, and made so many times as strong."""
    taken = Intervention("suppressor off", edits_of(features, "zero"))
    return [taken, *(Intervention(f"suppressor x {s:g}", edits_of(features, "amplify", s)) for s in strengths)]


def stepwise(stream: Stream, layers: Sequence[int], num_steps: int) -> list[Intervention]:
    """The MLPs of a stream off at each step alone, then from each step on."""
    if num_steps < 1:
        raise UsageError(f"pictures are drawn in {num_steps} steps: give at least 1")
    alone = [
        Intervention(f"{stream} off at step {step}", off=(StreamOff(stream, tuple(layers), (step,)),))
        for step in range(num_steps)
    ]
    onward = [
        Intervention(
            f"{stream} off from step {step} on", off=(StreamOff(stream, tuple(layers), tuple(range(step, num_steps))),)
        )
        for step in range(num_steps - 1)
    ]
    return [*alone, *onward]


def stream_shares(members: Sequence[Member]) -> dict[int, dict[str, float]]:
    """step -> stream -> share of all |effects| of features on the targets, mean over the graphs of that step."""
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    for member in members:
        total: dict[str, float] = {"img": 0.0, "txt": 0.0}
        for (site, _), effect in member.strengths.items():
            total[site.stream] += abs(effect)
        whole = sum(total.values())
        if whole > 0:
            found[member.step].append({stream: value / whole for stream, value in total.items()})
    return {
        step: {stream: sum(each[stream] for each in shares) / len(shares) for stream in ("img", "txt")}
        for step, shares in sorted(found.items())
    }


def suppressors(members: Mapping[str, Sequence[Member]], value: str) -> list[Source]:
    """The features that inhibit the targets of a value's graphs, the strongest first; of both streams.

    Ranked by the mean over its graphs, less that over the graphs of the other values, as `ranked_sources` does; below 0 all.
    """
    return [source for source in reversed(mean_strengths(members, value)) if source.excess < 0 and source.share < 0]
