"""Targets of `analyze graph` that come in many: CSV files, supernodes, ranges, and what a scan said of them."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from analyze.circuits.graph import Graph
from analyze.circuits.targets import Ask
from analyze.inputs import dictionary_identity
from store import Site
from tests.graph_scene import PLAIN, USUAL, Scene, inactive_token, most_active, replace, silence
from tests.test_graph_command import write_csv
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary

GROUPS = "image,step,site,token,feature,group\n"


@pytest.fixture
def scene(traced_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Scene:
    return Scene.laid(traced_flux, tmp_path, capsys)


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        (["1,3,img_2,3"], "image,step,site,feature\n", "has no column token"),
        ([], "", "has no column image, step, site, token, feature"),
        ([], "image,step,site,token,feature\n", "lists no target"),
        (["1,3,img_2,3"], "image,step,site,token,feature\n", "line 2: 4 values, expected 5"),
        (["1,3,img_2,max,3,6"], "image,step,site,token,feature\n", "line 2: 6 values, expected 5"),
        (["1,3,img_2,max,3", "one,3,img_2,max,3"], "image,step,site,token,feature\n", "line 3: the image 'one' is no number"),
        (["1,3.0,img_2,max,3"], "image,step,site,token,feature\n", "line 2: the step '3.0'"),
        (["1,3,img2,max,3"], "image,step,site,token,feature\n", "line 2: 'img2:max:3' is no target"),
        (["1,3,img_2,,3"], "image,step,site,token,feature\n", "line 2: 'img_2::3' is no target"),
        (["1,3,img_2,max,3", "1,3,img_2,max,3"], "image,step,site,token,feature\n", "line 3: img_2:max:3 stands twice, first in line 2"),
        (["1,3,img_2,max,3,a,b"], "image,step,site,token,feature,x,x\n", "has the column 'x' twice"),
        (["1,3,img_2,max,3,a", f"1,3,img_2,max,3,{'b' * 101}"], GROUPS, "line 3: the group bbbbbbbbbbbbbbbbbbbb… has a name of 101"),
        (["1,3,img_2,max,3,a/b"], "image,step,site,token,feature,group\n", "the group 'a/b' is no name"),
        (["1,3,img_2,max,3,sae_img_2"], "image,step,site,token,feature,dictionary\n", "sae_img_2, an SAE"),
        (["1,3,img_2,max,3", "7,3,img_2,max,3"], "image,step,site,token,feature\n", "t.csv line 3: HERE/store has no trace of image 7"),
        (['1,3,img_2,max,"3'], "image,step,site,token,feature\n", "is not CSV"),
    ],
)  # fmt: skip
def test_a_csv_that_is_none_of_targets_is_refused_with_its_line(
    scene: Scene, rows: list[str], header: str, said: str
) -> None:
    write_csv(scene.folder / "t.csv", *rows, header=header)
    scene.refused("--targets HERE/t.csv", 2, said.replace("HERE", str(scene.folder)))
    assert not scene.out.exists()


def test_a_csv_that_is_not_text_is_refused(scene: Scene) -> None:
    (scene.folder / "t.csv").write_bytes(b"\xff\xfe\x00\x01")
    scene.refused("--targets HERE/t.csv", 2, "is no CSV file")


def test_max_and_the_token_that_it_means_are_one_graph_and_a_row_says_so(scene: Scene) -> None:
    token = most_active(scene)
    write_csv(scene.folder / "t.csv", f"1,3,img_2,{token},3", "1,3,img_2,max,3", header=PLAIN)
    assert scene.say("--targets HERE/t.csv") == (0, "")
    reasons = pq.read_table(scene.out / "summary.parquet")["reason"].to_pylist()
    assert reasons == [None, f"the same graph as that of {scene.folder}/t.csv line 2"]
    flags = f"{USUAL} --target img_2:{token}:3 --together --out HERE/o"
    scene.refused(flags, 2, "two of the targets are one")
    flags = f"{USUAL} --supernode img_2.p{token}.f3=0.5*img_2:{token}:3 --out HERE/p"
    scene.refused(flags, 1, "1 of 2 targets have no graph", "give the supernode another name")


def test_rows_of_features_that_are_not_active_are_told_apart_and_say_seed_and_sigma(scene: Scene) -> None:
    silence(scene, 3)
    write_csv(scene.folder / "t.csv", "1,3,img_2,max,3", "1,3,img_2,0,3", header=PLAIN)
    assert scene.say("--targets HERE/t.csv --skip-inactive") == (0, "")
    rows = pq.read_table(scene.out / "summary.parquet").to_pylist()
    assert [row["name"] for row in rows] == [f"image-00001.step-3.img_2.{at}.f3" for at in ("max", "p0")]
    assert all("not active" in row["reason"] or "active at no token" in row["reason"] for row in rows)
    assert all(row["seed"] is not None and row["sigma"] is not None for row in rows)
    assert scene.say(f"{USUAL} --skip-inactive --out HERE/alone") == (0, "")
    assert not (scene.folder / "alone" / "facts.json").exists()


@pytest.mark.parametrize(
    ("supernode", "said"),
    [
        ("img_2:max:3+img_2:TOKEN:3", "supernode a has img_2:TOKEN:3 twice, once as max"),
        ("img_2:TOKEN:3+0*img_2:TOKEN:4", "0*img_2:TOKEN:4 weighs nothing"),
        ("img_2:TOKEN:3+img_2:INACTIVE:3", "of supernode a, img_2 feature 3 is not active at token INACTIVE"),
        ("0.5*img_2:TOKEN:3+-0.5*img_2:TWIN:5", "the members of supernode a cancel out"),
    ],
)
def test_a_supernode_that_explains_nothing_is_refused_by_its_name(scene: Scene, supernode: str, said: str) -> None:
    made = transcoder("img_2")
    with torch.no_grad():
        made.encoder.weight[5], made.encoder.bias[5] = made.encoder.weight[3], made.encoder.bias[3]
    replace(scene, made)
    token = str(most_active(scene))
    words = {"TOKEN": token, "TWIN": token, "INACTIVE": str(inactive_token(scene))}
    for word, number in words.items():
        supernode, said = supernode.replace(word, number), said.replace(word, number)
    scene.refused(f"--image 1 --step 3 --supernode a={supernode}", 2, "--supernode a=", said)


def test_rows_that_are_not_traced_are_all_named_at_once_and_can_be_left_out(scene: Scene) -> None:
    rows = ("1,3,img_2,max,3", "2,3,img_2,max,3", "2,1,img_2,max,3", "7,2,img_2,max,3")
    write_csv(scene.folder / "t.csv", *rows, header=PLAIN)
    scene.refused(
        "--targets HERE/t.csv", 2, "no trace of image 2 (2 targets), image 7; traced images are 0-1",
        "no trace of step 2; traced steps are 1,3",
        "(there are 3 images): choose of them, harvest a new store with --trace-images 0-2 --trace-steps 1-3",
        "leave 3 targets of 4 out with --skip-untraced",
    )  # fmt: skip
    assert scene.say("--targets HERE/t.csv --skip-untraced") == (0, "")
    table = pq.read_table(scene.out / "summary.parquet")
    assert table["reason"].to_pylist() == [
        None,
        "image 2 is not traced",
        "image 2 is not traced",
        "image 7 is not traced",
    ]
    assert table["sigma"].to_pylist()[1] is not None


def test_a_range_beyond_all_images_is_refused_and_not_counted_out(scene: Scene) -> None:
    tracemalloc.start()
    scene.refused("--image 0-99999999999 --step 3 --target img_2:3:3", 2, "there is no image 3-99999999999")
    scene.refused(f"--image 0-{'9' * 30} --step 3 --target img_2:3:3", 2, "more than 18 digits")
    scene.refused(f"--image {'9' * 5000} --step 3 --target img_2:3:3", 2, "more than 18 digits")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def scan_record(scene: Scene, **changes: Any) -> None:
    """A CSV of targets with the record that `analyze scan` writes beside it."""
    write_csv(scene.folder / "t.csv", "1,3,img_2,max,3,img_2", header=PLAIN.replace("\n", ",dictionary\n"))
    assert scene.say(f"{USUAL} --out HERE/first") == (0, "")
    facts = Graph.read(scene.folder / "first").facts
    known = {site: of["identity"] for site, of in facts["transcoders"].items()}
    said = {
        "format": "granary scan",
        "version": 1,
        "store": facts["store"],
        "dictionaries": known | changes.pop("dictionaries", {}),
    }
    (scene.folder / "t.json").write_text(json.dumps(said | changes))


def test_targets_of_a_scan_of_another_store_or_dictionary_are_refused(scene: Scene) -> None:
    scan_record(scene)
    assert scene.say("--targets HERE/t.csv") == (0, "")
    scan_record(scene, store="sha256-another")
    scene.refused("--targets HERE/t.csv", 1, "a scan of store sha256-another", "scan this one")
    scan_record(scene, dictionaries={"img_2": "f" * 64})
    scene.refused("--targets HERE/t.csv", 1, "the scan looked at img_2 ffffffffffffffff…", "another dictionary")
    sae = transcoder("img_2", kind="sae")
    save_dictionary(scene.dictionaries / sae.name, sae, None, [])
    scan_record(scene, dictionaries={"img_2": dictionary_identity(sae)})
    scene.refused("--targets HERE/t.csv", 2, "img_2 was scanned as sae_img_2, an SAE")


def test_a_weight_is_kept_to_its_last_digit_and_read_back() -> None:
    for weight in (0.1234567891234, 1e-05, -2.5, 1 / 3, 123456.789):
        ask = Ask(Site.parse("img_2"), 4, 3, weight)
        assert Ask.parse(str(ask), "x") == ask
    assert Ask.parse("2.5e-3*img_2:4:3", "x").weight == 0.0025
