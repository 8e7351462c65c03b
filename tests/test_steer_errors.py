"""What `analyze steer` refuses: everything that cannot be, in one sentence, before a model is loaded and a file is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analyze.__main__ import main
from harvest.models.model import TINY_FLUX_FOLDER
from store import open_store
from store.errors import MismatchError
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.config import Parent

Ask = Callable[..., str]


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded in these tests."""
    monkeypatch.setattr("harvest.models.loading.load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.fixture
def ask(traced_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs the command line; the one line that it says on stderr.  `code`: the exit code that is expected."""

    def run(*flags: str, code: int = 2, store: str | None = "store", dictionaries: str | None = "dictionaries") -> str:
        words = ["steer", "--out", str(tmp_path / "out"), "--clip", "none"]
        words += [] if store is None else ["--store", str(traced_flux / store)]
        words += [] if dictionaries is None else ["--dictionaries", str(traced_flux / dictionaries)]
        assert main([*words, *flags]) == code
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and "Traceback" not in said and len(said.splitlines()) == 1, said
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("pictures"))
        return said

    return run


EDIT = ("--images", "0", "--edit")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("zero img_0:96", "no feature 96"),
        ("zero img_0:5000000", "there is no feature 5000000"),
        ("zero img_0:0-99999999999999", "there is no feature 1000000-99999999999999"),
        ("zero img_7:1", "no block 7"),
        ("zero joint_0:1", "single-stream"),
        ("zero img_9x:1", "no site"),
        ("erase img_0:1", "'erase' is no mode; there are zero, amplify, invert, set, add"),
        ("zero", "has not a mode and what it changes"),
        ("zero img_0", "names no feature: write img_0:66"),
        ("zero img_0:", "names no feature"),
        ("zero img_0:all", "name features by their numbers"),
        ("zero img_0:1-", "is no feature"),
        ("zero img_0:5-2", "runs backwards"),
        ("zero:2 img_0:1", "zero takes no strength"),
        ("amplify: img_0:1", "no strength follows the colon"),
        ("amplify:nan img_0:1", "no finite number"),
        ("amplify:inf img_0:1", "no finite number"),
        ("amplify:-1e999 img_0:1", "no finite number"),
        ("amplify:much img_0:1", "is no number"),
        ("zero img_0:1 @steps=4", "no step 4"),
        ("zero img_0:1 @steps=x", "is no step"),
        ("zero img_0:1 @steps=", "@steps has no value"),
        ("zero img_0:1 @steps=1 @steps=2", "says @steps twice"),
        ("zero img_0:1 @tokens=64", "no token 64"),
        ("zero txt_0:1 @tokens=16", "no token 16"),
        ("zero img_0:1 @tokens=above:0", "above"),
        ("zero img_0:1 @tokens=above:nan", "above"),
        ("zero img_0:1 @tokens=some", "chooses no tokens"),
        ("zero img_0:1 @tokens=mask:none.png", "there is no mask"),
        ("zero txt_0:1 @tokens=grid:1", "a mask lies over the picture"),
        ("zero img_0:1 @kind=sae", "there is no sae of img_0"),
        ("zero img_0:1 @kind=lens", "kind 'lens' is not one of transcoder, sae"),
        ("zero img_0:1 @layers=1", "no option @layers"),
        ("set:1 img_0:1 @unit=peak", "no analysis says what they are"),
        ("amplify:1 img_0:1 @unit=peak", "only set and add count in peaks"),
        ("set:1 img_0:1 @unit=peaks", "unit 'peaks' is not one of absolute, peak"),
        ("set:1 img_0:1 @normalised", "only add"),
        ("zero red", "there is no supernode 'red'"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_before_the_model_is_loaded(ask: Ask, edit: str, said: str) -> None:
    assert said in ask(*EDIT, edit)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--images", "0"), "changes nothing"),
        ((*EDIT, "zero img_0:1", "--images", "3"), "there is no image 3"),
        ((*EDIT, "zero img_0:1", "--images", "x"), "is no image"),
        ((*EDIT, "zero img_0:1", "--images", "0-99999999999"), "there is no image 3-99999999999"),
        (("--images", "", "--edit", "zero img_0:1"), "--images is empty"),
        (("--images", "0,0", "--edit", "zero img_0:1"), "image 0 is there twice"),
        (("--images", "0,0-1", "--edit", "zero img_0:1"), "image 0 is there twice"),
        ((*EDIT, "zero img_0:1", "--name", " "), "--name is empty"),
        ((*EDIT, "amplify img_0:1"), "changes nothing"),
        (("--images", "0", "--off", "txt 0", "--method", "replacement"), "the method replacement is about edits"),
        (("--edit", "zero img_0:1"), "says not what is drawn"),
        ((*EDIT, "zero img_0:1", "--prompt", "a"), "give --images or prompts"),
        (("--prompts", "p.txt", "--prompt", "a", "--edit", "zero img_0:1"), "give --prompts FILE or --prompt TEXT"),
        (("--prompts", "nowhere.txt", "--edit", "zero img_0:1"), "there is no file"),
        (("--prompt", "a", "--prompt", "a", "--edit", "zero img_0:1"), "twice"),
        (("--prompt", "a", "--seeds", "3-1", "--edit", "zero img_0:1"), "are no seeds"),
        (("--prompt", "a", "--seeds", "0-9999999999", "--edit", "zero img_0:1"), "too many seeds"),
        (("--prompt", "a", "--seeds", "-1", "--edit", "zero img_0:1"), "is no seed"),
        (("--prompt", "a", "--seeds", "9999999999999999999", "--edit", "zero img_0:1"), "no whole number from 0"),
        ((*EDIT, "zero img_0:1", "--strengths", "1,2"), "zero takes none"),
        ((*EDIT, "amplify img_0:1", "--strengths", "1,nan"), "no finite number"),
        ((*EDIT, "amplify img_0:1", "--strengths", "1,,2"), "is no number"),
        ((*EDIT, "amplify img_0:1", "--strengths", "1,1.0"), "twice"),
        ((*EDIT, "zero red", "--supernode", "red="), "supernode 'red' is empty"),
        ((*EDIT, "zero red", "--supernode", "red"), "has no members"),
        ((*EDIT, "zero red", "--supernode", "img_0=img_0:1"), "is no site"),
        ((*EDIT, "zero red", "--supernode", "red=img_0:1", "--supernode", "red=img_0:2"), "is given twice"),
        ((*EDIT, "zero red", "--supernode", "red=img_0:1+img_0:96"), "no feature 96"),
        (("--images", "0", "--off", "txt"), "has not a stream and layers"),
        (("--images", "0", "--off", "joint 0"), "is no stream"),
        (("--images", "0", "--off", "txt 5"), "no block 5"),
        (("--images", "0", "--off", "txt 0 @steps=9"), "no step 9"),
        (("--images", "0", "--off", "txt 0 @parts=head"), "there are mlp and attn"),
        ((*EDIT, "zero txt_0:1", "--off", "txt 0"), "would do nothing"),
        (("--images", "0", "--splice", "img_4"), "there is no dictionary of img_4"),
        ((*EDIT, "zero img_0:1", "--judge", "taste"), "the judge reads no 'taste'"),
        ((*EDIT, "zero img_0:1", "--judge", "colour=sour"), "there is no colour 'sour'"),
        ((*EDIT, "zero img_0:1", "--batch-size", "0"), "must be at least 1"),
        ((*EDIT, "zero img_0:1", "--device", "tpu"), "is no device"),
        ((*EDIT, "zero img_0:1", "--clip", "no/where/at/all"), "no such folder"),
        ((*EDIT, "zero img_0:1", "--analysis", "nowhere", "--edit", "set:1 img_0:1 @unit=peak"), "holds no analysis"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_the_model_is_loaded(
    ask: Ask, flags: tuple[str, ...], said: str
) -> None:
    assert said in ask(*flags)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image: 0\nedits: zero img_0:1", "'image' is no key of an experiment"),
        ("images: 0\nedits: [{mode: zero, target: 'img_0:1', step: 1}]", "'step' is no key of an edit"),
        ("images: 0\nedits: [{mode: zero}]", "says not what it changes"),
        ("images: 0\nedits: [7]", "neither a text"),
        ("images: 0\nedits: {mode: zero, site: img_0, features: [1.5]}", "is no feature"),
        ("images: 0\nedits: {mode: set, target: 'img_0:1', strength: .nan}", "no finite number"),
        ("images: 0\nedits: {mode: set, target: 'img_0:1', strength: true}", "no finite number"),
        ("images: 0\noff: [{stream: txt, layer: 0}]", "'layer' is no key"),
        ("images: 0\nsupernodes: {red: []}\nedits: zero red", "supernode 'red' is empty"),
        ("images: 0\nsupernodes: {red: 7}\nedits: zero red", "names no features"),
        ("images: 0\nvariants: []", "changes nothing"),
        ("images: 0\nvariants: [{name: a}]", "variant 'a' changes nothing"),
        ("images: 0\nvariants: [{name: plain, edits: zero img_0:1}]", "called 'plain'"),
        ("images: 0\nvariants: [{edits: zero img_0:1}, {edits: zero img_0:1}]", "two variants are called"),
        ("images: 0\nedits: zero img_0:1\nvariants: [zero img_0:2]", "belongs into one of the variants"),
        ("images: 0\nmethod: magic\nedits: zero img_0:1", "method 'magic'"),
        ("images: 0\nseeds: [0.5]\nedits: zero img_0:1", "no whole number"),
        ("prompts: 7\nedits: zero img_0:1", "prompts is 7"),
        ("shots: [{seed: 1}]\nedits: zero img_0:1", "shot 0"),
        ("shots: [{prompt: a red ring, seed: 0, image: 0}]\nedits: zero img_0:1", "not 'a red ring'"),
        ("images: 0\ndrawing: {height: 60}\nedits: zero img_0:1", "multiple of 8"),
        ("images: 0\ndrawing: {num_inference_steps: 0}\nedits: zero img_0:1", "must be a whole number from 1"),
        ("images: 0\ndrawing: {max_sequence_length: 513}\nedits: zero img_0:1", "at most 512"),
        ("images: 0\ndrawing: {guidance: 3.5}\nedits: zero img_0:1", "no guidance embedding"),
        ("images: 0\ndrawing: {guidance: a}\nedits: zero img_0:1", "must be a number"),
        ("images: 0\ndrawing: {guidance: .nan}\nedits: zero img_0:1", "guidance is nan"),
        ("images: 0\ndrawing: {height: '64'}\nedits: zero img_0:1", "must be a whole number"),
        ("images: 0\ndrawing: {dtype: [a]}\nedits: zero img_0:1", "is not one of bfloat16"),
        ("images: 0\ndrawing: [4]\nedits: zero img_0:1", "write a mapping"),
        ("images: 0\ndrawing: {steps: 4}\nedits: zero img_0:1", "'steps' says nothing of how to draw"),
        (
            "images: 0\ndrawing: {height: 32}\njudge: colour\nedits: zero img_0:1",
            "the judge reads tiny-flux's pictures",
        ),
        ("images: 0\ndrawing: {num_inference_steps: 2}\nedits: zero img_0:1 @steps=2", "no step 2"),
        ("images: 0\nclip: [a]\nedits: zero img_0:1", "clip is"),
        ("images: 0\npeaks: {}\nedits: set:1 img_0:1 @unit=peak", "peaks says not all"),
        ("images: 0\nname: [a]\nedits: zero img_0:1", "a name is a text"),
        ("images: 0\nname: [a]\nvariants: [zero img_0:1]", "no text"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_refused_before_the_model_is_loaded(
    ask: Ask, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "e.yaml").write_text(text)
    assert said in ask("--experiment", str(tmp_path / "e.yaml"))


def test_flags_that_a_file_decides_are_refused_beside_it(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("images: 0\nedits: zero img_0:1\ndrawing: {batch_size: 2}\n")
    given = ("--experiment", str(tmp_path / "e.yaml"))
    assert "leave out --edit" in ask(*given, "--edit", "zero img_0:2")
    assert "leave out --method" in ask(*given, "--method", "difference")
    assert "leave out --images" in ask(*given, "--images", "1")
    assert "batch size 2, --batch-size is 3" in ask(*given, "--batch-size", "3")
    assert "there is no file" in ask("--experiment", str(tmp_path / "none.yaml"))


def test_dictionaries_that_are_missing_or_of_another_model_are_refused(ask: Ask, tmp_path: Path) -> None:
    flags = (*EDIT, "zero img_0:1")
    assert "give --dictionaries" in ask(*flags, dictionaries=None)
    assert "give --dictionaries" in ask(*EDIT, "set:1 img_0:1 @unit=peak", dictionaries=None)
    assert "holds no dictionary" in ask(*flags, dictionaries="store")
    for name, made, said in (
        ("wide", transcoder("img_0", d_model=64), "d_model 64"),
        ("high", transcoder("img_7"), "of block 7"),
    ):
        save_dictionary(tmp_path / name / made.name, made, None, [])
        assert said in ask(
            *flags, "--dictionaries", str(tmp_path / name), code=MismatchError.exit_code, dictionaries=None
        )


def test_without_a_store_dictionaries_of_another_model_are_refused_by_their_parent(
    ask: Ask, tmp_path: Path, traced_flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = open_store(traced_flux / "store").meta.model["weights_sha256"]["transformer"]
    out = tmp_path / "out"
    flags = ("--model", "tiny-flux", "--prompt", "a red ring", "--edit", "zero img_0:1", "--plan", "--device", "cpu")
    for known in (weights, "0" * 64):
        made = transcoder("img_0", parent=Parent("p", "s", {"id": "m", "weights_sha256": {"transformer": known}}))
        save_dictionary(tmp_path / known / made.name, made, None, [])
        given = (*flags, "--dictionaries", str(tmp_path / known))
        if known == weights:
            assert main(["steer", "--out", str(out), "--clip", "none", *given]) == 0
            assert "note" not in capsys.readouterr().out
        else:
            assert "which is another model" in ask(*given, store=None, dictionaries=None, code=1)
            assert "in the dtype" in ask(*given, "--dtype", "bfloat16", store=None, dictionaries=None, code=1)


def test_a_file_made_with_other_dictionaries_store_or_model_is_refused(ask: Ask, tmp_path: Path) -> None:
    begin = "images: 0\nedits: zero img_0:1\n"
    for more, said in (
        ("dictionaries: {transcoder_img_0: 0123}", "another transcoder_img_0"),
        ("dictionaries: {}", "another transcoder_img_0"),
        ("store: sha256-0123", "was made with store sha256-0123"),
        ("drawing: {weights_sha256: {transformer: 0123}}", "made with another model: its transformer"),
        ("drawing: {d_model: 3072}", "whose d_model is 3072"),
    ):
        (tmp_path / "e.yaml").write_text(begin + more)
        assert said in ask("--experiment", str(tmp_path / "e.yaml"), code=1)
    (tmp_path / "e.yaml").write_text(begin + "version: 2")
    assert "version 2" in ask("--experiment", str(tmp_path / "e.yaml"), code=1)
    (tmp_path / "e.yaml").write_text("prompts: [a]\nedits: zero img_0:1\n")
    assert "give --store" in ask("--experiment", str(tmp_path / "e.yaml"), store=None)


def test_a_model_that_is_not_the_stores_is_refused_by_its_configuration(ask: Ask, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for part in ("transformer", "vae"):
        (other / part).mkdir(parents=True)
    (other / "model_index.json").write_text("{}")
    config = (TINY_FLUX_FOLDER / "transformer" / "config.json").read_text()
    (other / "transformer" / "config.json").write_text(config.replace('"num_layers": 5', '"num_layers": 6'))
    flags = (*EDIT, "zero img_0:1", "--model")
    assert "num_layers is 6, expected 5" in ask(*flags, str(other), code=1)
    (other / "transformer" / "config.json").write_text("{")
    assert "cannot be read" in ask(*flags, str(other), code=1)
    assert "no FluxPipeline folder" in ask(*flags, str(tmp_path))
    assert "unknown model" in ask(*flags, "nowhere")
    assert "nothing says what draws" in ask("--prompt", "a", "--edit", "zero img_0:1", store=None)
    said = ask("--prompt", "a", "--edit", "zero img_0:1", "--model", "some/model", store=None)
    assert "the sizes of some/model are not known" in said


def test_an_out_that_holds_something_else_is_refused(
    ask: Ask, tmp_path: Path, traced_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, flags = tmp_path / "out", (*EDIT, "zero img_0:1")
    out.write_text("a file")
    assert "is a file" in ask(*flags)
    out.unlink()
    out.mkdir()
    (out / "run.json").write_text('{"format": "granary analysis"}')
    assert "not the record of analyze steer" in ask(*flags, code=1)
    (out / "run.json").unlink()
    (out / "mine.txt").write_text("a file")
    assert "holds no experiment" in ask(*flags)
    assert "lies in the store" in ask(*flags, "--out", str(traced_flux / "store" / "inside"))


def test_an_out_of_another_experiment_is_refused_and_says_how_they_differ(ask: Ask, tmp_path: Path) -> None:
    from analyze.steering.resolving import resolve
    from analyze.steering.results import Results, record_of
    from analyze.steering.settings import SteerSettings

    def claimed(**changes: Any) -> None:
        experiment = resolve(SteerSettings(out=tmp_path / "out", **changes)).experiment
        Results(tmp_path / "out", experiment).claim(record_of(experiment, "cpu"))

    given = {"store": None, "model": "tiny-flux", "prompt": ("a red ring",), "off": ("txt 0",)}
    claimed(**given)
    same = ("--model", "tiny-flux", "--prompt", "a red ring", "--off", "txt 0", "--device", "cpu")
    options: dict[str, Any] = {"store": None, "dictionaries": None}
    assert "another experiment (its name: txt 0 off, now txt 1 off)" in ask(
        *same[:-4], "--off", "txt 1", "--device", "cpu", **options
    )
    assert "its batch size: 8, now 4" in ask(*same, "--batch-size", "4", **options)
    assert "its shots" in ask(*same, "--seeds", "1", **options)
    assert "its judge: all, now colour" in ask(*same, "--judge", "colour", **options)
    assert "choose another --out" in ask(*same, "--batch-size", "4", **options)
    record = tmp_path / "out" / "run.json"
    record.write_text(record.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert "begun with another device: cuda, now cpu" in ask(*same, **options)
