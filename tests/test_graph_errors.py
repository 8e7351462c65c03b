"""Bad input to `analyze graph`: whatever cannot be explained ends with one sentence that says what to do, and nothing half done."""

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from analyze.circuits.command import run
from analyze.circuits.graph import Graph
from analyze.circuits.settings import GraphSettings
from analyze.inputs import dictionary_identity
from store import Site, open_store
from store.command import Command, program
from tests.object_server import tree
from tests.test_graph_command import write_csv
from tests.traced_tiny_flux import FEATURES, transcoder
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.config import Parent

COMMANDS = {"graph": Command(GraphSettings, run, "")}
USUAL = "--image 1 --step 3 --target img_2:max:3"
QUICK = "--nodes 2 --no-page"
PLAIN = "image,step,site,token,feature\n"


class Scene:
    """Copies of a traced store and its transcoders, to be damaged."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capture = folder, capture

    @property
    def dictionaries(self) -> Path:
        return self.folder / "dictionaries"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def put(self, site: str, **options: Any) -> None:
        """Put another dictionary in the place of that of a site."""
        made = transcoder(site, **options)
        shutil.rmtree(self.dictionaries / f"transcoder_{site}")
        save_dictionary(self.dictionaries / made.name, made, None, [])

    def say(self, text: str) -> tuple[int, str]:
        """Exit code and message of `analyze graph TEXT`, HERE being the scene's folder."""
        words = [word.replace("HERE", str(self.folder)) for word in text.split()]
        usual = [
            "--store",
            f"{self.folder}/store",
            "--dictionaries",
            f"{self.folder}/dictionaries",
            "--out",
            str(self.out),
        ]
        code = program("analyze", COMMANDS, ["graph", *usual, *QUICK.split(), *words])
        said = self.capture.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == (1 if code else 0), said
        return code, errors[0].removeprefix("error: ") if errors else ""

    def refused(self, text: str, code: int, *said: str) -> str:
        """The message of a command that is refused, with all of `said` in it."""
        found, message = self.say(text)
        assert found == code, message
        for words in said:
            assert words in message, message
        return message


@pytest.fixture
def scene(traced_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Scene:
    (tmp_path / "store").symlink_to(traced_flux / "store")
    shutil.copytree(traced_flux / "dictionaries", tmp_path / "dictionaries")
    return Scene(tmp_path, capsys)


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
        ("--image 2 --step 3 --target img_2:3:3", ("no trace of image 2", "traced images are 0-1", "--trace-images 2")),
        ("--image 9 --step 3 --target img_2:3:3", ("no trace of image 9",)),
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


def replace(scene: Scene, made: Any) -> None:
    """Put this transcoder in the place of the one that is there."""
    shutil.rmtree(scene.dictionaries / made.name)
    save_dictionary(scene.dictionaries / made.name, made, None, [])


def silence(scene: Scene, feature: int) -> None:
    """Let a feature of img_2 be active nowhere."""
    made = transcoder("img_2")
    with torch.no_grad():
        made.encoder.bias[feature] = -1e6
    replace(scene, made)


def inactive_token(scene: Scene) -> int:
    """A token at which feature 3 of img_2 is not active in image 1 at step 3."""
    rows = open_store(scene.folder / "store").read(Site.parse("img_2"), 3, "mlp_in", 1, 2)[0]
    z = transcoder("img_2").encode(torch.from_numpy(rows.copy()), torch.ones(len(rows)))[:, 3]
    return int((z == 0).nonzero()[0])


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


def most_active(scene: Scene) -> int:
    """The token that `max` means for feature 3 of img_2."""
    assert scene.say(USUAL) == (0, "")
    token: int = Graph.read(scene.out).facts["targets"][0]["token"]
    shutil.rmtree(scene.out)
    return token


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
        "no trace of step 2; traced steps are 1,3", "--trace-images 2,7 --trace-steps 2", "leave 3 targets of 4 out with --skip-untraced",
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
    scene.refused("--image 0-99999999999 --step 3 --target img_2:3:3", 2, "no trace of image 2")
    scene.refused(f"--image 0-{'9' * 30} --step 3 --target img_2:3:3", 2, "no trace of image 2")
    scene.refused(f"--image {'9' * 5000} --step 3 --target img_2:3:3", 2, "there is no image")
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
