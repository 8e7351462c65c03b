"""Experiment files: what they may say, how it is read, and that what is written reads back as it was."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from analyze.steering.documents import document_bytes, read_document
from analyze.steering.edits import FeatureEdit, StreamOff
from analyze.steering.experiment import variants_of
from analyze.steering.resolving import Resolved, resolve
from analyze.steering.settings import SteerSettings
from analyze.steering.token_choice import TokenChoice
from analyze.steering.wording import edits_in, members_text, off_in, supernode_in
from store import Site, open_store
from store.errors import UsageError
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
words = st.one_of(
    texts, st.sampled_from(["off", "no", "1e-5", "012", "1:30", "~", "", "0x1F", "- a", "null", "true", "1_0", "="])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)


def resolved(folder: Path, text: str, traced_flux: Path, **flags: Any) -> Resolved:
    """What an experiment file on the small store says."""
    folder.mkdir(exist_ok=True)
    (folder / "e.yaml").write_text(text)
    given: dict[str, Any] = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries", **flags}
    return resolve(SteerSettings(experiment=folder / "e.yaml", out=folder / "out", **given))


@settings(max_examples=40)
@given(st.dictionaries(words, values, max_size=4))
def test_what_is_written_as_yaml_reads_back_equal_and_writes_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "document.yaml"
    data = document_bytes(document)
    path.write_bytes(data)
    assert read_document(path) == document
    assert document_bytes(read_document(path)) == data


def test_yaml_is_read_by_the_types_of_json_so_off_is_a_word_and_1e_5_a_number(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("off: [txt 0-1]\nstrengths: [1e-5, 2, -.5]\nseeds: 0-3\nname: no\nprompts: [1:30, '7']\nclip: ~\n")
    assert read_document(path) == {
        "off": ["txt 0-1"], "strengths": [1e-5, 2, -0.5], "seeds": "0-3", "name": "no", "prompts": ["1:30", "7"], "clip": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("edits: [a]\nedits: [b]\n", "line 2: 'edits' stands there twice"),
        ("edits: &here [a]\noff: *here\n", "anchors"),
        ("edits: !!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("- zero img_0:1\n", "holds a list"),
        ("", "is empty"),
        ("edits: [zero\n", "cannot be read"),
        ("[" * 1200, "nested too deeply"),
        ("edits: a\n---\nedits: b\n", "cannot be read"),
    ],
)
def test_a_file_that_is_no_mapping_of_plain_data_is_refused_by_its_name_and_line(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as error:
        read_document(path)
    assert str(path) in str(error.value)


def test_json_says_the_same_as_yaml_and_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("images: 0-1\nedits: [zero img_0:3]\nstrengths: [0, 2.5]\n")
    (tmp_path / "e.json").write_text('{"images": "0-1", "edits": ["zero img_0:3"], "strengths": [0, 2.5]}')
    assert read_document(tmp_path / "e.yaml") == read_document(tmp_path / "e.json")
    (tmp_path / "e.json").write_text('{"images": "0-1", "images": "0-2"}')
    with pytest.raises(UsageError, match="'images' stands there twice"):
        read_document(tmp_path / "e.json")
    (tmp_path / "e.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no UTF-8"):
        read_document(tmp_path / "e.yaml")


def test_the_text_of_an_edit_means_mode_strength_features_steps_and_tokens() -> None:
    _, red = supernode_in("red=txt_2:5+img_3:66,70-71+img_3:66")
    assert members_text(red) == "img_3:66,70,71+txt_2:5" or members_text(red) == "txt_2:5+img_3:66,70,71"
    found = edits_in("amplify:4 red @steps=2-3 @tokens=above:0.5 @kind=sae", {"red": red})
    img, txt = Site.parse("img_3"), Site.parse("txt_2")
    expected = {
        FeatureEdit(img, (66, 70, 71), "amplify", 4.0, (2, 3), TokenChoice(above=0.5), "sae"),
        FeatureEdit(txt, (5,), "amplify", 4.0, (2, 3), TokenChoice(above=0.5), "sae"),
    }
    assert set(found) == expected
    (added,) = edits_in("add:-0.5 img_3:1 @unit=peak @normalised", {})
    assert added == FeatureEdit(img, (1,), "add", -0.5, unit="peak", normalised=True)
    assert edits_in("zero img_3:1 @tokens=3,7-9", {})[0].tokens == TokenChoice(positions=(3, 7, 8, 9))
    assert off_in("txt 0-1 @steps=0 @parts=mlp,attn", 5) == StreamOff("txt", (0, 1), (0,), ("mlp", "attn"))
    assert off_in("img all", 5) == StreamOff("img", (0, 1, 2, 3, 4))


def test_a_sweep_gives_every_edit_that_has_a_strength_each_of_them_and_zero_stays(traced_flux: Path) -> None:
    document = {"edits": ["amplify:9 img_0:1", "zero txt_0:2"], "strengths": "0,1e1,-2"}
    found = variants_of(document, {}, 3, "e")
    assert [(v.name, v.strength) for v in found] == [("strength 0", 0.0), ("strength 10", 10.0), ("strength -2", -2.0)]
    assert [[edit.strength for edit in v.intervention.edits] for v in found] == [[0.0, 1.0], [10.0, 1.0], [-2.0, 1.0]]
    several = variants_of(
        {"variants": ["set:1 img_0:1", {"name": "both", "edits": "add img_1:2"}], "strengths": [1, 3]}, {}, 3, "e"
    )
    assert [v.name for v in several] == [
        "set:1 img_0:1, strength 1", "set:1 img_0:1, strength 3", "both, strength 1", "both, strength 3"
    ]  # fmt: skip


def test_a_resolved_experiment_reads_back_as_itself_without_store_or_masks(tmp_path: Path, traced_flux: Path) -> None:
    mask = np.zeros((4, 4), np.uint8)
    mask[0, 0] = 255  # the first quarter of the sides: 2 x 2 of 8 x 8 tokens
    Image.fromarray(mask).save(tmp_path / "mask.png")
    text = (
        "images: 0-1\nseeds: [7, 0]\nsupernodes: {some: [img_0:3, 'txt_1:4']}\nmethod: replacement\nname: Ünï\n"
        "variants:\n- {name: one, edits: [amplify:2 some @steps=1], off: [txt all @steps=0], splice: [img_2]}\n"
        "- {name: two, method: difference, edits: [{mode: set, target: 'img_0:3', strength: 1e-1, tokens: 'mask:mask.png'}]}\n"
        "drawing: {num_inference_steps: 2, height: 32, batch_size: 3}\njudge: none\n"
    )
    first = resolved(tmp_path, text, traced_flux).experiment
    one, two = (variant.intervention for variant in first.variants)
    assert (one.method, two.method, one.splice) == ("replacement", "difference", (Site.parse("img_2"),))
    assert two.edits[0].tokens.positions == (0, 1)  # a quarter of 32 pixels is one row of tokens
    assert {edit.kind for edit in (*one.edits, *two.edits)} == {"transcoder"}
    assert (first.canvas.grid, first.canvas.num_inference_steps, first.batch_size) == ((4, 8), 2, 3)
    prompts = open_store(traced_flux / "store").prompts()["prompt"].to_pylist()
    assert [(shot.prompt, shot.seed, shot.image) for shot in first.shots] == [
        (prompts[0], 7, None), (prompts[0], 0, 0), (prompts[1], 7, None), (prompts[1], 0, None)
    ]  # fmt: skip

    data = document_bytes(first.document())
    again = resolved(tmp_path / "elsewhere", data.decode(), traced_flux, store=None).experiment
    assert document_bytes(again.document()) == data
    assert (again.shots, again.variants, again.identities) == (first.shots, first.variants, first.identities)


def test_a_recipe_without_shots_takes_them_from_the_flags(tmp_path: Path, traced_flux: Path) -> None:
    found = resolved(tmp_path, "edits: zero img_0:3\n", traced_flux, prompt=("a red ring",), seeds="4-5").experiment
    assert [(shot.prompt, shot.seed) for shot in found.shots] == [("a red ring", 4), ("a red ring", 5)]
    assert found.name == found.variants[0].name == "zero img_0:3"
    with pytest.raises(UsageError, match="says what is drawn: leave out --images"):
        resolved(tmp_path, "images: 1\nedits: zero img_0:3\n", traced_flux, images="0")


def test_prompts_come_from_a_file_beside_the_experiment_with_the_seeds_that_it_gives(
    tmp_path: Path, traced_flux: Path
) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed\na red ring,9\na blue ring,3\n")
    text = "prompts: p.csv\nedits: zero img_0:3\n"
    assert [shot.seed for shot in resolved(tmp_path, text, traced_flux).experiment.shots] == [9, 3]
    both = resolved(tmp_path, text + "seeds: 0-1\n", traced_flux).experiment
    assert [(shot.prompt, shot.seed) for shot in both.shots] == [
        ("a red ring", 0), ("a red ring", 1), ("a blue ring", 0), ("a blue ring", 1)
    ]  # fmt: skip


def test_a_variants_strength_is_that_of_its_edits_and_says_no_other(tmp_path: Path, traced_flux: Path) -> None:
    def strengths(edits: str) -> list[float]:
        text = f"images: 0\nvariants:\n- {{name: one, strength: 3, edits: [{edits}]}}\n"
        (variant,) = resolved(tmp_path, text, traced_flux).experiment.variants
        assert variant.strength == 3
        return [edit.strength for edit in variant.intervention.edits]

    assert strengths("amplify img_0:1, zero txt_0:2") == [3, 1]
    assert strengths("'amplify:3 img_0:1'") == [3]
    for edits, said in (
        ("'amplify:4 img_0:1'", "variant 'one' has strength 3, and its edit is amplify:4 img_0:1"),
        ("'amplify:3 img_0:1', add img_0:2", "its edit is add:1 img_0:2"),
        ("zero img_0:1", "has no edit with a strength"),
    ):
        with pytest.raises(UsageError, match=said):
            strengths(edits)


def test_a_strength_that_changes_nothing_is_refused_but_as_the_control_of_a_sweep(
    tmp_path: Path, traced_flux: Path
) -> None:
    for edit in ("amplify img_0:1", "'invert:-1 img_0:1'", "'add:0 img_0:1 @normalised'"):
        with pytest.raises(
            UsageError, match="changes nothing, its strength leaves everything as it is: write amplify:4"
        ):
            resolved(tmp_path, f"images: 0\nedits: [{edit}]\n", traced_flux)
    for more in ("off: [txt 2]", "splice: img_2", "method: replacement", "strengths: [1, 2]"):
        resolved(tmp_path, f"images: 0\nedits: [amplify img_0:1]\n{more}\n", traced_flux)
    resolved(tmp_path, "images: 0\nedits: [amplify img_0:1, zero img_0:2]\n", traced_flux)
    control = resolved(tmp_path, "images: 0\nedits: [amplify img_0:1]\nstrengths: [1]\n", traced_flux).experiment
    (variant,) = control.variants
    saved = replace(control, variants=(replace(variant, strength=None),))  # as the app saves what its sliders say
    resolved(tmp_path, document_bytes(saved.document()).decode(), traced_flux)


def test_a_splice_names_the_dictionary_where_a_site_has_both_kinds_and_reads_back(
    tmp_path: Path, traced_flux: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(traced_flux / "dictionaries" / "transcoder_img_1", both / "transcoder_img_1")
    save_dictionary(both / "sae_img_1", transcoder("img_1", kind="sae"), None, [])
    text = "images: 0\nsplice: {}\n"
    for kind in ("sae", "transcoder"):
        found = resolved(tmp_path, text.format(f"{kind}_img_1"), traced_flux, dictionaries=both).experiment
        assert list(found.identities) == [(Site.parse("img_1"), kind)]
        assert found.document()["variants"][0]["splice"] == [f"{kind}_img_1"]
        data = document_bytes(found.document())
        again = resolved(tmp_path, data.decode(), traced_flux, dictionaries=both, store=None).experiment
        assert document_bytes(again.document()) == data
    with pytest.raises(UsageError, match="img_1 has a transcoder and an SAE: splice transcoder_img_1 or sae_img_1"):
        resolved(tmp_path, text.format("img_1"), traced_flux, dictionaries=both)
    edited = "images: 0\nedits: [zero img_1:2 @kind=sae]\nsplice: img_1\n"
    (variant,) = resolved(tmp_path, edited, traced_flux, dictionaries=both).experiment.variants
    assert variant.intervention.splice == ((Site.parse("img_1"), "sae"),)


def test_weights_that_were_read_for_their_hash_are_not_read_or_held_again(
    tmp_path: Path, traced_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = resolved(tmp_path, "images: 0\nedits: zero img_1:2\n", traced_flux).shelf
    key = (Site.parse("img_1"), "transcoder")
    first = shelf[key]
    monkeypatch.setattr("analyze.steering.shelf.loaded", lambda _: pytest.fail("read again"))
    moved = shelf.on(torch.device("cpu"))
    assert moved[key] is first and not shelf._held
    assert shelf.identity(key) == moved.identity(key)
