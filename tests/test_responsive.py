"""`analyze responsive`: candidates from the band that was asked for, drawn, measured and ordered by their response."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
from PIL import Image

from analyze.pictures.drawing import GAP, MARGIN
from analyze.responsive import command, question
from analyze.responsive.candidates import best_images, candidates_of, evenly
from analyze.responsive.command import Responsive, run
from analyze.responsive.concept import Concepts
from analyze.responsive.responses import pushes, response_of
from analyze.responsive.settings import ResponsiveSettings
from analyze.scoring import scores
from analyze.scoring.matrices import ScoreMatrix, step_folder
from analyze.scoring.settings import ScoresSettings
from analyze.steering.collages import CLOSE, LABEL_WIDTH
from analyze.steering.resolving import resolve
from analyze.steering.settings import SteerSettings
from store import open_store
from store.errors import UsageError

SITE = "img_1"
Settings = Callable[..., ResponsiveSettings]


@pytest.fixture(scope="module")
def scored(traced_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of two sites over three images of tiny-flux."""
    out = tmp_path_factory.mktemp("scored") / "analysis"
    inputs = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries", "out": out}
    scores.run(ScoresSettings(**inputs, sites=f"{SITE},txt_1", workers=1, top=3))
    return out


@pytest.fixture(scope="module")
def settings_of(traced_flux: Path, scored: Path) -> Settings:
    """Settings for those scores, of an all-embracing band; what is given changes them."""

    def make(**changes: Any) -> ResponsiveSettings:
        about: dict[str, Any] = {
            "store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries", "out": scored,
            "features": (f"{SITE}:{alive(scored)[0]}",), "low": 0.0, "high": 100.0, "candidates": 3, "best": 2,
        }  # fmt: skip
        return ResponsiveSettings(**{**about, **changes})

    return make


def alive(out: Path, count: int = 2) -> list[int]:
    """Features that are active on all images, the strongest first."""
    lowest = ScoreMatrix.open(step_folder(out, SITE, 0)).scores().min(0)
    return [int(feature) for feature in np.argsort(-lowest)[:count]]


@pytest.fixture(scope="module")
def done(settings_of: Settings, scored: Path) -> Responsive:
    """A run over two features and two strengths."""
    return run(two_of(settings_of, scored))


def test_candidates_are_the_images_between_the_percentiles_one_a_prompt() -> None:
    values = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], np.float32)
    prompts = [f"prompt {number}" for number in range(11)]
    found = candidates_of(values, prompts, 70.0, 95.0, 16)
    assert [candidate.image for candidate in found] == [8, 9, 10]  # of ten active: the percentiles 75, 85 and 95
    assert [candidate.percentile for candidate in found] == [75, 85, 95]
    assert [candidate.score for candidate in found] == [8, 9, 10]
    prompts[9] = prompts[8]
    assert [candidate.image for candidate in candidates_of(values, prompts, 70.0, 95.0, 16)] == [8, 10]
    assert [candidate.image for candidate in candidates_of(values, prompts, 0.0, 100.0, 3)] == [2, 5, 8]
    assert len(candidates_of(values, prompts, 0.0, 100.0, 16, active_above=6.0)) == 3  # 7, 8 and 10


def test_places_are_spread_evenly() -> None:
    assert evenly(10, 3) == [1, 5, 8] and evenly(3, 5) == [0, 1, 2] and evenly(4, 4) == [0, 1, 2, 3]
    assert best_images(np.array([1.0, 5, 0, 5, 3], np.float32), list("abcbd"), 3) == [1, 4, 0]


def test_a_band_without_images_says_how_to_widen_it() -> None:
    prompts = ["a", "b", "c"]
    with pytest.raises(UsageError, match="active on none of the 3 images"):
        candidates_of(np.zeros(3, np.float32), prompts, 70.0, 95.0, 4)
    with pytest.raises(UsageError, match="active on 1 image, and none lies between the percentiles 70 and 95"):
        candidates_of(np.array([0, 0, 1], np.float32), prompts, 70.0, 95.0, 4)


def test_the_table_has_a_row_a_candidate_and_strength_ordered_by_response(done: Responsive) -> None:
    table = done.table
    assert done.forwards == 2 * 3 * 3 * 4  # features, images, plain and two strengths, steps
    assert len(table) == 2 * 3 * 2 and table["intervention"].to_pylist()[:2] == ["amplify:0", "amplify:8"]
    for name in set(zip(table["dictionary"].to_pylist(), table["feature"].to_pylist(), strict=True)):
        mine = table.filter(pa.compute.equal(table["feature"], name[1]))
        assert mine["rank"].to_pylist() == [1, 1, 2, 2, 3, 3] and len(set(mine["image"].to_pylist())) == 3
        response = mine["response"].to_pylist()
        assert response == sorted(response, reverse=True)
        pairs = np.reshape(mine["latent_mse"].to_pylist(), (3, 2))
        assert np.allclose(pairs.mean(1), response[::2]) and (pairs > 0).all()
    assert {"psnr", "ssim", "flip", "latent_cosine", "latent_mse", "clip", "concept"} <= set(table.column_names)
    assert pq.read_table(done.folder / "responses.parquet").equals(table)
    assert (done.folder / "responses.csv").read_text().splitlines()[0] == ",".join(table.column_names)


def test_the_picture_of_a_feature_shows_plain_and_changed_ones(done: Responsive) -> None:
    with Image.open(sorted(done.folder.glob("*.png"))[0]) as opened:
        drawn = np.asarray(opened.convert("RGB")).min(2) < 250
    for column in range(3):  # two rows of plain, amplify:0 and amplify:8, each cell twice the picture's 64 pixels
        left = MARGIN + LABEL_WIDTH + GAP + column * (128 + CLOSE)
        assert drawn[:, left : left + 128].sum() > 2 * 128 * 128 * 0.9
    assert not drawn[:, left + 128 + CLOSE :].sum() > 128 * 128  # and no fourth column


def two_of(settings_of: Settings, scored: Path) -> ResponsiveSettings:
    """The settings of `done`."""
    names = f"{SITE}:{','.join(map(str, sorted(alive(scored))))}"
    return settings_of(features=(names,), strengths=(0.0, 8.0), rank="latent_mse", name="two")


def test_a_run_goes_on_with_the_feature_that_is_missing_and_gives_the_same_bytes(
    done: Responsive, settings_of: Settings, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = two_of(settings_of, scored)
    before = {path.name: path.read_bytes() for path in sorted(done.folder.iterdir())}
    assert len(before) == 5 and sum(name.endswith(".png") for name in before) == 2
    record = json.loads(before["run.json"])
    assert record["drawn"]["model"] == "tiny-flux" and record["settings"]["rank"] == "latent_mse"
    assert record["device"] == "cpu" and {"scikit-image", "flip-evaluator"} <= set(record["versions"])
    assert "lpips" in record and record["features"] == [f"{SITE}:{feature}" for feature in sorted(alive(scored))]
    assert not any(str(scored.parent) in data.decode(errors="ignore") for data in before.values())
    about = json.loads((scored.parent / f"{scored.name}.runs" / "responsive-two.json").read_text())
    assert about["forwards"] == 72 and about["seconds"] > 0

    first, _ = sorted(done.folder.glob("*.png"))
    first.unlink()  # as a run that was stopped leaves it
    again = run(settings)
    assert again.forwards == 36 and again.table.equals(done.table)
    assert {path.name: path.read_bytes() for path in sorted(done.folder.iterdir())} == before
    monkeypatch.setattr(command, "open_painter", None)
    assert run(settings).forwards == 0
    assert {path.name: path.read_bytes() for path in sorted(done.folder.iterdir())} == before


def test_what_is_published_of_a_run_that_was_stopped_is_whole(
    done: Responsive, settings_of: Settings, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drawing is that of `done`, read back; the second feature is never drawn."""
    settings = replace(two_of(settings_of, scored), name="stopped")

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(command, "open_painter", lambda *_: None)
    monkeypatch.setattr(command, "respond", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    folder = done.folder.with_name("stopped")
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    first = f"{SITE}.{min(alive(scored))}.png"
    (folder / first).write_bytes((done.folder / first).read_bytes())
    pq.write_table(done.table.slice(0, 6), folder / "responses.parquet")
    asked: list[list[int]] = []

    def counted(_question: Any, searches: Any, *_: Any) -> Any:
        asked.append([search.feature for search in searches])
        return stopped()

    monkeypatch.setattr(command, "respond", counted)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert asked == [[max(alive(scored))]]


def test_another_question_leaves_an_earlier_answer_as_it_is(
    done: Responsive, settings_of: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_painter", None)
    before = {path.name: path.read_bytes() for path in done.folder.iterdir()}
    with pytest.raises(UsageError, match=r"answers another question \(features: .* now .*\): choose another --name"):
        run(settings_of(strengths=(2.0,), name="two"))
    assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == before


def test_the_record_says_a_masks_tokens_and_not_where_its_file_lies(settings_of: Settings, scored: Path) -> None:
    mask = scored.parent / "mask.png"
    Image.new("L", (8, 8), 255).save(mask)
    made = command.record(question.ask(settings_of(tokens=f"mask:{mask}")), None)
    assert made["settings"]["tokens"] == "0-63" and str(mask) not in json.dumps(made)


@pytest.mark.slow  # of a painter test_steer shows it
def test_a_change_that_changes_nothing_leaves_every_bit(settings_of: Settings) -> None:
    found = run(settings_of(mode="add", strengths=(1e-30,), name="still", rank="flip", best=1)).table
    assert found["latent_mse"].to_pylist() == [0, 0, 0] and found["psnr"].to_pylist() == [np.inf] * 3
    assert found["image"].to_pylist() == [0, 1, 2]  # equal responses stand in the order of the images


def test_the_command_that_it_names_next_is_one_that_steer_takes(
    done: Responsive, settings_of: Settings, tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {"strengths": (1.23456789,), "tokens": "3,7-9", "at_steps": "2-3", "method": "replacement"},
        {"mode": "set", "unit": "peak", "strengths": (0.5,), "batch_size": 3, "dtype": "bfloat16", "device": "cpu"},
    ]
    for change in changes:
        asked = question.ask(settings_of(**change))
        answer = replace(done, table=pa.table({"image": [2, 0, 1]}))
        line = command._closing(asked, answer).partition("next: python -m analyze ")[2]
        words = shlex.split(line)
        words[words.index("O")] = str(tmp_path / "O")
        assert words[0] == "steer"
        found = resolve(tyro.cli(SteerSettings, args=words[1:])).experiment
        (wanted,) = asked.searches[0].interventions
        (made,) = (variant.intervention for variant in found.variants)
        assert (made.edits, made.method) == (wanted.edits, wanted.method)
        assert (found.batch_size, found.canvas.dtype) == (asked.batch_size, asked.canvas.dtype)
        assert bool(found.peaks) == ("unit" in change)


def test_a_plan_counts_and_draws_nothing(
    settings_of: Settings, scored: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_painter", None)
    planned = run(settings_of(plan=True, name="planned", strengths=(2.0, 4.0)))
    assert planned.forwards == 0 and len(planned.table) == 0 and not (scored / "responsive" / "planned").exists()
    said = capsys.readouterr().out
    assert (
        "RUNS tiny-flux, 36 transformer runs (4 steps a picture)" in said and "plain and amplify:2, amplify:4" in said
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": ("img_1:9999",)}, "there is no feature of img_1 9999"),
        ({"features": ("img_1",)}, "write a site and features"),
        ({"features": ("img_2:3",)}, "there are no scores"),
        ({"features": ("sae_img_1:3",)}, "no dictionary sae_img_1 is analyzed"),
        ({"at_steps": "7"}, "there is no step 7"),
        ({"tokens": "99"}, "has no token 99"),
        ({"rank": "lpips"}, "takes the package lpips"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"clip": "/nowhere"}, "there is no such folder"),
        ({"strengths": (float("nan"),)}, "a strength is a finite number"),
        ({"strengths": ()}, "name one or several"),
        ({"strengths": (1.0,)}, "--mode amplify --strengths 1 changes nothing"),
        ({"mode": "zero", "strengths": (2.0,)}, "zero takes no strength"),
        ({"unit": "peak"}, "only set and add count in peaks"),
        ({"low": 95.0, "high": 70.0}, "percentiles with 0 <= low < high <= 100"),
        ({"low": float("nan")}, "percentiles with"),
        ({"features": ()}, "--features names none"),
        ({"name": "../x"}, "a folder name"),
        ({"candidates": 0}, "each is at least 1"),
        ({"tokens": "above:2"}, "share of the maximum"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    settings_of: Settings, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_painter", None)
    with pytest.raises(UsageError, match=said):
        run(settings_of(**changes))


def test_a_dead_feature_and_a_folder_of_others_are_refused(
    settings_of: Settings, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as dead, pytest.raises(UsageError, match=f"{SITE}/7 is active on none of the 3 images"):
        dead.setattr(question, "scores_of", lambda *_: np.zeros(3, np.float32))
        run(settings_of(features=(f"{SITE}:7",)))
    (scored / "responsive" / "others").mkdir(parents=True, exist_ok=True)
    (scored / "responsive" / "others" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        run(settings_of(name="others"))


def test_the_response_counts_towards_what_the_intervention_asks_for(settings_of: Settings) -> None:
    values = {
        "psnr": np.array([[20.0, np.inf, 9]]), "ssim": np.array([[0.9, 1.0, 0.5]]), "concept": np.array([[0.2, -0.1, 0.3]])
    }  # fmt: skip
    more, less = (question.ask(settings_of(strengths=(strength,))).searches[0] for strength in (4.0, 0.0))
    assert (pushes(more, 0).tolist(), pushes(less, 0).tolist()) == ([1] * 3, [-1] * 3)
    assert response_of(values, "psnr", more).tolist() == [-20, -np.inf, -9]
    assert response_of(values, "ssim", more) == pytest.approx([0.1, 0, 0.5])
    assert response_of(values, "concept", more) == pytest.approx([0.2, -0.1, 0.3])
    assert response_of(values, "concept", less) == pytest.approx([-0.2, 0.1, -0.3])


def test_a_feature_that_is_set_below_what_it_was_is_taken_from(settings_of: Settings) -> None:
    (search,) = question.ask(settings_of(mode="set", strengths=(1.0,))).searches
    low, middle, high = (candidate.score for candidate in search.candidates)
    assert low < middle < high
    (edit,) = search.interventions[0].edits
    between = replace(edit, strength=(low + middle) / 2)
    search = replace(search, interventions=(replace(search.interventions[0], edits=(between,)),))
    assert pushes(search, 0).tolist() == [1, -1, -1]
    (search,) = question.ask(settings_of(mode="set", unit="peak", strengths=(0.999,))).searches
    assert search.peak == pytest.approx(high) and pushes(search, 0).tolist() == [1, 1, -1]


def test_a_concept_points_from_all_pictures_towards_the_best(traced_flux: Path) -> None:
    from analyze.features.clip import clip_for, load_clip
    from analyze.steering.distances import unit_embeddings

    store = open_store(traced_flux / "store")
    clip = load_clip(clip_for(store, None))
    pictures = [picture for image in range(3) if (picture := store.picture(image)) is not None]
    embedded = unit_embeddings(clip, pictures)
    wanted = embedded[1] - embedded.mean(0)
    concepts = Concepts(store, clip)
    direction = concepts.direction([1])
    assert direction == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-6)
    change = concepts.changes(direction, [pictures[0]], [pictures[1]])
    assert change == pytest.approx([(embedded[1] - embedded[0]) @ direction], abs=1e-6) and change[0] > 0
