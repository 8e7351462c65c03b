"""The pass over a store against a slow one in NumPy, exactly, on small whole numbers, so that ties abound.

Where bytes are compared activations and weights are random floats, so that the order of a sum can be seen in its last bit.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from analyze.inputs import open_analysis
from analyze.scoring import scores
from analyze.scoring.matrices import ScoreMatrix
from analyze.scoring.reduction import Pane, maxima, row_blocks
from analyze.scoring.settings import ScoresSettings
from store.errors import DamagedError, NonFiniteError, UsageError
from store.format import StreamTokens
from tests.small_scoring import (
    ACTIVATIONS,
    FEATURES,
    options_of,
    rough_dictionary,
    slow,
    small_pieces,
    whole_dictionary,
    whole_store,
)
from train.dictionaries.checkpoint import save_dictionary

TEXT = {"all": StreamTokens("all", 8, 8), "real": StreamTokens("real+0", 8, 8), "real+2": StreamTokens("real+2", 8, 8)}


@settings(
    max_examples=3,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**16), n_images=st.integers(1, 11), sampled=st.booleans(), text=st.sampled_from(sorted(TEXT)),
    activation=st.sampled_from(ACTIVATIONS), difract_on_images=st.booleans(), padding=st.booleans(),
    above=st.sampled_from([0.0, 1.5, 2.0]), top=st.integers(1, 6), workers=st.integers(1, 2),
    dtype=st.sampled_from(["float32", "bfloat16"]), lengths=st.lists(st.integers(0, 8), min_size=11, max_size=11),
)  # fmt: skip
@example(
    seed=0, n_images=11, sampled=False, text="all", activation="jumprelu", difract_on_images=False, padding=False, above=0.0, top=4,
    workers=1, dtype="float32", lengths=[0, 0, 0, 0, 2, 1, 3, 2, 4, 5, 3],
)  # fmt: skip
def test_every_figure_equals_a_slow_reading_of_the_store(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n_images: int, sampled: bool, text: str, activation: str,
    difract_on_images: bool, padding: bool, above: float, top: int, workers: int, dtype: Any, lengths: list[int],
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("scores")
    images = StreamTokens("sample", 5, 12) if sampled else StreamTokens("all", 12, 12)
    whole_store(folder / "s", seed, n_images, lengths, store_dtype=dtype, image_tokens=images, text_tokens=TEXT[text])
    sites = ("img_0", "txt_0") if difract_on_images else ("txt_0", "img_0")
    difract = whole_dictionary(
        sites[0], seed, activation=activation, time_embed_dim=8, **({"k": 3} if "topk" in activation else {})
    )
    kind = {"activation": "topk", "k": 3} if activation == "relu" else {"activation": "relu"}
    flux = whole_dictionary(sites[1], seed + 1, "sae", family="flux-sae", **kind)
    for dictionary in (difract, flux):
        save_dictionary(folder / "d" / dictionary.name, dictionary, None, [])
    options = ScoresSettings(
        store=folder / "s", dictionaries=folder / "d", out=folder / "out", padding=padding, active_above=above, top=top, workers=workers
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        scores.run(options)
    analysis = open_analysis(options)
    for subject in analysis.subjects:
        for step in analysis.steps:
            expected, matrix = slow(analysis.store, subject, step, options), analysis.matrix(subject, step)
            assert (matrix.scores() == expected.scores).all()
            assert not np.signbit(matrix.scores()).any()
            assert (matrix.tokens() == expected.tokens).all()
            table = matrix.features().to_pydict()
            assert set(table) - set(expected.table) == {"feature", "density_category", "image_category"}
            for name, values in expected.table.items():
                if name in ("mean_active", "deviation_active", "interest"):
                    np.testing.assert_allclose(table[name], values, rtol=1e-6, atol=1e-9, err_msg=name)
                else:
                    assert table[name] == values, name


def test_float16_halves_the_scores_and_refuses_what_it_does_not_hold(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored_small
    small_pieces(monkeypatch)
    scores.run(options_of(folder, tmp_path / "half", dtype="float16"))
    whole, half = (ScoreMatrix.open(place / "sae_txt_0" / "step.0") for place in (folder / "alone", tmp_path / "half"))
    assert zarr.open_array(half.folder / "scores", mode="r").dtype == np.float16
    assert half.scores().dtype == np.float32
    assert (half.scores() == whole.scores().astype(np.float16).astype(np.float32)).all()
    assert (half.tokens() == whole.tokens()).all()
    dictionary = whole_dictionary("txt_0", 1, "sae")
    with torch.no_grad():
        dictionary.encoder.weight.mul_(1e5)
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    with pytest.raises(
        NonFiniteError, match=r"sae_txt_0 reaches \d+.* float16 holds 65504 at most: use --dtype float32"
    ):
        scores.run(replace(options_of(folder, tmp_path / "out", dtype="float16"), dictionaries=tmp_path / "d"))
    with pytest.raises(UsageError, match="holds another run \\(dtype 'float16', now 'float32'\\)"):
        scores.run(options_of(folder, tmp_path / "half"))


def test_with_float16_the_table_says_what_the_matrix_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    whole_store(tmp_path / "s", rough=True, steps=(0,), sites=("txt_0",))
    dictionary = rough_dictionary("txt_0", 1, "sae")
    with torch.no_grad():
        dictionary.encoder.weight[0] *= 1e-9  # below all that float16 holds
        dictionary.encoder.weight[1] *= 1e-7  # so small that many are equal
        dictionary.encoder.bias[:2] = 0
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    scores.run(options_of(tmp_path, "out", dtype="float16", top=11))
    matrix = ScoreMatrix.open(tmp_path / "out/txt_0/step.0")
    found, table = matrix.scores(), matrix.features().to_pydict()
    assert table["rows_active"][0] > 0 and not table["alive"][0]
    assert 0 < len(np.unique(found[:, 1])) < 11
    assert table["images_active"] == (found > 0).sum(axis=0).tolist()
    assert table["max"] == found.max(axis=0).tolist()
    for feature in range(FEATURES):
        best = [i for i in np.lexsort((np.arange(11), -found[:, feature])) if found[i, feature] > 0]
        assert table["top_image"][feature] == best
        assert table["top_score"][feature] == found[best, feature].tolist()


@pytest.mark.parametrize("sizes", [(4, 5, 3), (4, 4, 4), (1, 3, 2, 6), (12,)])
def test_the_maximum_and_its_token_are_found_in_segments_of_any_lengths(sizes: tuple[int, ...]) -> None:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    position = np.arange(12, dtype=np.int32)
    (block,) = row_blocks(owner, position, None, 256)
    assert block.alike == (len(set(sizes)) == 1)
    for row in range(12):  # each has the maximum once
        z = torch.zeros(12, 1)
        z[row] = 9
        sparse, dense = (Pane(len(sizes), 1, 0.0, None, lambda _values: None) for _ in range(2))
        sparse.add(z, block)
        dense._dense(z, block, maxima(z, block))
        for pane in (sparse, dense):
            pane.finish()
            first = np.concatenate(([0], np.cumsum(sizes)[:-1]))
            assert pane.scores[:, 0].tolist() == [9 if image == owner[row] else 0 for image in range(len(sizes))]
            assert pane.tokens[:, 0].tolist() == [row if image == owner[row] else first[image] for image in range(len(sizes))]  # fmt: skip


def test_a_zero_that_jumprelu_leaves_has_no_sign() -> None:
    (block,) = row_blocks(np.zeros(3, np.int64), np.arange(3, dtype=np.int32), None, 256)
    pane = Pane(1, 2, 0.0, None, lambda _values: None)
    pane.add(torch.tensor([[-0.0, -0.0]] * 3), block)
    pane.finish()
    assert not np.signbit(pane.scores).any()


def test_a_missing_chunk_or_a_nan_is_damage_not_a_figure(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, _ = scored_small
    for name in ("scores", "argmax_token"):
        place = tmp_path / name
        shutil.copytree(folder / "alone/sae_txt_0/step.0", place)
        (place / name / "c/1/2").unlink()  # images 4 to 7, features 12 to 17
        matrix = ScoreMatrix.open(place)
        read = matrix.scores if name == "scores" else matrix.tokens
        for features in (12, slice(17, 19), slice(None)):
            with pytest.raises(DamagedError, match=rf"{name} is damaged \(its chunk c/1/2 is missing\): delete"):
                read(features)
        with pytest.raises(DamagedError):
            matrix.images(slice(4, 5))
        assert read(11).shape == (11,) and read(slice(18, 22)).shape == (11, 4)
        matrix.images(slice(8, 11))
    zarr.open_array(tmp_path / "argmax_token/scores", mode="r+")[3, 3] = np.nan
    with pytest.raises(DamagedError, match="scores is damaged \\(it holds NaN\\)"):
        ScoreMatrix.open(tmp_path / "argmax_token").scores()


def test_dense_passes_find_what_the_lists_of_active_entries_find() -> None:
    rng = np.random.default_rng(0)
    z = torch.from_numpy(np.maximum(rng.integers(-3, 4, (40, 12)), 0).astype(np.float32))
    owner = np.repeat([0, 2, 3], [17, 3, 20])
    piece = rng.integers(-1, 5, 40).astype(np.int32)
    for above in (0.0, 1.0):
        for tokens in (np.full(40, 20), owner):  # segments alike, or not
            image = np.repeat([0, 1], 20) if tokens[0] == 20 else owner
            sparse, dense = (Pane(4, 12, above, 3, lambda _values: None) for _ in range(2))
            for block in row_blocks(image, np.arange(40, dtype=np.int32), piece, 20):
                sparse.add(z[block.rows], block)
                dense.rows.rows += block.count
                dense._dense(z[block.rows], block, maxima(z[block.rows], block))
            for name in ("scores", "tokens"):
                assert (getattr(sparse, name) == getattr(dense, name)).all()
            for name in ("rows", "histogram", "total", "squares"):
                assert np.array_equal(getattr(sparse.rows, name), getattr(dense.rows, name))
            assert all(
                np.array_equal(one, other)
                for one, other in zip(sparse.words.result(), dense.words.result(), strict=True)
            )  # type: ignore[union-attr]
