"""What cannot be is refused from outlines alone, before a model or a weight is read; and peaks come from the right analysis."""

import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from analyze.inputs import Analysis, open_analysis
from analyze.settings import Inputs
from analyze.steering.interventions import FeatureEdit, Intervention, StreamOff, TokenChoice, by_key, check, needed
from analyze.steering.peaks import read_peaks
from store import Site
from store.errors import MismatchError, UsageError
from train import DictionaryConfig
from train.dictionaries.dictionary import Dictionary, build

IMG_3, TXT_2, IMG_1, TXT_0 = (Site.parse(name) for name in ("img_3", "txt_2", "img_1", "txt_0"))
BLOCKS, TOKENS, STEPS, GRID = 6, {"txt": 16, "img": 24}, 4, (4, 6)


def outline(kind: Any, site: Site, d_model: int = 8) -> Dictionary:
    return build(DictionaryConfig(kind=kind, site=site, d_model=d_model, n_features=32), empty=True)


OUTLINES = by_key(
    [outline("transcoder", IMG_3), outline("transcoder", TXT_2), outline("sae", TXT_2), outline("sae", IMG_1)]
)


Made = TypeVar("Made")


def with_fields(made: Made, fields: dict[str, Any]) -> Made:
    """The same with other fields, judged as a script meets it: types are checked only while tests run."""
    new: Any = copy(made)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    new.__post_init__()
    return new  # type: ignore[no-any-return]


def checked(*edits: FeatureEdit, outlines: Any = OUTLINES, **options: Any) -> None:
    fields = {name: options.pop(name) for name in ("off", "method", "splice") if name in options}
    check(Intervention("case", edits, **fields), outlines, BLOCKS, TOKENS, STEPS, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": ()}, r"img_3: an edit of no feature \(an empty supernode\?\)"),
        ({"features": (3, -1)}, "must be 0 or more, each once"),
        ({"features": (3, 3)}, "must be 0 or more, each once"),
        ({"mode": "remove"}, "mode 'remove' is not one of zero, amplify, invert, set, add"),
        ({"kind": "probe"}, "kind 'probe' is not one of transcoder, sae"),
        ({"mode": "set", "unit": "sigma"}, "unit 'sigma' is not one of absolute, peak"),
        ({"mode": "amplify", "strength": float("nan")}, "the strength nan is no finite number"),
        ({"mode": "set", "strength": float("inf")}, "the strength inf is no finite number"),
        ({"strength": 2.0}, "zero takes no strength; amplify:2 would scale"),
        ({"mode": "amplify", "unit": "peak"}, "only set and add count in peaks; the strength of amplify is a factor"),
        ({"mode": "set", "normalised": True}, "only add has normalised columns"),
        ({"steps": ()}, r"steps \[\]; name steps such as 2-3"),
        ({"steps": (-1,)}, r"steps \[-1\]"),
        ({"site": Site.parse("joint_0")}, "joint_0: single-stream blocks cannot be changed yet"),
    ],
)
def test_an_edit_that_means_nothing_cannot_be_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_fields(FeatureEdit(IMG_3, (3,), "zero"), fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream": "joint"}, "stream 'joint' cannot be switched off: there are img and txt"),
        ({"layers": ()}, r"img off at layers \[\]"),
        ({"layers": (-1,)}, r"img off at layers \[-1\]"),
        ({"parts": ()}, r"parts \[\]; there are mlp and attn"),
        ({"parts": ("gate",)}, r"parts \['gate'\]; there are mlp and attn"),
        ({"steps": ()}, r"img off: steps \[\]"),
    ],
)
def test_a_stream_that_cannot_be_off_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_fields(StreamOff("img", (0,)), fields)


def test_an_intervention_has_a_name_a_method_and_sites() -> None:
    with pytest.raises(UsageError, match="an intervention needs a name"):
        Intervention(" ")
    with pytest.raises(UsageError, match="method 'ablation' is not one of difference, replacement"):
        with_fields(Intervention("x"), {"method": "ablation"})
    with pytest.raises(UsageError, match="joint_1: single-stream"):
        Intervention("x", splice=(Site.parse("joint_1"),))


def edit(site: Site = IMG_3, features: tuple[int, ...] = (3,), mode: Any = "zero", **fields: Any) -> FeatureEdit:
    return FeatureEdit(site, features, mode, **fields)


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        (
            (edit(Site.parse("img_9")),),
            {},
            "case: zero img_9:3: there is no block 9; the model has double blocks 0 to 5",
        ),
        (
            (edit(Site.parse("img_0")),),
            {},
            "no dictionary of img_0; there are sae_img_1, sae_txt_2, transcoder_txt_2, transcoder_img_3",
        ),
        ((edit(kind="sae"),), {}, "there is no sae of img_3; there are"),
        ((edit(TXT_2),), {}, "txt_2 has a transcoder and an SAE: say which is meant"),
        ((edit(features=(31, 32, 99)),), {}, "transcoder_img_3 has no feature 32, 99; it has 32, 0 to 31"),
        ((edit(steps=(1, 4)),), {}, "zero img_3:3: there is no step 4; pictures are drawn in steps 0 to 3"),
        (
            (
                edit(
                    tokens=TokenChoice(positions=(23, 24)),
                ),
            ),
            {},
            "img has no token 24; it has 24, 0 to 23",
        ),
        (
            (edit(TXT_2, kind="sae", tokens=TokenChoice(positions=(16,))),),
            {},
            "txt has no token 16; it has 16, 0 to 15",
        ),
        (
            (edit(TXT_2, kind="sae", tokens=TokenChoice(mask=Path("m.png"))),),
            {"grid": GRID},
            "a mask lies over the picture; choose txt tokens by their positions",
        ),
        (
            (
                edit(
                    tokens=TokenChoice(mask=((True,),)),
                ),
            ),
            {},
            "a mask needs the grid of image tokens",
        ),
        (
            (
                edit(
                    tokens=TokenChoice(mask=Path("absent.png")),
                ),
            ),
            {"grid": GRID},
            r"there is no mask absent\.png",
        ),
        ((edit(mode="set", unit="peak"),), {}, "no analysis says what they are: give --analysis OUT"),
        (
            (edit(mode="add", unit="peak"),),
            {"peaks": {(IMG_3, "transcoder"): np.zeros(32, np.float32)}},
            "feature 3 was never active in the analysis, so it has no peak",
        ),
        ((), {"off": (StreamOff("txt", (5, 6, 7)),)}, "case: txt 5-7 off: there is no block 6-7"),
        ((), {"off": (StreamOff("txt", (5,), steps=(0, 9)),)}, "case: txt 5 off: there is no step 9"),
        ((), {"splice": (Site.parse("img_7"),)}, "splice img_7: there is no block 7"),
        ((), {"splice": (Site.parse("img_2"),)}, "there is no dictionary of img_2"),
        ((), {"splice": (TXT_2,)}, "txt_2 has a transcoder and an SAE: splice transcoder_txt_2 or sae_txt_2"),
        ((), {"splice": ((IMG_1, "transcoder"),)}, "there is no transcoder of img_1"),
        (
            (edit(TXT_2, kind="transcoder"),),
            {"splice": ((TXT_2, "sae"),), "method": "replacement"},
            "both the transcoder and the SAE of txt_2 would stand for its MLP",
        ),
        (
            (edit(TXT_2, kind="sae"), edit(TXT_2, kind="transcoder")),
            {"method": "replacement"},
            "both the transcoder and the SAE of txt_2 would stand for its MLP",
        ),
        (
            (edit(TXT_2, kind="sae"), edit(TXT_2, kind="transcoder")),
            {"splice": (TXT_2,)},
            "both the transcoder and the SAE of txt_2 would stand for its MLP",
        ),
        (
            (edit(steps=(1, 2)),),
            {"off": (StreamOff("img", (3,), steps=(0, 1)), StreamOff("img", (2, 3), steps=(2,)))},
            "the img stream is off there at all its steps: it would do nothing",
        ),
        ((edit(),), {"off": (StreamOff("img", (3,)),)}, "the img stream is off there at all its steps"),
    ],
)
def test_what_the_model_or_its_dictionaries_have_not_is_refused(edits: Any, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(*edits, **options)


def test_a_name_that_says_the_edit_is_not_said_twice() -> None:
    for name, said in (("zero img_9:2", "zero img_9:2: there is no block 9"), ("red", "red: zero img_9:2: there is")):
        with pytest.raises(UsageError, match=f"^{said}"):
            check(
                Intervention(name, (FeatureEdit(Site.parse("img_9"), (2,), "zero"),)), OUTLINES, BLOCKS, TOKENS, STEPS
            )


def test_a_splice_names_the_kind_where_a_site_has_both_and_the_other_one_can_be_edited() -> None:
    for kind, other in (("sae", "transcoder"), ("transcoder", "sae")):
        splice = {"splice": ((TXT_2, kind),)}
        checked(**splice)
        checked(edit(TXT_2, kind=other), **splice)
        assert needed([Intervention("x", **splice)], OUTLINES) == ((TXT_2, kind),)
    with pytest.raises(UsageError, match="txt_2 is spliced twice"):
        Intervention("x", splice=((TXT_2, "sae"), TXT_2))


def test_a_dictionary_of_another_width_is_of_another_model() -> None:
    checked(edit(), d_model=8)
    with pytest.raises(
        MismatchError, match="transcoder_img_3 has d_model 8, the model has 128: it was trained on another"
    ):
        checked(edit(), d_model=128)


def test_what_can_be_passes(tmp_path: Path) -> None:
    Image.new("L", (9, 9), 255).save(tmp_path / "mask.png")
    checked(
        edit(features=(0, 31), steps=(0, 3), tokens=TokenChoice(mask=tmp_path / "mask.png")),
        edit(TXT_2, kind="sae", tokens=TokenChoice(positions=(0, 15))),
        edit(TXT_2, kind="transcoder", mode="add", strength=-2.0, normalised=True, tokens=TokenChoice(above=0.2)),
        edit(IMG_1, mode="set", strength=1.5, unit="peak"),
        off=(StreamOff("img", (1, 5), steps=(0,)), StreamOff("txt", (2,), parts=("attn",))),
        splice=(IMG_1,),
        grid=GRID,
        peaks={(IMG_1, "sae"): np.ones(32, np.float32)},
    )
    checked()


# --- peaks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis(scored_small: tuple[Path, dict[str, bytes]]) -> Analysis:
    folder, _ = scored_small
    return open_analysis(Inputs(store=folder / "s", dictionaries=folder / "d", out=folder / "alone"))


def test_a_peak_is_the_greatest_score_over_images_and_steps(analysis: Analysis) -> None:
    found = read_peaks(analysis.out, analysis.subjects)
    assert set(found) == {(TXT_0, "transcoder"), (TXT_0, "sae")}
    for subject in analysis.subjects:
        expected = np.max([analysis.matrix(subject, step).scores().max(axis=0) for step in analysis.steps], axis=0)
        assert np.array_equal(found[subject.site, subject.outline.config.kind], expected)
        assert expected.max() > 0


def test_peaks_of_several_steps_are_their_greatest(analysis: Analysis, tmp_path: Path) -> None:
    """A second step is made of the first, its maxima doubled for even features and halved for odd ones."""
    shutil.copytree(analysis.out, tmp_path / "out")
    subject = analysis.subjects[0]
    first = tmp_path / "out" / subject.name / "step.0"
    shutil.copytree(first, first.with_name("step.1"))
    table = pq.read_table(first / "features.parquet")
    peaks = table["max"].to_numpy()
    factor = np.where(np.arange(len(peaks)) % 2 == 0, 2, 0.5).astype(np.float32)
    column = table.column_names.index("max")
    pq.write_table(table.set_column(column, "max", [peaks * factor]), first.with_name("step.1") / "features.parquet")
    found = read_peaks(tmp_path / "out", [subject])
    assert np.array_equal(found[subject.site, subject.outline.config.kind], peaks * np.maximum(factor, 1))


def test_peaks_of_nothing_and_of_other_dictionaries_are_refused(analysis: Analysis, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no analysis: give the --out of python -m analyze scores"):
        read_peaks(tmp_path, analysis.subjects)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="has scores of none of these dictionaries"):
        read_peaks(tmp_path, analysis.subjects)
    with pytest.raises(MismatchError, match="holds scores of another dictionary than"):
        read_peaks(analysis.out, [replace(analysis.subjects[0], identity="other")])
