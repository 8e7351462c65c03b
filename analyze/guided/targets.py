"""`python -m analyze targets`: what `graph` is to explain, so that it finds the circuit of each value of an attribute.

A CSV with the columns image,step,site,token,feature (then attribute,value,prompt): for every value, in traced pictures that show
nothing else, the image-stream feature of the last blocks that tells it best at that step, at its most active token.  Pictures of
the half on which the truth table chose its features are taken first, so that most of the others are left for judging what steering
does: `guided` judges none whose trace explained a circuit.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from analyze.guided.arms import best_of_truth, transcoders
from analyze.inputs import Analysis, open_analysis
from analyze.prompts import prompt_texts
from analyze.settings import Inputs
from analyze.truth.attributes import VALUES, Attribute, Scene, read_scenes
from analyze.truth.judges import Judges, choose_judges
from analyze.truth.settings import TruthSettings
from store import Store, open_store
from store.errors import ForeignError, MismatchError, UsageError
from store.files import read_json, write_bytes
from store.sites import Site
from store.sizes import many
from store.traces import Traced

COLUMNS = ("image", "step", "site", "token", "feature", "attribute", "value", "prompt")


@dataclass(frozen=True, kw_only=True)
class TargetsSettings:
    """Write the targets whose graphs show the circuit of each colour (shape, …), from the truth table; then: graph --targets."""

    traces: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store with the traces, harvested from the same prompts and seeds as the analysed store, or that store itself."""
    store: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store that --analysis was made of."""
    dictionaries: Path
    """Folder of the dictionaries that were analysed."""
    analysis: Path
    """Folder with the truth table: what `analyze all` or `analyze truth` wrote."""
    out: Path
    """The CSV file to write."""
    attribute: str = "colour"
    """Attribute whose values get targets: colour, shape, position or background."""
    values: str = "all"
    """Which of its values, such as red,green; `all`: every one."""
    each: int = 4
    """How many pictures of each value, at most."""
    last: int = 2
    """Targets are features of the image stream in so many last blocks that have transcoders."""

    def __post_init__(self) -> None:
        if self.attribute not in VALUES:
            raise UsageError(f"--attribute {self.attribute!r} is not one of {', '.join(VALUES)}")
        chosen_values(self.attribute, self.values)
        for flag in ("each", "last"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag} is {getattr(self, flag)}: give at least 1")


def chosen_values(attribute: str, text: str) -> tuple[str, ...]:
    """The values that `red,green` names, or all; `UsageError` for one that the attribute has not."""
    there = VALUES[attribute]  # type: ignore[index]
    if text.strip() == "all":
        return there
    wanted = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    unknown = [word for word in wanted if word not in there]
    if unknown:
        raise UsageError(f"--values: there is no {attribute} {unknown[0]!r}; there are {', '.join(there)}")
    return wanted


def run(settings: TargetsSettings) -> list[dict[str, object]]:
    """The rows of the CSV, which is also written.

    `UsageError` where no traced picture shows a value alone, `MismatchError` for traces of other pictures.
    """
    analysis = open_analysis(Inputs(store=settings.store, dictionaries=settings.dictionaries, out=settings.analysis))
    judges, traced = judges_of(analysis), open_store(settings.traces)
    steps = traced_of(traced).steps
    check_same_pictures(traced, analysis.store)
    asked = chosen_values(settings.attribute, settings.values)
    pictures = {
        value: _pictures(judges, traced, Attribute(settings.attribute, value), settings.each) for value in asked
    }
    sites = last_sites(analysis, settings.last)
    prompts = prompt_texts(traced)
    rows: list[dict[str, object]] = []
    for value, images in pictures.items():
        for step in steps:
            site, feature = best_of_truth(analysis, settings.attribute, value, sites, step)
            rows += [
                dict(
                    zip(
                        COLUMNS,
                        (image, step, site, "max", feature, settings.attribute, value, prompts[image]),
                        strict=True,
                    )
                )
                for image in images
            ]
    write_bytes(settings.out, _csv(rows))
    graphs = f"{many(len(rows), 'target')}: {many(len(asked), 'value')} of {settings.attribute}"
    print(f"targets: {graphs} at steps {', '.join(map(str, steps))} -> {settings.out}")
    return rows


def judges_of(analysis: Analysis) -> Judges:
    """The pictures and halves of the analysis's truth table; `UsageError` where it has none."""
    chosen = truth_settings(analysis)
    return choose_judges(analysis, TruthSettings(store="", dictionaries=Path(), out=analysis.out, **chosen))


def truth_settings(analysis: Analysis) -> dict[str, Any]:
    """What decided the halves of the analysis's truth table; `UsageError` where it has none, `ForeignError` for one that is no table."""
    path = analysis.out / "truth.json"
    if not path.is_file():
        raise UsageError(
            f"{analysis.out} has no truth table: run python -m analyze truth with the same store and dictionaries"
        )
    try:
        said = read_json(path)["settings"]
        return {name: said[name] for name in ("images", "any_picture", "seed")}
    except (KeyError, TypeError) as error:
        raise ForeignError(f"{path} is not of a truth table ({error!r}): run python -m analyze truth again") from None


def traced_of(store: Store) -> Traced:
    """What a store has traces of; `UsageError` where it has none."""
    traced = store.meta.traced
    if traced is None:
        raise UsageError(f"{store.path} has no traces: harvest with --trace --trace-images … --trace-steps …")
    return traced


def check_same_pictures(traced: Store, store: Store) -> None:
    """`MismatchError` unless the pictures of the traced store are the first of the other: same prompts, same seeds."""
    if traced.id == store.id:
        return
    count = min(traced.n_images, store.n_images)
    for name, here, there in (
        ("prompt", prompt_texts(traced), prompt_texts(store)),
        ("seed", traced.prompts()["seed"].to_pylist(), store.prompts()["seed"].to_pylist()),
    ):
        for image in range(count):
            if here[image] != there[image]:
                raise MismatchError(
                    f"image {image} of {traced.path} has {name} {here[image]!r}, that of {store.path} {there[image]!r}: harvest the "
                    "traces from the same prompts and seeds, or give the analysed store as --traces"
                )


def last_sites(analysis: Analysis, last: int) -> list[Site]:
    """The image sites of the last blocks that have transcoders."""
    sites = image_sites(analysis)
    if not sites:
        raise UsageError("there is no transcoder of the image stream: train one, or give another --dictionaries")
    return sites[-last:]


def image_sites(analysis: Analysis) -> list[Site]:
    """The image sites that have transcoders, by block."""
    return sorted(site for site in transcoders(analysis) if site.stream == "img")


def alone(scene: Scene, attribute: Attribute) -> bool:
    """Whether everything in a scene that could have the value has it."""
    if attribute.group == "background":
        return scene.background == attribute.value
    return all(getattr(thing, attribute.group) == attribute.value for thing in scene.things)


def _pictures(judges: Judges, traced: Store, attribute: Attribute, each: int) -> list[int]:
    """Traced pictures that show the value and no other: of the choosing half before the other, of one object before two."""
    half = dict(zip(judges.images.tolist(), judges.halves.score.tolist(), strict=True))
    of_traces = set(traced_of(traced).images)
    there = [scene for scene in read_scenes(traced) if scene.image in of_traces & set(half) and alone(scene, attribute)]
    if not there:
        raise UsageError(
            f"no traced picture of {traced.path} shows {attribute} and no other {attribute.group}: trace more images, or leave this "
            "value out with --values"
        )
    ranked = sorted(there, key=lambda scene: (half[scene.image], len(scene.things), scene.image))
    return sorted(scene.image for scene in ranked[:each])


def _csv(rows: list[dict[str, object]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
