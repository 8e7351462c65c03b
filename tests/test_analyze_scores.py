"""Score matrices and feature tables against a slow reading of the same store, and their bytes."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from analyze.inputs import Subject, open_analysis
from analyze.scoring import scores
from analyze.scoring.matrices import ScoreMatrix, ScoreWriter
from analyze.scoring.settings import ScoresSettings
from analyze.scoring.top import TopImages, prompt_groups
from analyze.settings import Inputs
from store import Site, Store
from store.errors import NonFiniteError
from store.format import StreamTokens
from store.tokens import image_policy
from tests.analyze_planted import Plan, planted_dictionaries, planted_store, reading_dictionary
from train.dictionaries.checkpoint import save_dictionary


def run_scores(folder: Path, plan: Plan, out: str = "out", **options: object) -> tuple[Store, Path]:
    """A planted store under `folder`, its dictionaries and its scores."""
    store = planted_store(folder / "store", plan) if not (folder / "store").exists() else None
    if store is not None:
        planted_dictionaries(folder / "dictionaries", plan)
    where = {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / out}
    scores.run(ScoresSettings(**where, **options))  # type: ignore[arg-type]
    return open_analysis(Inputs(**where)).store, folder / out


def slow(store: Store, subject: Subject, step: int, padding: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S, its first token, and z of every counted row, token by token in float64."""
    weight, bias = (
        p.detach().numpy().astype(np.float64)
        for p in (subject.dictionary.encoder.weight, subject.dictionary.encoder.bias)
    )
    lengths = store.prompts()["text_length"].to_pylist()
    best = np.zeros((store.n_images, len(bias)))
    token = np.full((store.n_images, len(bias)), -1)
    rows = []
    x = store.read(subject.site, step, subject.point).astype(np.float64)
    positions = store.tokens(subject.site.stream, step)
    for image in range(store.n_images):
        first = True
        for slot, position in enumerate(positions[image]):
            if position < 0 or (subject.site.stream == "txt" and not padding and position >= lengths[image]):
                continue
            z = np.maximum(weight @ x[image, slot] + bias, 0)
            rows.append(z)
            better = (z > best[image]) | first
            best[image], token[image] = np.where(better, z, best[image]), np.where(better, position, token[image])
            first = False
    return best, token, np.asarray(rows)


REAL = StreamTokens("real+2", 16, 24)
PLANS = {
    "all tokens": (Plan(n_images=13, chunk_images=4), {}),
    "padding too": (Plan(n_images=9, chunk_images=4), {"padding": True}),
    "sampled tokens": (
        Plan(n_images=11, chunk_images=4, tokens={"img": image_policy("7", 54), "txt": REAL}, store_dtype="float32"),
        {},
    ),
    "sampled with padding": (Plan(n_images=5, chunk_images=4, tokens={"txt": REAL}), {"padding": True}),
}


@pytest.mark.parametrize("name", PLANS)
def test_scores_equal_a_slow_reading_of_the_store(tmp_path: Path, name: str) -> None:
    plan, options = PLANS[name]
    store, out = run_scores(tmp_path, plan, **options)
    analysis = open_analysis(Inputs(store=tmp_path / "store", dictionaries=tmp_path / "dictionaries", out=out))
    for subject in analysis.subjects:
        for step in analysis.steps:
            best, token, rows = slow(store, subject, step, options.get("padding", False))
            matrix = analysis.matrix(subject, step)
            np.testing.assert_allclose(matrix.scores(), best, atol=1e-5)
            clear = best > 0
            assert (matrix.tokens()[clear] == token[clear]).all()
            table = matrix.features()
            np.testing.assert_allclose(table["density"].to_numpy(), (rows > 0).mean(axis=0), atol=1e-3)
            np.testing.assert_allclose(table["image_share"].to_numpy(), (best > 0).mean(axis=0), atol=1e-9)
            active = np.maximum((rows > 0).sum(axis=0), 1)
            np.testing.assert_allclose(table["mean_active"].to_numpy(), rows.sum(axis=0) / active, atol=1e-4)
            np.testing.assert_allclose(table["max"].to_numpy(), best.max(axis=0), atol=1e-5)
            assert table["alive"].to_pylist() == (best > 0).any(axis=0).tolist()


def test_maxima_over_a_sample_say_that_they_are_lower_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = run_scores(tmp_path, PLANS["sampled tokens"][0])
    found = {
        site: dict(zarr.open_group(out / site / "step.0", mode="r").attrs)["lower_bounds"]
        for site in ("img_0", "txt_0")
    }
    assert found == {"img_0": True, "txt_0": False}  # real text tokens are all there
    assert "img: the store keeps a sample of the tokens, so these maxima are lower bounds" in capsys.readouterr().out


def test_a_score_matrix_names_its_parents_and_opens_with_plain_zarr(tmp_path: Path) -> None:
    store, out = run_scores(tmp_path, Plan(n_images=5, steps=1))
    group = zarr.open_group(out / "img_0" / "step.0", mode="r")
    assert group["scores"].dtype == np.float32
    assert group["argmax_token"].dtype == np.int32
    assert group["scores"].shape == (5, 48)
    assert "crc32c" in json.dumps(group["scores"].metadata.to_dict(), default=str)
    attributes = dict(group.attrs)
    assert attributes["store"] == store.id
    assert (attributes["site"], attributes["step"]) == ("img_0", 0)
    assert len(attributes["dictionary"]) == 64


def test_two_runs_give_equal_bytes_and_a_third_computes_nothing(tmp_path: Path) -> None:
    plan = Plan(n_images=13, chunk_images=4)
    _, first = run_scores(tmp_path, plan)
    _, second = run_scores(tmp_path, plan, out="again")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    settings = ScoresSettings(store=tmp_path / "store", dictionaries=tmp_path / "dictionaries", out=first)
    assert scores.run(settings).computed == 0


def test_a_run_that_dies_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScoreWriter, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            run_scores(tmp_path, Plan(n_images=5))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "images.parquet", "unfinished"}
    run_scores(tmp_path, Plan(n_images=5))
    assert not (tmp_path / "out" / "unfinished").exists()
    assert (tmp_path / "out" / "img_0" / "step.0" / "features.parquet").exists()


def test_two_dictionaries_of_a_site_are_told_apart_by_their_kind(tmp_path: Path) -> None:
    planted_store(tmp_path / "store", Plan(n_images=5, sites=("img_0",), steps=1))
    for kind in ("transcoder", "sae"):
        dictionary = reading_dictionary("img_0", kind=kind)
        save_dictionary(tmp_path / "dictionaries" / dictionary.name, dictionary, None, [])
    scores.run(ScoresSettings(store=tmp_path / "store", dictionaries=tmp_path / "dictionaries", out=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"transcoder_img_0", "sae_img_0"}
    matrix = ScoreMatrix.open(tmp_path / "out" / "sae_img_0" / "step.0")
    analysis = open_analysis(
        Inputs(store=tmp_path / "store", dictionaries=tmp_path / "dictionaries", out=tmp_path / "out")
    )
    sae = next(subject for subject in analysis.subjects if subject.name == "sae_img_0")
    assert sae.point == "mlp_out"
    np.testing.assert_allclose(matrix.scores(), slow(analysis.store, sae, 0)[0], atol=1e-5)


def test_an_activation_that_is_nan_is_refused_by_name(tmp_path: Path) -> None:
    planted_store(tmp_path / "store", Plan(n_images=5))
    dictionary = reading_dictionary("img_0")
    dictionary.encoder.bias.data[3] = float("nan")
    save_dictionary(tmp_path / "dictionaries" / dictionary.name, dictionary, None, [])
    with pytest.raises(NonFiniteError, match="transcoder_img_0 gives a NaN"):
        scores.run(
            ScoresSettings(store=tmp_path / "store", dictionaries=tmp_path / "dictionaries", out=tmp_path / "out")
        )
    assert not list((tmp_path / "out").glob("*/step*"))


prompts = st.sampled_from(["a", "A ", "b", "c --ar 16:9", "c"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(prompts, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.data())
def test_top_images_of_any_blocks_have_the_best_scores_and_one_image_a_prompt(
    rows: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    values = np.asarray([row[1:] for row in rows], np.float32)
    tokens = np.arange(2 * len(rows), dtype=np.int32).reshape(-1, 2)
    groups = prompt_groups([prompt for prompt, _, _ in rows])
    k, cuts = data.draw(st.integers(1, 5)), sorted(data.draw(st.sets(st.integers(1, len(rows)))) | {0, len(rows)})
    for of, above in ((None, 0.0), (groups, 0.0), (groups, 1.0)):
        whole, parts = TopImages(2, k, of, above), [TopImages(2, k, of, above) for _ in range(2)]
        for number, (first, last) in enumerate(pairwise(cuts)):
            whole.add(first, values[first:last], tokens[first:last])
            parts[number % 2].add(first, values[first:last], tokens[first:last])
        parts[0].merge(parts[1])
        for feature in range(2):
            order = sorted(range(len(rows)), key=lambda image: (-values[image, feature], image))
            seen: dict[int, int] = {}
            for image in order:
                if values[image, feature] > above:
                    seen.setdefault(image if of is None else int(of[image]), image)
            expected = list(seen.values())[:k]
            for found in (whole, parts[0]):
                images, where, best = (each[:, feature].tolist() for each in found.result())
                empty = [-1] * (k - len(expected))
                assert images == expected + empty
                assert where == tokens[expected, feature].tolist() + empty
                assert best == values[expected, feature].tolist() + empty


def test_the_small_store_of_the_other_tests_can_be_scored(small_store: Callable[..., object], tmp_path: Path) -> None:
    made = small_store(n_images=10)
    for site in ("img_0", "txt_0"):
        dictionary = reading_dictionary(site, d_model=16, n_features=8)
        save_dictionary(tmp_path / "dictionaries" / dictionary.name, dictionary, None, [])
    summary = scores.run(ScoresSettings(store=made.path, dictionaries=tmp_path / "dictionaries", out=tmp_path / "out"))  # type: ignore[attr-defined]
    assert summary.computed == 4
    assert Site.parse("img_0") in made.store.sites  # type: ignore[attr-defined]
