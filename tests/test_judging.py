"""The judge of interventions: what changed and what was kept, told from pictures whose truth is known."""

import math

import numpy as np
import pytest
from PIL import Image

from analyze.steering.judging import Rate, check_asked, paired, rates, readings, told, verdicts
from harvest.tiny_flux.judge import Reading, read
from harvest.tiny_flux.scenes import Object, Scene, render
from store.errors import UsageError

RED = Scene("black", (Object("circle", "red", "large", "left"),))
PAIR = Scene("black", (Object("circle", "red", position=None), Object("square", "green", position=None)), "left of")


def seen(scene: Scene) -> Reading:
    return read(render(scene)[0])


def scene(
    shape: str = "circle", colour: str = "red", size: str = "large", position: str = "left", background: str = "black"
) -> Scene:
    return Scene(background, (Object(shape, colour, size, position),))


def only(changed: Scene, plain: Scene = RED, attribute: str = "colour", value: str | None = "red") -> dict[str, object]:
    row: dict[str, object]
    (row,) = verdicts([seen(plain)], [seen(changed)], attribute, value).to_pylist()
    return row


def test_another_colour_of_the_same_thing_is_a_change_that_keeps_the_rest() -> None:
    row = only(scene(colour="green"))
    assert row["changed"] is True and row["lost"] is False
    assert all(row[f"kept_{name}"] for name in ("shape", "position", "size", "background", "count"))
    assert row["plain_colour"] == ["red"] and row["read_colour"] == ["green"]


@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        (scene(shape="ring", colour="green"), "kept_shape"),
        (scene(position="right", colour="green"), "kept_position"),
        (scene(size="small", colour="green"), "kept_size"),
        (scene(background="white", colour="green"), "kept_background"),
    ],
)
def test_each_other_attribute_is_told_apart(changed: Scene, broken: str) -> None:
    row = only(changed)
    assert row["changed"] is True
    assert [name for name in row if name.startswith("kept_") and not row[name]] == [broken]


def test_the_same_picture_is_no_change() -> None:
    row = only(RED)
    assert row["changed"] is False and all(value for name, value in row.items() if name.startswith("kept_"))


def test_a_lost_object_counts_as_neither_changed_nor_kept() -> None:
    nothing = read(np.full((64, 64, 3), 24, np.uint8))
    (row,) = verdicts([seen(RED)], [nothing], "colour", "red").to_pylist()
    assert row["lost"] is True and row["changed"] is False
    assert not any(row[f"kept_{name}"] for name in ("shape", "position", "size", "colour", "count"))
    assert row["kept_background"] is True
    assert list(told(verdicts([seen(RED)], [nothing], "colour", "red"))) == ["1 objects -> 0"]


def test_of_two_objects_only_the_one_asked_about_must_change_and_the_other_keep_its_colour() -> None:
    turned = Scene("black", (Object("circle", "yellow", position=None), PAIR.objects[1]), "left of")
    spoilt = Scene(
        "black", (Object("circle", "yellow", position=None), Object("square", "blue", position=None)), "left of"
    )
    other = Scene("black", (PAIR.objects[0], Object("square", "blue", position=None)), "left of")
    assert (only(turned, PAIR)["changed"], only(turned, PAIR)["kept_colour"]) == (True, True)
    assert (only(spoilt, PAIR)["changed"], only(spoilt, PAIR)["kept_colour"]) == (True, False)
    assert (only(other, PAIR)["changed"], only(other, PAIR)["kept_colour"]) == (False, False)


def test_objects_are_paired_by_where_they_lie_whatever_the_order_of_the_judge() -> None:
    before = seen(PAIR)
    after = Reading(before.background, tuple(reversed(before.objects)))
    found = paired(before, after)
    assert found is not None and all(one is two for one, two in found)


def test_a_picture_that_does_not_show_the_value_is_not_counted() -> None:
    found = verdicts([seen(RED), seen(scene(colour="blue"))], [seen(scene(colour="green"))] * 2, "colour", "red")
    assert found["asked"].to_pylist() == [True, False] and found["changed"].to_pylist() == [True, None]
    assert rates(found)["changed"] == Rate(1, 1) and rates(found)["kept_shape"] == Rate(1, 1)


def test_without_an_attribute_nothing_is_asked_to_change() -> None:
    found = verdicts([seen(RED)], [seen(scene(colour="green"))])
    assert found["changed"].to_pylist() == [None] and found["kept_colour"].to_pylist() == [False]
    assert rates(found)["changed"].n == 0


def test_the_background_can_be_what_changes() -> None:
    assert only(scene(background="white"), attribute="background", value="black")["changed"] is True
    assert only(RED, attribute="background", value="black")["changed"] is False


def test_a_rate_has_the_interval_of_wilson() -> None:
    low, high = Rate(30, 40).interval
    assert (round(low, 3), round(high, 3)) == (0.598, 0.858)  # statsmodels, proportion_confint(30, 40, method="wilson")
    assert Rate(0, 0).interval == (0.0, 1.0) and math.isnan(Rate(0, 0).share) and str(Rate(0, 0)) == "-"
    assert str(Rate(3, 4)) == "75 %"


def test_pictures_of_another_model_are_refused() -> None:
    with pytest.raises(UsageError, match="64x64 pixels, this one has 512x256"):
        readings([Image.new("RGB", (512, 256))])
    assert readings([Image.fromarray(render(RED)[0])])[0].objects[0].colour == "red"


def test_unknown_attributes_and_values_are_refused() -> None:
    with pytest.raises(UsageError, match="the judge reads no 'mood'; it reads background, shape, colour"):
        check_asked("mood", [])
    with pytest.raises(UsageError, match="there is no colour 'crimson'; there are red, yellow"):
        check_asked("colour", ["red", "crimson"])
    with pytest.raises(UsageError, match="1 plain pictures and 2 changed ones"):
        verdicts([seen(RED)], [seen(RED)] * 2)
