"""Bad input to `python -m analyze`: whatever cannot give a meaningful result ends with one sentence, 1 or 2, and nothing lost."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import analyze.scoring.matrices
import store.files
from analyze.__main__ import main
from store.files import json_bytes, write_json
from tests.analyze_planted import MODEL, Plan, planted_dictionaries, planted_store, reading_dictionary
from tests.object_server import tree
from tests.scenes import Place
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.config import Parent

PLAN = Plan(n_images=24, steps=1, chunk_images=8)
TOP = 8
ON_SCORES = ("features", "truth", "sheet", "report", "coherence", "compare")
LABEL = "label --dictionaries DICTIONARIES --author ada"


@dataclass
class Scene(Place):
    """Copies of a store, its dictionaries and their scores, to be damaged; `words` are what a command line says."""

    patch: pytest.MonkeyPatch

    def dictionary(self, site: str = "img_0", **options: Any) -> None:
        """Put a dictionary in the place of that of its site."""
        made = reading_dictionary(site, **options)
        shutil.rmtree(self.dictionaries / made.name, ignore_errors=True)
        save_dictionary(self.dictionaries / made.name, made, None, [])

    def say(self, text: str) -> list[str]:
        """A command line: STORE, DICTIONARIES, OUT and HERE stand for folders; IN for the flags that name the first three."""
        text = text.replace("IN", "--store STORE --dictionaries DICTIONARIES --out OUT")
        places = {"STORE": self.store, "DICTIONARIES": self.dictionaries, "OUT": self.out, "HERE": self.folder}
        return [re.sub("|".join(places), lambda found: str(places[found[0]]), word) for word in text.split()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, its dictionaries, and the scores of both; never written to."""
    folder = tmp_path_factory.mktemp("errors")
    planted_store(folder / "store", PLAN)
    planted_dictionaries(folder / "dictionaries", PLAN)
    flags = [
        "--store",
        str(folder / "store"),
        "--dictionaries",
        str(folder / "dictionaries"),
        "--out",
        str(folder / "out"),
    ]
    assert main(["scores", *flags, "--top", str(TOP)]) == 0
    return folder


@pytest.fixture
def scene(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    shutil.copytree(made, tmp_path / "scene")
    shutil.rmtree(tmp_path / "scene" / "out.runs", ignore_errors=True)
    return Scene(tmp_path / "scene", monkeypatch)


Prepare = Callable[[Scene], object]


def nothing(scene: Scene) -> None:
    """As it is."""


def no_scores(scene: Scene) -> None:
    shutil.rmtree(scene.out)


def other_site(scene: Scene) -> None:
    scene.dictionary("img_7")


def other_width(scene: Scene) -> None:
    scene.dictionary(d_model=16)


def other_model(scene: Scene) -> None:
    shutil.rmtree(scene.dictionaries)
    parent = Parent("sha256-p", "sha256-s", {**MODEL, "weights_sha256": {"transformer": "cd" * 32}})
    planted_dictionaries(scene.dictionaries, PLAN, parent=parent)


def other_dictionaries(scene: Scene) -> None:
    scene.dictionary(seed=5)


def unfinished_training(scene: Scene) -> None:
    (scene.dictionaries / "transcoder_img_0" / "config.json").rename(
        scene.dictionaries / "transcoder_img_0" / "resume.safetensors"
    )


def damaged_weights(scene: Scene) -> None:
    flip(scene.dictionaries / "transcoder_img_0" / "weights.safetensors")


def pickled_code(scene: Scene) -> None:
    shutil.rmtree(scene.dictionaries)
    scene.dictionaries.mkdir()
    torch.save({"model": Plan}, scene.dictionaries / "sae_img_0.pt")


def nan_weights(scene: Scene) -> None:
    no_scores(scene)
    broken = reading_dictionary("img_0")
    with torch.no_grad():
        broken.encoder.weight[3, 3] = float("nan")
    shutil.rmtree(scene.dictionaries / "transcoder_img_0")
    save_dictionary(scene.dictionaries / "transcoder_img_0", broken, None, [])


def no_dictionaries(scene: Scene) -> None:
    shutil.rmtree(scene.dictionaries)
    scene.dictionaries.mkdir()


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def first_chunk(scene: Scene) -> Path:
    array = scene.out / "img_0" / "step.0" / "scores"
    return next(path for path in sorted(array.rglob("*")) if path.is_file() and path.name != "zarr.json")


def damaged_store(scene: Scene) -> None:
    no_scores(scene)
    array = scene.store / "activations" / "double.00" / "img" / "step.0" / "mlp_in"
    flip(next(path for path in sorted(array.rglob("c*")) if path.is_file()))


def unfinished_store(scene: Scene) -> None:
    (scene.store / "seal.json").unlink()
    max((scene.store / "commits").glob("part-*.json")).unlink()


def replan(**changes: Any) -> Prepare:
    """Another store in the place of the one; OUT is empty, or with `scored` holds its scores."""

    def prepare(scene: Scene) -> None:
        scored = changes.get("scored", True)
        shutil.rmtree(scene.store)
        shutil.rmtree(scene.out)
        values = {"n_images": 24, "steps": 1, "chunk_images": 8, **{k: v for k, v in changes.items() if k != "scored"}}
        planted_store(scene.store, Plan(**values))
        if scored:
            assert main(scene.say(f"scores IN --top {TOP}")) == 0

    return prepare


def other_store(scene: Scene) -> None:
    shutil.rmtree(scene.store)
    planted_store(scene.store, Plan(n_images=8, steps=1, chunk_images=8, seed=3))


def labels(content: object) -> Prepare:
    def prepare(scene: Scene) -> None:
        path = scene.dictionaries / "transcoder_img_0" / "labels.json"
        path.write_bytes(content if isinstance(content, bytes) else json_bytes(content))

    return prepare


def file(name: str, content: bytes = b"precious") -> Prepare:
    def prepare(scene: Scene) -> None:
        (scene.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (scene.folder / name).write_bytes(content)

    return prepare


def run_json(**changes: Any) -> Prepare:
    def prepare(scene: Scene) -> None:
        content = json.loads((scene.out / "run.json").read_bytes())
        write_json(scene.out / "run.json", {**content, **changes})

    return prepare


def embeddings(rows: int, value: float = 1.0) -> Prepare:
    def prepare(scene: Scene) -> None:
        np.save(scene.folder / "e.npy", np.full((rows, 4), value, np.float32))

    return prepare


def out_is_a_file(scene: Scene) -> None:
    no_scores(scene)
    scene.out.write_text("precious")


def fails(number: int, where: Any, name: str) -> Prepare:
    """The file system says no to a function that writes."""

    def prepare(scene: Scene) -> None:
        no_scores(scene)

        def refused(path: Path, *_: object) -> None:
            raise OSError(number, "refused by the test", str(path))

        scene.patch.setattr(where, name, refused)

    return prepare


def truncated(path: str) -> Prepare:
    def prepare(scene: Scene) -> None:
        (scene.folder / path).write_bytes((scene.folder / path).read_bytes()[:-9])

    return prepare


def damaged_scores(scene: Scene) -> None:
    flip(first_chunk(scene))


def damaged_table(scene: Scene) -> None:
    truncated("out/img_0/step.0/features.parquet")(scene)


CASES: list[tuple[str, Prepare, str, int, str]] = [
    # what it is, what is done before, the command, its exit code, what the message says
    ("no command", nothing, "paint IN", 2, "has no command 'paint'; it has: scores"),
    ("no such flag", nothing, "scores IN --nonsense", 2, "nonsense"),
    ("no flags", nothing, "scores", 2, "store"),
    ("text for a number", nothing, "scores IN --top many", 2, "--top: invalid literal for int.*'many'"),
    ("a number that means nothing", nothing, "scores IN --top 0", 2, "keep at least 1 top image"),
    ("no such store", nothing, "scores --store HERE/no --dictionaries DICTIONARIES --out OUT", 1, "there is no store at .*/no$"),
    ("a store that is none", nothing, "scores --store HERE/dictionaries --dictionaries DICTIONARIES --out OUT",
     1, "dictionaries is no Granary store: it has no zarr.json"),
    ("a damaged store", damaged_store, "scores IN --sites img_0", 1, "differs|damaged|checksum"),
    ("no such dictionaries", nothing, "scores --store STORE --dictionaries HERE/no --out OUT", 2, "there is no folder .*/no"),
    ("dictionaries in a file", file("d"), "scores --store STORE --dictionaries HERE/d --out OUT", 2, "there is no folder .*/d"),
    ("a folder without dictionaries", no_dictionaries, "scores IN", 2, "holds no dictionary"),
    ("a dictionary of another site", other_site, "scores IN", 1, "img_7, which store .* has not; it has img_0, txt_0"),
    ("a dictionary of another width", other_width, "scores IN", 1, "d_model 16, the activations of store .* have 32"),
    ("a dictionary of another model", other_model, "scores IN", 1, "cdcd.* is of planted .transformer abab.*another model"),
    ("an unfinished dictionary", unfinished_training, "scores IN", 1, "did not finish training"),
    ("a damaged dictionary", damaged_weights, "scores IN", 1, "differs from the checksum"),
    ("a pickle that holds code", pickled_code, "scores IN", 1, "such a pickle can run code"),
    ("NaN scores", nan_weights, "scores IN", 1, "transcoder_img_0 gives a NaN or an infinite activation"),
    ("a site that is not there", nothing, "scores IN --sites img_5", 2, "has no img_5"),
    ("a site that is no site", nothing, "scores IN --sites everything", 2, "names no sites"),
    ("no site at all", nothing, "scores IN --sites ,", 2, "names no sites|is no site"),
    ("a step that is not there", nothing, "scores IN --steps 3", 2, "there is no step 3"),
    ("a step that is no number", nothing, "scores IN --steps two", 2, "'two' in 'two' is no step: write numbers"),
    ("OUT is a file", out_is_a_file, "scores IN", 2, "out is a file"),
    ("OUT holds something else", file("mail/a.txt"), "scores IN --out HERE/mail", 2, "holds no analysis"),
    ("OUT of another store", other_store, "scores IN", 1, "holds the analysis of store sha256-.*, not of"),
    ("OUT of another version", run_json(version=99), "scores IN", 1, "choose another --out"),
    ("OUT with other choices", nothing, f"scores IN --top {TOP + 1}", 2, f"holds another run .top {TOP}, now {TOP + 1}"),
    ("OUT with a record that is none", file("out/run.json", b"{"), "features IN", 1, "is not JSON any more"),
    ("OUT of other dictionaries", other_dictionaries, "features IN", 1, "holds scores of another dictionary"),
    ("a full disk", fails(errno.ENOSPC, store.files, "_dump"), "scores IN", 1, "disk of .* is full.*make room"),
    ("a full disk when scores end", fails(errno.ENOSPC, analyze.scoring.matrices, "fsync_file"), "scores IN", 1, "disk of .*out is full"),
    ("an OUT that cannot be written", fails(errno.EACCES, store.files, "_dump"), "scores IN", 1, "refused by the test"),
    ("a truncated feature table", damaged_table, "features IN", 1, "features.parquet cannot be read.*compute it again"),
    ("a truncated feature table ", damaged_table, "sheet IN", 1, "features.parquet cannot be read.*compute it again"),
    ("a truncated feature table  ", damaged_table, "report IN", 1, "features.parquet cannot be read.*compute it again"),
    ("a damaged chunk of scores", damaged_scores, "truth IN --images all", 1, "scores is damaged.*compute it again"),
    ("a feature that is not there", nothing, "sheet IN --features 3,48 --top 4", 2, "there is no feature 48"),
    ("more images than were kept", nothing, f"sheet IN --top {TOP + 1}", 2, f"keeps {TOP} top images"),
    ("no picture to draw on", replan(pictures=False), "sheet IN", 2, "holds no pictures"),
    ("no truth", replan(truth=False), "truth IN", 2, "builtin:shapes"),
    ("too few images for the truth", nothing, "truth IN", 2, "needs at least 20 images"),
    ("a threshold that is none", nothing, "truth IN --threshold 0.4", 2, "--threshold is 0.4: an AUROC that says anything"),
    ("a label file that is damaged", labels(b"{"), "features IN", 1, "labels.json is not JSON any more"),
    ("a label file that is none", labels({"3": "cat"}), "sheet IN --top 4", 1, "no label file of ours"),
    ("a label onto damaged labels", labels(b"{"), f"{LABEL} img_0/3 red", 1, "labels.json is not JSON any more"),
    ("a label of a feature that is not there", nothing, f"{LABEL} img_0/48 red", 2, "has no feature 48"),
    ("a label of no dictionary", nothing, f"{LABEL} img_9/3 red", 2, "there are transcoder_img_0, transcoder_txt_0"),
    ("a label of no feature", nothing, f"{LABEL} img_0/red red", 2, "names no feature"),
    ("merged labels that are damaged", file("l.json", b"{"), f"{LABEL} --merge HERE/l.json", 1, "l.json is not JSON any more"),
    ("merged labels that are not there", nothing, f"{LABEL} --merge HERE/l.json", 2, "there is no file .*l.json"),
    ("a CLIP folder that is none", nothing, "coherence IN --top-m 4 --clip DICTIONARIES", 1, "is no CLIP model: it has no config.json"),
    ("a CLIP folder that is not there", nothing, "coherence IN --top-m 4 --clip HERE/no", 2, "there is no such folder"),
    ("no CLIP for pictures of others", nothing, "coherence IN --top-m 4", 2, "which CLIP model is to embed the pictures of planted"),
    ("no picture to embed", replan(pictures=False), "coherence IN --top-m 4 --clip HERE", 2, "holds no pictures to embed"),
    ("embeddings of other images", embeddings(5), "coherence IN --top-m 4 --embeddings HERE/e.npy",
     1, "has 5 rows, the store has 24 images"),
    ("embeddings with a NaN", embeddings(24, np.nan), "coherence IN --top-m 4 --embeddings HERE/e.npy",
     1, "image 0 holds a NaN or an infinity, and 23 more"),
    ("more images compared than kept", nothing, "coherence IN", 2, f"keeps {TOP} top images"),
    ("all, with a CLIP that is none", nothing, f"all IN --top {TOP} --top-m 4 --clip DICTIONARIES", 1, "is no CLIP model"),
    ("all, with dictionaries of others", other_width, f"all IN --top {TOP} --top-m 4", 1, "d_model 16"),
    ("a rank that is none", nothing, "features IN --rank beauty", 2, "invalid choice 'beauty' for argument '--rank'"),
    ("a category that is none", nothing, "features IN --category pretty", 2, "'pretty' is no category; there are dead"),
    ("a density that is none", nothing, "features IN --min-density 2", 2, "a share of rows lies between 0 and 1"),
    ("a rank by coherence without any", nothing, "features IN --rank coherence", 2, "python -m analyze coherence"),
    ("features that are no numbers", nothing, "sheet IN --features red --top 4", 2, "'red' in 'red' is no feature: write numbers"),
    ("an image that is not there", nothing, "sheet IN --images 99 --top 4", 2, "there is no image 99: there are 24"),
    ("a report folder of somebody else", file("out/report/thesis.txt"), "report IN", 2, "holds other files .thesis.txt. and no report"),
    ("a page of somebody else", file("out/report/index.html"), "report IN", 2, "holds other files .index.html. and no report"),
    ("a report that is a file", file("out/report"), "report IN", 2, "report is a file, and the report is a folder"),
    ("a truth that is not there", nothing, "truth IN --attributes HERE/no.csv", 2, "no.csv"),
    ("sides that are not there", nothing, "compare IN --of img_9@0 --with img_0@0", 2, "dictionaries has no img_9; it has img_0, txt_0"),
    ("a step of a side that is not there", nothing, "compare IN --of img_0@5 --with img_0@0",
     2, "there is no step 5 .img_0@5. among those chosen: 0"),
    ("directions of no feature", nothing, "directions IN --features 48", 2, "48"),
    ("a scan without sides", nothing, "scan IN --kind contrastive", 2, "needs one choice of its sides"),
    ("a scan of no image", nothing, "scan IN --kind top --prompts zebra", 2, "no prompt of the store matches --prompts 'zebra'"),
    ("a scan of images that are not there", nothing, "scan IN --kind top --images 99", 2, "there is no image 99: there are 24"),
    ("a scan by no expression", nothing, "scan IN --kind top --prompts (", 2, "--prompts '.' is no regular expression: missing"),
    ("a region outside of the picture", nothing, "scan IN --kind spatial --region 0-99:0-3 --sites img_0",
     2, "'0-99' in --region .* leaves the picture, which has tokens 1 to 6"),
    ("a mask that is not there", nothing, "scan IN --kind spatial --mask HERE/no.png --sites img_0",
     2, "no.png cannot be read as a picture: .*No such file"),
    ("a mask that is no picture", file("m.png"), "scan IN --kind spatial --mask HERE/m.png --sites img_0",
     2, "m.png cannot be read as a picture: cannot identify"),
    ("pairs that are not there", nothing, "scan IN --kind contrastive --pairs HERE/no.csv",
     2, "no.csv cannot be read as CSV: .*No such file"),
    ("a scan over one step", nothing, "scan IN --kind temporal", 2, "compares steps, and only step 0 is chosen"),
    *((f"{command} without scores", no_scores, f"{command} IN", 2, "analyze scores") for command in ON_SCORES),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "command", "code", "message"), [c[1:] for c in CASES], ids=[c[0].strip() for c in CASES]
)
def test_bad_input_ends_with_one_sentence_and_nothing_lost(
    scene: Scene, capsys: pytest.CaptureFixture[str], prepare: Prepare, command: str, code: int, message: str
) -> None:
    prepare(scene)
    before = tree(scene.folder)
    capsys.readouterr()
    assert main(scene.say(command)) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    explained = (
        len(re.findall("^error: ", said, re.MULTILINE)) == 1 or "--help" in said
    )  # tyro speaks in a way of its own
    assert explained and re.search(message, said, re.DOTALL), said
    after = tree(scene.folder)
    assert {name: after.get(name) for name in before} == before, "something that was there was lost or changed"
