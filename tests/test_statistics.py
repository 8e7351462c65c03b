"""The figures kept with the data are those of NumPy in float64, and the cost of a lossy dtype is what it was measured to be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from harvest import HarvestSettings, run, staging
from harvest.__main__ import COMMANDS
from store import Site, Store, open_store
from store.command import program
from store.format import StreamTokens
from store.info import describe
from store.statistics import Statistics, array_statistics, merged
from tests.small_store import SmallStore, make_store

MakeStore = Callable[..., SmallStore]
IMG, TXT = Site.parse("img_0"), Site.parse("txt_0")
DTYPES = ["bfloat16", "float16", "float32"]
BIN = 2.0 ** (1 / 32)
"""how wide a bin of norms is"""


def rows(dtype: str, images: int = 300, tokens: int = 7, d_model: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.uniform(-8, 8, size=(images, tokens, 1)))
    return (rng.normal(0.3, 1.0, size=(images, tokens, d_model)) * scale).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )


def statistics_of(values: np.ndarray, kept: np.ndarray | None = None, error: float = 0.0) -> Statistics:
    found = array_statistics(values, kept, error)
    assert isinstance(found, Statistics)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_variance_rms_and_maximum_are_those_of_float64(dtype: str) -> None:
    values = rows(dtype)
    found, exact = statistics_of(values), values.astype(np.float64).reshape(-1, 24)
    assert found.rows == len(exact) == 2100
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, exact.var(axis=0), rtol=1e-12)
    assert found.rms == pytest.approx(np.sqrt(np.mean(exact**2)), rel=1e-12)
    assert found.max == pytest.approx(np.abs(exact).max(), rel=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_quantiles_are_right_to_the_width_of_a_bin(dtype: str) -> None:
    values = rows(dtype)
    norms = np.sort(np.linalg.norm(values.astype(np.float64).reshape(-1, 24), axis=1))
    shares = (0.001, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0)
    exact = [norms[int(np.ceil(share * len(norms))) - 1] for share in shares]
    for found, expected in zip(statistics_of(values).norm_quantiles(*shares), exact, strict=True):
        assert expected / np.sqrt(BIN) * 0.9999 <= found <= expected * np.sqrt(BIN) * 1.0001


def test_rows_of_zeros_and_of_extreme_norms_have_a_place_too() -> None:
    values = np.zeros((4, 1, 2), np.float32)
    values[1], values[2], values[3] = 1e-18, 1.0, 1e18
    found = statistics_of(values)
    assert found.norm_counts.sum() == 4
    assert found.norm_quantiles(0.25)[0] == 0.0
    assert found.norm_quantiles(0.5, 0.75, 1.0) == pytest.approx([1e-18 * 2**0.5, 2**0.5, 1e18 * 2**0.5], rel=0.012)
    empty = statistics_of(values[:1], np.zeros((1, 1), bool))
    assert (empty.rows, empty.rms, empty.max, empty.relative_error, empty.fvu_floor) == (0, 0, 0, 0, 0)
    assert empty.norm_quantiles(0.5) == [0.0]
    assert not empty.mean.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_slots_are_left_out(dtype: str) -> None:
    values = rows(dtype)
    kept = np.random.default_rng(1).random(values.shape[:2]) < 0.7
    spoilt = values.copy()
    spoilt[~kept] = np.nan
    found, exact = statistics_of(spoilt, kept), values[kept].astype(np.float64)
    assert found.rows == len(exact)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, exact.var(axis=0), rtol=1e-12)


def test_the_first_image_with_a_value_that_is_not_finite_is_named() -> None:
    values = rows("float32")
    values[217, 3, 5] = np.inf
    values[250, 0, 0] = np.nan
    assert array_statistics(values, None) == 217
    kept = np.ones(values.shape[:2], bool)
    kept[217, 3] = False
    assert array_statistics(values, kept) == 250


def test_parts_add_up_in_their_order_to_the_last_bit(small_store: MakeStore) -> None:
    made = small_store(text_tokens=StreamTokens("real+0", 8, 8))
    positions = made.store.tokens("txt", 1)
    values = made.store.read(TXT, 1, "mlp_out")
    parts = [statistics_of(values[i : i + 4], positions[i : i + 4] >= 0) for i in (0, 4, 8)]
    found = made.store.statistics(TXT, 1, "mlp_out")
    expected = merged(parts)
    assert found.rows == expected.rows == (positions >= 0).sum()
    for name in ("sum", "square_sum", "norm_counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(found.sum, (parts[0].sum + parts[1].sum) + parts[2].sum)
    np.testing.assert_array_equal(found.norm_counts, statistics_of(values, positions >= 0).norm_counts)
    assert made.store.all_statistics()[TXT, 1, "mlp_out"].scalars() == found.scalars()
    exact = values[positions >= 0].astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    commit = made.store.commit(1)["statistics"]["txt_0"]["1"]["mlp_out"]
    assert commit == parts[1].scalars()


def test_what_fp8_costs_is_measured_against_what_was_handed_over(tmp_path: Path) -> None:
    made = make_store(
        tmp_path / "store",
        store_dtype="fp8-e4m3",
        pictures="none",
        d_model=64,
        text_tokens=StreamTokens("real+0", 8, 8),
    )
    for (site, step, point), exact in made.values.items():
        found, stored = made.store.statistics(site, step, point), made.store.read(site, step, point).astype(np.float64)
        kept = made.store.tokens(site.stream, step) >= 0
        lost = np.square(stored - exact)[kept]
        variance = np.square(stored[kept] - stored[kept].mean(axis=0))
        assert found.error == pytest.approx(lost.sum(), rel=1e-6)
        assert found.relative_error == pytest.approx(np.sqrt(lost.sum() / np.square(stored[kept]).sum()), rel=1e-6)
        assert found.fvu_floor == pytest.approx(lost.sum() / variance.sum(), rel=1e-6)
        assert 0.02 < found.relative_error < 0.03
    assert "relative" in describe(made.store)
    assert "FVU floor" in describe(made.store)


TINY: dict[str, Any] = {
    "images": 2, "layers": "1", "num_inference_steps": 1, "resolution": 16, "pictures": "none", "threads": 1,
    "text_tokens": "real+1", "tokens": "3", "batch_size": 2, "weights": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What the model computes."""
    out = tmp_path_factory.mktemp("exact") / "store"
    run(HarvestSettings(out=out, store_dtype="float32", **TINY))
    return open_store(out)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("bfloat16", 0.001, 0.003), ("float16", 1e-4, 3e-4), ("fp8-e4m3", 0.02, 0.03)]
)
def test_the_cost_of_a_store_dtype_is_that_against_the_values_that_the_model_computed(
    exact: Store, tmp_path: Path, dtype: Any, least: float, most: float
) -> None:
    run(HarvestSettings(out=tmp_path / "store", store_dtype=dtype, **TINY))
    lossy = open_store(tmp_path / "store")
    assert exact.statistics(exact.sites[0], 0, "mlp_in").error == 0
    for site in lossy.sites:
        kept = exact.tokens(site.stream, 0) >= 0
        assert kept.all() == (site.stream == "img")
        for point in lossy.points:
            original = exact.read(site, 0, point)[kept].astype(np.float64)
            stored = lossy.read(site, 0, point)[kept].astype(np.float64)
            lost, deviation = np.square(stored - original).sum(), np.square(stored - stored.mean(axis=0)).sum()
            found = lossy.statistics(site, 0, point)
            close = (
                0.02 if dtype == "fp8-e4m3" else 1e-5
            )  # roundings to bfloat16, then to fp8, are added up as independent
            assert found.relative_error == pytest.approx(np.sqrt(lost / np.square(stored).sum()), rel=close)
            assert found.fvu_floor == pytest.approx(lost / deviation, rel=2 * close)
            assert least < found.relative_error < most


def test_a_value_beyond_float16_stops_the_harvest_with_site_step_and_prompt(
    exact: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def great(*rows: Any) -> torch.Tensor:
        values: torch.Tensor = choose(*rows).clone()
        values[1] *= 1e7
        return values

    choose = staging.chosen
    monkeypatch.setattr(staging, "chosen", great)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    out = tmp_path / "store"
    assert program("harvest", COMMANDS, [*words, "--store-dtype=float16", f"--out={out}"], default="harvest") == 1
    error = capsys.readouterr().err
    prompt = exact.prompts().column("prompt")[1].as_py()
    assert "Traceback" not in error
    assert "at step 0 of image 1 holds a NaN or an infinity in float16" in error
    assert repr(prompt) in error
    assert any(f"error: {site} {point}" in error for site in exact.sites for point in exact.points)
    assert open_store(out, unfinished=True).committed_parts == ()
    assert not list(out.rglob("*.tmp"))
