"""What is drawn of a feature: its top images or chosen ones, with the heat at every token, the prompt and its words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from analyze.inputs import Analysis, Subject
from analyze.pictures.drawing import fitted
from analyze.pictures.heat import Heat, heats
from analyze.pictures.overlay import PLAIN, Look, heat_scale, overlay, token_grid
from analyze.pictures.words import Piece, highlighted
from analyze.prompts import prompt_text
from store import Store
from store.errors import UsageError
from store.sites import Stream, parse_numbers
from store.strata import RealText


@dataclass(frozen=True)
class Example:
    """One image of a feature, with all that a sheet shows of it."""

    heat: Heat
    score: float
    prompt: str
    pieces: tuple[Piece, ...] | None
    """the prompt's tokens with their heat, for text and joint features of a store that knows its tokens' texts"""


def check_top(kept: int, top: int) -> None:
    """`UsageError` when more images are asked for than the analysis kept with each feature."""
    if top > kept:
        raise UsageError(
            f"--top is {top}, but this analysis keeps {kept} top images of each feature: compute scores with --top {top}"
        )


def refuse_without_pictures(analysis: Analysis, subjects: Iterable[Subject]) -> None:
    """`UsageError` for image features of a store that kept no pictures; text features need none."""
    if analysis.store.meta.pictures == "none" and any(subject.site.stream != "txt" for subject in subjects):
        raise UsageError(
            "this store holds no pictures to draw on: python -m analyze scores works without them; for sheets and the report harvest "
            "with --pictures webp, or choose text sites (--sites), where the store has any"
        )


def feature_row(table: pa.Table, feature: int) -> dict[str, Any]:
    """One row of a feature table."""
    return dict(table.slice(feature, 1).to_pylist()[0])


def chosen_features(table: pa.Table, named: str | None, best: int) -> list[int]:
    """The features that `named` lists, or the `best` most interesting ones that are alive; `UsageError` for unknown ones."""
    if named is not None:
        return list(parse_numbers(named, len(table), "feature"))
    order = table.filter(table["alive"]).sort_by([("interest", "descending"), ("feature", "ascending")])
    return [int(feature) for feature in order["feature"].to_pylist()[:best]]


def chosen_images(store: Store, named: str) -> list[int]:
    """The images that `named` lists, in rising order; `UsageError` for ones that the store has not."""
    return list(parse_numbers(named, store.n_images, "image"))


def gather_examples(
    analysis: Analysis,
    subject: Subject,
    step: int,
    table: pa.Table,
    features: Sequence[int],
    top: int,
    look: Look = PLAIN,
) -> dict[int, list[Example]]:
    """The top images of each feature, one a prompt, with their heat; `table` is the feature table of the subject and step."""
    wanted = {feature: table["unique_image"][feature].as_py()[:top] for feature in features}
    scores = {
        (feature, image): score
        for feature in features
        for image, score in zip(wanted[feature], table["unique_score"][feature].as_py(), strict=False)
    }
    return examples_of(analysis, subject, step, wanted, scores, look)


def examples_of(
    analysis: Analysis,
    subject: Subject,
    step: int,
    wanted: Mapping[int, Sequence[int]],
    scores: Mapping[tuple[int, int], float],
    look: Look = PLAIN,
) -> dict[int, list[Example]]:
    """Each feature on the images asked for, in their order; `scores` are by feature and image.  Words are on the feature's own scale."""
    found = {}
    for feature, group in heats(analysis, subject, step, wanted).items():
        scale = scales_of(analysis.store, subject.site.stream, group, look).words
        found[feature] = [
            example_of(analysis.store, subject, heat, scores[feature, heat.image], scale) for heat in group
        ]
    return found


def example_of(store: Store, subject: Subject, heat: Heat, score: float, scale: float) -> Example:
    """One example, its words heated on the given scale."""
    prompts = store.prompts()
    pieces = None
    if subject.site.stream != "img" and "text_pieces" in prompts.column_names:
        _, padding = RealText.of(prompts.slice(heat.image, 1)).of_image(0)
        pieces = tuple(highlighted(prompts["text_pieces"][heat.image].as_py(), heat, scale, padding))
    return Example(heat, float(score), prompt_text(store, heat.image), pieces)


def scale_of(heats: Iterable[Heat], look: Look = PLAIN) -> float:
    """The heat that is drawn hottest on all of them."""
    return heat_scale([heat.values for heat in heats], look.clip_percentile)


@dataclass(frozen=True)
class Scales:
    """The heat that is drawn hottest over pictures, and on words: one number, but of a joint site, whose tokens are of both kinds."""

    picture: float
    words: float
    on_picture: bool = True
    on_words: bool = True
    """whether there is heat at all; known of joint sites alone"""


def scales_of(store: Store, stream: Stream, heats: Iterable[Heat], look: Look = PLAIN) -> Scales:
    """The scales of heats that are drawn together; of a joint site image tokens and text tokens have their own."""
    group = list(heats)
    if stream != "joint":
        both = scale_of(group, look)
        return Scales(both, both)
    parts = [strata_of(store, stream, heat) for heat in group]
    image, text = ([pair[place] for pair in parts] for place in (0, 1))
    active = [any((heat.values > 0).any() for heat in some) for some in (image, text)]
    return Scales(scale_of(image, look), scale_of(text, look), *active)


def strata_of(store: Store, stream: Stream, heat: Heat) -> tuple[Heat, Heat]:
    """The heat on image tokens, and that on text tokens; positions are still those of the stream."""
    shown = heat.positions >= {"img": 0, "joint": store.meta.text_tokens, "txt": np.inf}[stream]
    image, text = (Heat(heat.image, heat.positions[part], heat.values[part]) for part in (shown, ~shown))
    return image, text


def peak_of(heat: Heat) -> float:
    """The greatest heat; 0 where no token is."""
    return float(heat.values.max(initial=0.0))


def pictures_with_heat(
    store: Store, stream: Stream, examples: Sequence[Example], side: int, look: Look = PLAIN
) -> list[tuple[Image.Image, Image.Image]]:
    """Each example's picture, its longer side scaled to `side` pixels, and the same with the heat over it, all on one scale."""
    scale = scales_of(store, stream, (example.heat for example in examples), look).picture
    pairs = []
    for example in examples:
        picture = fitted(picture_of(store, example.heat.image), side)
        pairs.append((picture, heated(store, stream, picture, example.heat, scale, look)))
    return pairs


def picture_of(store: Store, image: int) -> Image.Image:
    """The picture of an image; `UsageError` where the store keeps none."""
    picture = store.picture(image)
    if picture is None:
        raise UsageError(f"the store holds no picture of image {image}: harvest with --pictures webp")
    return picture


def heated(
    store: Store, stream: Stream, picture: Image.Image, heat: Heat, scale: float, look: Look = PLAIN
) -> Image.Image:
    """The picture, of any size, with the heat of its image tokens over it."""
    first = store.meta.text_tokens if stream == "joint" else 0  # the joint stream starts with the text
    shown, _ = strata_of(store, stream, heat)
    grid = token_grid(shown.values, shown.positions - first, store.meta.grid)
    return overlay(picture, grid, scale, smooth=not look.patches)
