"""`analyze explore` without a browser: rows and files, the catalogue, what is refused, and how the server begins and ends."""

import os
import re
import signal
import socket
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analyze.explore import command
from analyze.explore.catalogue import Catalogue, open_catalogue
from analyze.explore.command import Served, run
from analyze.explore.desk import Desk, range_of
from analyze.explore.files import experiment_bytes
from analyze.explore.files import load as load_file
from analyze.explore.rows import EditRow, intervention_of, off_text, rows_of
from analyze.explore.serving import listening
from analyze.explore.settings import ExploreSettings
from analyze.explore.steer_tab import with_feature
from analyze.explore.studio import Studio, load, prepare
from analyze.steering.command import run as steer
from analyze.steering.drawing import Shot
from analyze.steering.edits import MODES, Intervention, Mode
from analyze.steering.settings import SteerSettings
from store.command import Command, program
from store.errors import MismatchError, UsageError
from tests.small_explore import explore_settings
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary

pytest.importorskip("gradio")
PROGRAM = {"explore": Command(ExploreSettings, "analyze.explore.command:run", "")}


@pytest.fixture(scope="module")
def settings(traced_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> ExploreSettings:
    """Of a page with everything, on any free port."""
    return replace(explore_settings(traced_flux, tmp_path_factory.mktemp("explore")), out=None)


@pytest.fixture(scope="module")
def catalogue(settings: ExploreSettings) -> Catalogue:
    """The features of the analysis."""
    found = open_catalogue(settings)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def studio(settings: ExploreSettings, catalogue: Catalogue) -> Studio:
    """The model, loaded once."""
    return load(prepare(settings), settings, catalogue.analysis.subjects)


@pytest.fixture
def desk(studio: Studio, settings: ExploreSettings, tmp_path: Path) -> Desk:
    """What the page can do; saves below `tmp_path`."""
    return Desk(studio, replace(settings, out=tmp_path / "out"), tmp_path / "temporary")


def made(desk: Desk, *rows: EditRow, off: str = "") -> Intervention:
    """What rows ask for, by the method of the default."""
    return desk.intervention("made", rows, "difference", off)


def test_rows_and_interventions_say_the_same(desk: Desk) -> None:
    rows = [
        EditRow("img_0:3,4+txt_1:5", "amplify", 2.5, "above:0.5", "1-2"),
        EditRow("img_2:7", "set", 0.5, "3,7-9", "all", "peak"),
        EditRow("txt_2:1", "zero", 1.0),
        EditRow("img_1:8", "add", -40.0),
    ]
    found = made(desk, *rows, off="txt 0-1 @steps=0; img 2 @parts=mlp,attn")
    assert rows_of(found, desk.studio.shelf.outlines) == rows
    assert off_text(found.off) == "txt 0-1 @steps=0; img 2 @parts=mlp,attn"
    assert made(desk, EditRow(), *rows, EditRow("  ")).edits == found.edits, "rows without features ask for nothing"


@pytest.mark.parametrize("mode", MODES)
def test_every_slider_reaches_what_it_begins_with_and_what_a_file_says(mode: Mode) -> None:
    for unit in ("peak", "absolute"):
        usual, far = range_of(mode, unit), range_of(mode, unit, 1234.5)
        assert usual.low <= 1 <= usual.high and far.high == 1234.5


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (EditRow("img_2"), "row 2: 'img_2' names no feature: write img_3:66"),
        (EditRow("img_9:1"), "row 2: there is no dictionary of img_9; there are img_0-2, txt_0-2"),
        (EditRow("img_2:1", "amplify", float("nan")), "row 2.*no finite number"),
        (EditRow("img_2:1", tokens="above:2"), "row 2.*must lie above 0 and be at most 1"),
        (EditRow("img_2:1", steps="1-x"), "row 2"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(desk: Desk, row: EditRow, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        made(desk, EditRow("img_2:1"), row)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (EditRow("img_2:96"), "has no feature 96; it has 96, 0 to 95"),
        (EditRow("img_2:1", steps="4"), "there is no step 4"),
        (EditRow("txt_2:1", tokens="16"), "txt has no token 16"),
        (EditRow("img_0:1", "set", 1.0, unit="peak"), "no analysis says what they are"),
    ],
)
def test_what_the_model_has_not_is_refused_before_anything_is_drawn(desk: Desk, row: EditRow, told: str) -> None:
    before = desk.studio.forwards
    with pytest.raises(UsageError, match=told):
        desk.draw(Shot("a red circle", 1), made(desk, row))
    assert desk.studio.forwards == before


def test_where_a_site_has_two_dictionaries_the_row_says_which(desk: Desk) -> None:
    outlines = dict(desk.studio.shelf.outlines)
    sae = transcoder("img_2", kind="sae", time_embed_dim=None)
    outlines[sae.site, "sae"] = sae
    with pytest.raises(UsageError, match="write transcoder_img_2:… or sae_img_2:…"):
        intervention_of("", [EditRow("img_2:1")], "difference", "", 5, outlines)
    row = EditRow("sae_img_2:1", "amplify")
    found = intervention_of("", [row], "difference", "", 5, outlines)
    assert found.edits[0].kind == "sae" and rows_of(found, outlines) == [row]
    with pytest.raises(UsageError, match="give each kind a row of its own"):
        intervention_of("", [EditRow("sae_img_2:1+img_0:1")], "difference", "", 5, outlines)


def test_a_found_feature_goes_into_the_first_row_without_one() -> None:
    full, free = EditRow("img_0:1"), EditRow()
    assert [row.features for row in with_feature([full, free, full], "img_2:5", "peak")] == [
        "img_0:1",
        "img_2:5",
        "img_0:1",
    ]
    assert len(with_feature([full], "img_2:5", "peak")) == 2
    with pytest.raises(UsageError, match="all 6 rows have features"):
        with_feature([full] * 6, "img_2:5", "peak")


def test_a_search_finds_words_of_prompts_tokens_and_numbers(catalogue: Catalogue) -> None:
    listing = catalogue.listing("txt_2", 3)
    everything, total = listing.found("", "match", 1000)
    assert total == len(everything) == int((listing.columns.images_active > 0).sum())
    assert [entry.feature for entry in listing.found("17", "match", 5)[0]] == [17]
    assert listing.found("96", "match", 5) == ([], 0) and listing.found("zebra", "match", 5) == ([], 0)
    word = listing.prompts[0].split()[1]
    for entry in listing.found(word.upper(), "match", 1000)[0]:
        shown = [listing.prompts[image] for image in listing.columns.images[entry.feature] if image >= 0]
        assert any(f" {word}" in f" {text}" for text in [*shown, *(word.lower() for word in entry.words)])
    strongest = [entry.numbers["max"] for entry in listing.found("", "max", 1000)[0]]
    assert strongest == sorted(strongest, reverse=True)
    assert [entry.feature for entry in listing.found("", "number", 1000)[0]] == sorted(e.feature for e in everything)


def test_what_is_saved_is_drawn_again_byte_for_byte_by_steer(desk: Desk, tmp_path: Path) -> None:
    shot = desk.first
    assert shot.image == 0
    rows = EditRow("img_2:3,4", "add", 2.0, unit="peak"), EditRow("txt_1:5", "amplify", 3.0, "above:0.5", "1-3")
    intervention = made(desk, *rows, off="txt 0 @steps=0")
    seen = desk.studio.draw(shot, intervention)
    assert seen.distances["psnr"] < 60, "the intervention changed nothing that could be seen"
    path, text = desk.keep("my try", shot, intervention)
    assert desk.settings.out is not None and (desk.settings.out / "my-try.yaml").read_bytes() == path.read_bytes()
    assert "analyze steer --experiment" in text
    where = {"store": desk.settings.store, "dictionaries": desk.settings.dictionaries}
    for out in ("once", "twice"):
        steer(SteerSettings(experiment=path, **where, out=tmp_path / out))
    pictures = sorted((tmp_path / "once" / "pictures").rglob("*.png"))
    assert len(pictures) == 2
    for picture, shown in zip(pictures, (seen.plain, seen.changed), strict=True):
        assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), np.asarray(shown.convert("RGB"))), picture
        assert picture.read_bytes() == (tmp_path / "twice" / picture.relative_to(tmp_path / "once")).read_bytes()
    assert experiment_bytes(desk.studio, shot, intervention) == experiment_bytes(desk.studio, shot, intervention)
    found = load_file(path, desk.studio, desk.settings)
    assert (found.shot, found.rows, found.off, found.notes) == (shot, list(rows), "txt 0 @steps=0", [])


def test_plain_pictures_are_drawn_once_and_are_those_of_the_store(desk: Desk) -> None:
    shot, nothing = Shot("a small red circle at the top", 11), made(desk)
    first = desk.studio.draw(shot, nothing)
    again = desk.studio.draw(shot, made(desk, EditRow("img_2:3", "zero")))
    assert (first.forwards, again.forwards) == (8, 4)
    assert first.distances["psnr"] == np.inf and first.plain == first.changed == again.plain
    stored = desk.studio.draw(desk.first, nothing).plain
    difference = np.asarray(stored, int) - np.asarray(desk.studio.store.picture(0).convert("RGB"), int)  # type: ignore[union-attr]
    assert np.abs(difference).max() <= 1, "the store was drawn in batches of two: only last digits may differ"


def test_saving_refuses_nothing_a_bad_name_and_a_name_that_is_taken(desk: Desk) -> None:
    with pytest.raises(UsageError, match="nothing to save yet"):
        desk.keep("x", desk.first, made(desk))
    with pytest.raises(UsageError, match="no name for a file"):
        desk.keep("../x", desk.first, made(desk, EditRow("img_2:3")))
    desk.keep("x", desk.first, made(desk, EditRow("img_2:3", "zero")))
    desk.keep("x", desk.first, made(desk, EditRow("img_2:3", "zero")))
    with pytest.raises(UsageError, match="holds another experiment"):
        desk.keep("x", desk.first, made(desk, EditRow("img_2:4", "zero")))
    assert desk.saved == 2


def test_a_file_of_other_peaks_or_other_steps_is_not_opened(desk: Desk, tmp_path: Path) -> None:
    path, _ = desk.keep("x", desk.first, made(desk, EditRow("img_2:3", "set", 1.0, unit="peak")))
    text = path.read_text()
    (tmp_path / "steps.yaml").write_text(text.replace("num_inference_steps: 4", "num_inference_steps: 5"))
    with pytest.raises(MismatchError, match="other sizes, steps or guidance"):
        load_file(tmp_path / "steps.yaml", desk.studio, desk.settings)
    peak = next(line for line in text.splitlines() if line.startswith("peaks:"))
    (tmp_path / "peaks.yaml").write_text(text.replace(peak, "peaks: {transcoder_img_2: {3: 123.5}}"))
    with pytest.raises(MismatchError, match="peaks of another analysis"):
        load_file(tmp_path / "peaks.yaml", desk.studio, desk.settings)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the model is a failure."""
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the model was loaded"))


@pytest.mark.usefixtures("no_model")
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    settings: ExploreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is taken.*--port 0"):
            run(replace(settings, port=port))
    with pytest.raises(UsageError, match="is no address of this machine"):
        run(replace(settings, host="no.such.host.invalid"))
    with pytest.raises(UsageError, match="holds no analysis"):
        run(replace(settings, analysis=tmp_path))
    with pytest.raises(UsageError, match="holds no graphs"):
        run(replace(settings, graphs=tmp_path))
    other = transcoder("img_0", d_model=64)
    save_dictionary(tmp_path / "other" / other.name, other, None, [])
    with pytest.raises(MismatchError, match="has d_model 64"):
        run(replace(settings, dictionaries=tmp_path / "other", analysis=None))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UsageError, match="needs gradio, which is not installed here: pip install gradio"):
        run(settings)


@pytest.mark.parametrize("flags", [["--port", "70000"], ["--prompt", " "], ["--seed", "-1"]])
def test_wrong_flags_are_one_message(
    settings: ExploreSettings, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--store", str(settings.store), "--dictionaries", str(settings.dictionaries)]
    assert program("analyze", PROGRAM, ["explore", *where, *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flags[0]} is ") and said.count("\n") == 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, studio: Studio) -> None:
    """The model that is loaded already stands for one that would be."""
    monkeypatch.setattr(command, "load", lambda *_: replace(studio, drawn=0))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_ends_it_cleanly_and_leaves_nothing_behind(
    settings: ExploreSettings,
    sent: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before, seen = dict(os.environ), []
    monkeypatch.setattr(Served, "run", _interrupted_after_a_look(Served.run, sent, seen))
    store = Path(settings.store)
    files = {path: path.stat().st_mtime_ns for path in store.parent.rglob("*")}
    where = {"store": settings.store, "dictionaries": settings.dictionaries, "analysis": settings.analysis, "port": 0}
    assert (
        program(
            "analyze",
            PROGRAM,
            ["explore", *(word for key, value in where.items() for word in (f"--{key}", str(value)))],
        )
        == 0
    )
    assert seen == [200, 403], "the page is there, and other files of the machine are not"
    said = capsys.readouterr()
    assert re.match(
        r"explore: 0 pictures drawn in \d+ runs of the transformer, 0 experiments saved$", said.out.splitlines()[-1]
    )
    assert "Traceback" not in said.err
    assert not list((tmp_path / "temporary").iterdir()) and not list((tmp_path / "here").iterdir())
    assert {path: path.stat().st_mtime_ns for path in store.parent.rglob("*")} == files
    assert dict(os.environ) == before
    port = int(said.out.split("127.0.0.1:")[1].split("/")[0])
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def _interrupted_after_a_look(serve: Any, sent: int, seen: list[int]) -> Any:
    """`serve`, to which the signal is sent once the page has answered and another file was asked for in vain."""

    def look(served: Served) -> None:
        for address in (served.address, f"{served.address}gradio_api/file=/etc/hostname"):
            try:
                with urllib.request.urlopen(address, timeout=20) as answer:
                    seen.append(answer.status)
            except urllib.error.HTTPError as error:
                seen.append(error.code)
                error.close()
        os.kill(os.getpid(), sent)

    def run_it(served: Served) -> None:
        looking = threading.Thread(target=look, args=(served,))
        looking.start()
        serve(served)
        looking.join()

    return run_it


def test_a_picture_that_is_being_drawn_is_given_up_when_the_program_ends(studio: Studio) -> None:
    stopping, before = replace(studio, stopping=True), studio.forwards
    with pytest.raises(Exception, match="this picture was given up"):
        stopping.draw(Shot("a large blue square", 5), Intervention("none"))
    assert studio.forwards == before + 1, "after one step, not four"


@pytest.fixture(autouse=True)
def _quiet_gradio() -> Iterator[None]:
    """Warnings of gradio's own dependencies are none of ours."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(gradio|starlette|uvicorn|websockets|httpx)(\..*)?")
        yield
