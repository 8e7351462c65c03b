"""Bad input to `analyze graph`: whatever cannot be explained ends with one sentence that says what to do, and nothing half done."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.graph_scene import USUAL, Scene, inactive_token, silence
from tests.object_server import tree
from tests.traced_tiny_flux import FEATURES, transcoder
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.config import Parent


@pytest.fixture
def scene(traced_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Scene:
    return Scene.laid(traced_flux, tmp_path, capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--image 1 --step 3", "no target"),
        ("--step 3 --target img_2:3:3", "--image is missing"),
        ("--image 1 --target img_2:3:3", "--step is missing"),
        ("--image 1 --step 3 --target img_2:3", "site:token:feature"),
        ("--image 1 --step 3 --target img_2:-1:3", "site:token:feature"),
        ("--image 1 --step 3 --target joint_2:3:5", "double blocks"),
        ("--image 1 --step 3 --target 2*img_2:3:3", "a weight"),
        ("--image one --step 3 --target img_2:3:3", "is no image"),
        ("--image 1 --step 3 --target img_2:3:3 --target img_2:3:3", "stands twice"),
        ("--image 1 --step 3 --supernode img_2:3:3+img_2:4:3", "is no supernode"),
        ("--image 1 --step 3 --supernode a=img_2:3:3+img_2:3:3", "stands twice"),
        ("--image 1 --step 3 --supernode a=img_2:3:3 --supernode a=img_2:4:3", "stands twice"),
        ("--targets x.csv --image 1", "leave out --image"),
        ("--targets x.csv --together", "named group"),
        ("--targets HERE/none.csv", "there is no file"),
        ("--targets HERE", "is no CSV file"),
        (f"{USUAL} --nodes 0", "--nodes is 0"),
        (f"{USUAL} --edges 0", "--edges is 0"),
        (f"{USUAL} --check-edges 0", "--check-edges is 0"),
        (f"{USUAL} --min-attribution -1", "give 0 or more"),
        (f"{USUAL} --min-attribution nan", "give 0 or more"),
        (f"{USUAL} --node-threshold 0", "above 0 and up to 1"),
        (f"{USUAL} --edge-threshold 1.5", "above 0 and up to 1"),
        (f"{USUAL} --memory much", "is no size"),
        (f"{USUAL} --seed -1", "--seed is -1"),
        (f"{USUAL} --seed {2**64}", "--seed is 18446744073709551616"),
        (f"--image 1 --step 3 --supernode {'a' * 101}=img_2:3:3", "a name of 101 characters"),
        ("--image 1 --step 3 --supernode a=1e7*img_2:3:3", "the weight 1e+07 is none from 1e-06 to 1e+06"),
        (f"--image 1 --step 3 --supernode a={'9' * 400}*img_2:3:3", "the weight inf"),
        (f"{USUAL} --export gexf", "choose of difract"),
        (f"{USUAL} --export ,", "choose of difract"),
        (f"{USUAL} --out HERE/dictionaries/G", "lies in the folder of dictionaries"),
        (f"{USUAL} --device cuda", "no GPU"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused_and_nothing_is_written(scene: Scene, flags: str, said: str) -> None:
    scene.refused(flags, 2, said)
    assert not scene.out.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--image 2 --step 3 --target img_2:3:3",
            (
                "no trace of image 2",
                "traced images are 0-1",
                "harvest a new store with --trace-images 0-2 --trace-steps 1,3",
            ),
        ),
        ("--image 9 --step 3 --target img_2:3:3", ("there is no image 9: there are 3, 0 to 2",)),
        (
            "--image 0-2 --step 0-3 --target img_2:3:3",
            ("no trace of image 2 (4 targets)", "of step 0 (3 targets), step 2 (3 targets)", "--trace-steps 0-3"),
        ),
        ("--image 0-2 --step 3 --target img_2:3:3", ("no trace of image 2",)),
        ("--image 1 --step 2 --target img_2:3:3", ("no trace of step 2", "traced steps are 1,3")),
        ("--image 1 --step 3 --target img_3:3:5", ("block 3 is not traced", "0-2", "--trace-blocks 0-3")),
        ("--image 1 --step 3 --target img_2:64:3", ("img_2 has no token 64", "0 to 63")),
        ("--image 1 --step 3 --target txt_2:16:5", ("txt_2 has no token 16", "0 to 15")),
        (f"--image 1 --step 3 --target img_2:3:{FEATURES}", (f"has no feature {FEATURES}", f"0 to {FEATURES - 1}")),
    ],
)
def test_what_the_trace_or_the_dictionary_lacks_is_said_with_what_there_is(
    scene: Scene, flags: str, said: tuple[str, ...]
) -> None:
    scene.refused(flags, 2, *said)
    assert not scene.out.exists()


def test_a_target_that_is_not_active_is_refused_and_the_token_where_it_is_named(scene: Scene) -> None:
    token = inactive_token(scene)
    message = scene.refused(
        f"--image 1 --step 3 --target img_2:{token}:3", 2, f"not active at token {token}", "pre-activation -"
    )
    assert re.search(r"most active at token \d+: write img_2:max:3", message)
    silence(scene, 3)
    scene.refused(USUAL, 2, "active at no token of image 1 at step 3")
    assert not list(scene.out.glob("*.parquet"))


def test_of_many_targets_those_that_are_not_active_fail_at_the_end_and_the_others_have_their_graphs(
    scene: Scene,
) -> None:
    flags = f"--image 1 --step 3 --target img_2:{inactive_token(scene)}:3 --target txt_2:max:7"
    scene.refused(flags, 1, "1 of 2 targets have no graph", "not active", "--skip-inactive")
    assert len(list(scene.out.glob("graphs/*/facts.json"))) == 1
    assert scene.say(f"{flags} --skip-inactive") == (0, "")


def test_a_site_without_a_transcoder_is_refused_or_taken_for_unexplained_when_allowed(scene: Scene) -> None:
    shutil.rmtree(scene.dictionaries / "transcoder_txt_1")
    scene.refused(USUAL, 2, "no transcoder of txt_1", "--allow-missing")
    assert scene.say(f"{USUAL} --allow-missing") == (0, "")
    shutil.rmtree(scene.dictionaries / "transcoder_img_2")
    message = scene.refused(f"{USUAL} --allow-missing", 2, "no transcoder of img_2")
    assert "or take" not in message


def test_an_sae_is_refused_by_name(scene: Scene) -> None:
    scene.put("img_1", kind="sae")
    scene.refused(USUAL, 2, "SAEs of img_1", "--kind transcoder")


def test_an_sae_beside_a_transcoder_does_not_matter(scene: Scene) -> None:
    made = transcoder("img_1", kind="sae")
    save_dictionary(scene.dictionaries / made.name, made, None, [])
    assert scene.say(USUAL) == (0, "")


def test_a_dictionary_of_another_model_is_refused_with_both_names(scene: Scene) -> None:
    scene.put("img_1", d_model=64)
    scene.refused(USUAL, 1, "transcoder_img_1 has d_model 64", "have 128")
    parent = Parent("pack", "store", {"id": "another", "weights_sha256": {"transformer": "cd" * 32}})
    scene.put("img_1", parent=parent)
    scene.refused(USUAL, 1, "transcoder_img_1 is of another", "tiny-flux")
    assert not scene.out.exists()


def test_a_folder_without_dictionaries_is_refused(scene: Scene) -> None:
    shutil.rmtree(scene.dictionaries)
    scene.refused(USUAL, 2, "there is no folder")


def test_a_store_without_traces_says_how_to_harvest_them(scene: Scene, small_store: Callable[..., object]) -> None:
    (scene.folder / "store").unlink()
    made = small_store(n_images=4)
    shutil.copytree(made.path, scene.folder / "store")  # type: ignore[attr-defined]
    scene.refused(USUAL, 2, "holds no traces", "harvest with --trace")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ranking difract", "--ranking influence, now difract"),
        ("--min-attribution 0.01", "--min-attribution 0.0001, now 0.01"),
        ("--dtype float64", "--dtype float32, now float64"),
        ("--memory 1GB", "--memory 2 GB, now 1 GB"),
        ("--target txt_2:max:7", "one graph, in OUT itself"),
    ],
)
def test_an_out_made_with_other_settings_is_refused_and_kept(scene: Scene, flags: str, said: str) -> None:
    assert scene.say(USUAL) == (0, "")
    before = tree(scene.out)
    scene.refused(f"{USUAL} {flags}", 2, said, "choose another --out")
    assert tree(scene.out) == before


def test_an_out_of_another_target_another_dictionary_or_no_graph_is_refused(scene: Scene) -> None:
    assert scene.say(USUAL) == (0, "")
    scene.refused("--image 1 --step 3 --target txt_2:max:7", 2, "holds the graph of img_2:", "not of txt_2:")
    scene.refused("--image 0 --step 3 --target img_2:max:3", 2, "holds the graph of")
    scene.put("img_1", n_features=50)
    scene.refused(USUAL, 1, "another dictionary of img_1")
    shutil.rmtree(scene.out)
    scene.out.write_text("a file")
    scene.refused(USUAL, 2, "is a file")
    scene.out.unlink()
    scene.out.mkdir()
    (scene.out / "mine.txt").write_text("mine")
    scene.refused(USUAL, 2, "is not empty and holds no graphs")


def test_a_trace_that_was_cut_short_is_named_and_leaves_no_graph(scene: Scene, traced_flux: Path) -> None:
    (scene.folder / "store").unlink()
    shutil.copytree(traced_flux / "store", scene.folder / "store")
    file = scene.folder / "store" / "traces" / "image-00000001" / "step.3" / "double.01.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    scene.refused(USUAL, 1, "double.01.safetensors")
    file.unlink()
    scene.refused(USUAL, 1, "double.01.safetensors")
    assert not (scene.out / "facts.json").exists()
    assert scene.say("--image 0 --step 3 --target img_2:max:3") == (0, "")
