"""Figures on held-out rows are those of a plain computation, whatever else is measured in the same read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train.results.evaluate
from store.errors import MismatchError, UsageError
from store.pack import PackSettings
from store.pack import run as make_pack
from store.shards import Pack, open_pack
from store.sites import Point, Site
from store.strata import Group
from tests.toy_stores import mlp_in_numpy, toy_store
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import Dictionary, build, sinusoidal
from train.results.evaluate import (
    DENSITY_LOG10_EDGES,
    check_packs,
    check_sigmas,
    check_site,
    density_histogram,
    evaluate,
)
from train.rows.means import TrainingMeans

TXT, IMG = Site.parse("txt_0"), Site.parse("img_0")
D_MODEL = 8
Packs = tuple[Pack, Pack]


def packed(folder: Path, **options: Any) -> Packs:
    """A train and a val pack of one toy store."""
    store = toy_store(
        folder / "store", 120, ("img_0", "txt_0"), (0, 2), D_MODEL, 12, chunk_images=64,
        **{"learnable": True, **options},
    )  # fmt: skip
    for split in ("train", "val"):
        make_pack(PackSettings(store=store, out=folder / split, split=split))  # type: ignore[arg-type]
    return open_pack(folder / "train"), open_pack(folder / "val")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Packs:
    return packed(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory: pytest.TempPathFactory) -> Packs:
    return packed(tmp_path_factory.mktemp("recomputed"), learnable=False, mlp=True, targets="recomputed")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 37 rows, and of fewer for wide dictionaries: the last one of every shard is ragged."""
    monkeypatch.setattr(train.results.evaluate, "ROWS_AT_ONCE", 37)
    monkeypatch.setattr(train.results.evaluate, "ENTRIES_AT_ONCE", 37 * 32)


def dictionary(site: Site, kind: str, seed: int, n_features: int = 40, **config: Any) -> Dictionary:
    """A dictionary of random weights, about half of its features sometimes active."""
    settings: dict[str, Any] = {"kind": kind, "site": site, "d_model": D_MODEL, "n_features": n_features, **config}
    made = build(DictionaryConfig(**settings)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        parameter.normal_(0, 0.5, generator=generator)
        if name == "encoder.bias":
            parameter.sub_(2.0 * torch.arange(n_features) / n_features * 4)
    return made


def mixed(site: Site) -> list[Dictionary]:
    """Dictionaries of both kinds and families, narrow and wide."""
    return [
        dictionary(site, "transcoder", 1, time_embed_dim=8),
        dictionary(site, "sae", 2, n_features=24, activation="topk", k=3),
        dictionary(site, "transcoder", 3, n_features=100, activation="topk", k=5),
        dictionary(site, "sae", 4, family="flux-sae"),
        dictionary(site, "transcoder", 5, n_features=24, skip=True),
    ]


def means_of(pack: Pack, site: Site) -> dict[Point, TrainingMeans]:
    return {"mlp_out": TrainingMeans(pack, site, "mlp_out")}


def columns_of(pack: Pack, site: Site) -> dict[str, np.ndarray]:
    """All rows of a site in float64, mlp_out computed where it is not stored."""
    shards = [shard.columns() for shard in pack.shards(site)]
    columns = {name: np.concatenate([shard[name].astype(np.float64) for shard in shards]) for name in shards[0]}
    if "mlp_out" not in columns:
        columns["mlp_out"] = mlp_in_numpy(site, columns["mlp_in"])
    return columns


def in_numpy(d: Dictionary, x: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z and y_hat as the formulas in `train.dictionaries.dictionary` say, float64."""
    w = {name: value.numpy().astype(np.float64) for name, value in d.state_dict().items()}
    into, out_bias = x, w.get("decoder.bias")
    if d.config.family == "flux-sae":
        into, out_bias = x - w["pre_bias"], w["pre_bias"]
    if d.config.time_embed_dim is not None:
        h = sinusoidal(torch.from_numpy(sigma).float(), d.config.time_embed_dim).numpy().astype(np.float64)
        for layer in (0, 2):
            h = h @ w[f"time_mlp.{layer}.weight"].T + w[f"time_mlp.{layer}.bias"]
            h = h / (1 + np.exp(-h))
        scale, shift = np.split(h @ w["mod_linear.weight"].T + w["mod_linear.bias"], 2, axis=1)
        into = x * (1 + scale) + shift
    z = np.maximum(into @ w["encoder.weight"].T + w["encoder.bias"], 0)
    if d.config.k is not None:
        z = np.where(z >= np.sort(z, axis=1)[:, [-d.config.k]], z, 0)
    y_hat = z @ w["decoder.weight"].T + out_bias
    return z, y_hat + x @ w["skip.weight"].T if d.config.skip else y_hat


def assert_plain(
    found: Mapping[str, Any], d: Dictionary, fit: dict[str, np.ndarray], held: dict[str, np.ndarray]
) -> None:
    """`found` is what loops over groups and steps give, rows of the training pack `fit` and of the val pack `held`."""
    y = held["mlp_out"]
    z, y_hat = in_numpy(d, held[d.input_point], held["sigma"])
    squared = ((y - y_hat) ** 2).sum(axis=1)
    lengths = np.linalg.norm(y, axis=1) * np.linalg.norm(y_hat, axis=1)
    cosine = (y * y_hat).sum(axis=1) / np.where(lengths == 0, 1, lengths)  # a row of zeros has the cosine zero
    for group in ("all", "real", "padding") if "real" in held else ("all",):
        figures = found if group == "all" else found[group]
        mine, theirs = (
            np.ones(len(c["step"]), bool) if group == "all" else c["real"] == (group == "real") for c in (held, fit)
        )
        residuals, deviations = [], []
        for step in (0, 2):
            rows = mine & (held["step"] == step)
            mean = fit["mlp_out"][theirs & (fit["step"] == step)].mean(axis=0)
            residuals.append(squared[rows].sum())
            deviations.append(((y[rows] - mean) ** 2).sum())
            there = figures["steps"][str(step)]
            assert there["fvu"] == pytest.approx(residuals[-1] / deviations[-1], rel=1e-5)
            assert there["l0"] == pytest.approx((z[rows] > 0).sum(axis=1).mean(), rel=1e-4)
            assert there["rows"] == rows.sum()
        assert figures["fvu"] == pytest.approx(sum(residuals) / sum(deviations), rel=1e-5)
        assert figures["cosine"] == pytest.approx(cosine[mine].mean(), abs=1e-6)
        l0 = (z[mine] > 0).sum(axis=1).mean()
        assert figures["l0"] == pytest.approx(l0, rel=1e-4)
        assert figures["density"] == pytest.approx(l0 / z.shape[1], rel=1e-4)
        assert figures["dead"] == (~(z[mine] > 0).any(axis=0)).mean() and figures["rows"] == mine.sum()
        histogram = figures["density_histogram"]
        assert sum(histogram["counts"]) + histogram["never"] == z.shape[1]
        assert histogram["never"] == (~(z[mine] > 0).any(axis=0)).sum()


@pytest.mark.parametrize("site", [TXT, IMG])
def test_figures_equal_a_plain_computation_in_float64(packs: Packs, site: Site) -> None:
    dictionaries = mixed(site)
    found = evaluate(dictionaries, means_of(packs[0], site), packs[1])
    fit, held = (columns_of(pack, site) for pack in packs)
    for metrics, each in zip(found, dictionaries, strict=True):
        assert_plain(metrics, each, fit, held)
    assert 0 < found[0]["dead"] < 1 and found[0]["rows"] % 37 != 0  # features of both sorts; a ragged block


def test_figures_of_recomputed_targets_equal_a_plain_computation(recomputed: Packs) -> None:
    dictionaries = mixed(TXT)[:2]
    found = evaluate(dictionaries, means_of(recomputed[0], TXT), recomputed[1])
    fit, held = (columns_of(pack, TXT) for pack in recomputed)
    for metrics, each in zip(found, dictionaries, strict=True):
        assert metrics["targets"] == "recomputed"
        assert_plain(metrics, each, fit, held)


@pytest.mark.parametrize("name", ["packs", "recomputed"])
def test_many_at_once_have_the_figures_of_each_alone_bit_for_bit(name: str, request: pytest.FixtureRequest) -> None:
    train_pack, val_pack = request.getfixturevalue(name)
    means = means_of(train_pack, TXT)
    together = evaluate(mixed(TXT), means, val_pack)
    assert together == [evaluate([each], means, val_pack)[0] for each in mixed(TXT)]
    assert together == evaluate(mixed(TXT), means, val_pack)


def test_the_pack_is_read_once_for_all_dictionaries(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = train.results.evaluate.read_shard
    monkeypatch.setattr(
        train.results.evaluate, "read_shard", lambda shard, points: reads.append(points) or read(shard, points)
    )  # type: ignore[func-returns-value]
    evaluate(mixed(TXT), means_of(packs[0], TXT), packs[1])
    assert reads == [("mlp_in", "mlp_out")]
    evaluate([dictionary(TXT, "sae", 0)], means_of(packs[0], TXT), packs[1])
    assert reads[1:] == [("mlp_out",)]  # what nobody needs is not read


def test_blocks_change_no_count_and_no_figure_beyond_rounding(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    means = means_of(packs[0], TXT)
    small = evaluate(mixed(TXT), means, packs[1])
    monkeypatch.setattr(train.results.evaluate, "ROWS_AT_ONCE", 4096)
    for one, other in zip(small, evaluate(mixed(TXT), means, packs[1]), strict=True):
        assert one["density_histogram"] == other["density_histogram"] and one["l0"] == other["l0"]
        assert one["fvu"] == pytest.approx(other["fvu"], rel=1e-6)


def test_a_dictionary_that_is_never_active_is_wholly_dead_and_explains_what_its_bias_does(packs: Packs) -> None:
    dead = dictionary(IMG, "transcoder", 0)
    dead.encoder.bias.fill_(-1e6)
    dead.decoder.bias.zero_()
    (found,) = evaluate([dead], means_of(packs[0], IMG), packs[1])
    assert (found["l0"], found["dead"], found["cosine"]) == (0, 1, 0) and found["fvu"] >= 1
    assert found["density_histogram"] == {"counts": [0] * (len(DENSITY_LOG10_EDGES) - 1), "never": 40}


def test_densities_are_counted_in_quarters_of_a_decade_with_their_upper_edges() -> None:
    assert len(DENSITY_LOG10_EDGES) == 33 and DENSITY_LOG10_EDGES[0] == -8 and DENSITY_LOG10_EDGES[-1] == 0
    found = density_histogram(np.array([0, 0, 1, 10, 100, 178, 1000, 1000]), 1000)
    assert found["never"] == 2
    filled = {DENSITY_LOG10_EDGES[place + 1]: count for place, count in enumerate(found["counts"]) if count}
    assert filled == {-3.0: 1, -2.0: 1, -1.0: 1, -0.5: 1, 0.0: 2}  # 10^-0.75 = 0.1778 lies below 0.178
    assert density_histogram(np.array([1]), 10**9)["counts"][0] == 1  # the first bin takes what lies below it


class SomeMeans(TrainingMeans):
    """Means of a training pack without padding, or without a step."""

    def __init__(self, pack: Pack, missing: tuple[int, Group]) -> None:
        super().__init__(pack, TXT, "mlp_out")
        self.missing = missing

    def of(self, step: int, group: Group = "all") -> torch.Tensor | None:
        gone = step == self.missing[0] and self.missing[1] in ("all", group)
        return None if gone else super().of(step, group)


def test_a_kind_of_token_that_training_never_saw_is_judged_against_the_mean_of_the_stream(packs: Packs) -> None:
    each = dictionary(TXT, "sae", 2)
    (found,) = evaluate([each], {"mlp_out": SomeMeans(packs[0], (2, "padding"))}, packs[1])
    fit, held = (columns_of(pack, TXT) for pack in packs)
    rows = (held["step"] == 2) & (held["real"] == 0)
    y_hat = in_numpy(each, held["mlp_out"], held["sigma"])[1]
    mean = fit["mlp_out"][fit["step"] == 2].mean(axis=0)
    plain = ((held["mlp_out"] - y_hat)[rows] ** 2).sum() / ((held["mlp_out"][rows] - mean) ** 2).sum()
    assert found["padding"]["steps"]["2"]["fvu"] == pytest.approx(plain, rel=1e-5)
    assert found["means_missing"] == ["padding 2"]
    (whole,) = evaluate([each], means_of(packs[0], TXT), packs[1])
    assert "means_missing" not in whole
    with pytest.raises(MismatchError, match="no row of txt_0 at step 2"):
        evaluate([each], {"mlp_out": SomeMeans(packs[0], (2, "all"))}, packs[1])


def test_a_val_pack_without_rows_of_a_site_is_refused(packs: Packs) -> None:
    config = dictionary(TXT, "transcoder", 0).config
    check_site(packs[1], TXT, config)
    empty = open_pack(packs[1].path)
    empty.manifest["streams"]["txt"]["shards"] = []
    with pytest.raises(UsageError, match="has no rows of txt_0: pack more images"):
        check_site(empty, TXT, config)
    with pytest.raises(UsageError, match="no site img_5"):
        check_site(packs[1], Site.parse("img_5"), config)


def test_a_val_pack_of_another_schedule_width_or_split_is_refused(packs: Packs, tmp_path: Path) -> None:
    check_packs(*packs)
    check_sigmas(*packs, IMG)
    with pytest.raises(UsageError, match="of the split 'train', which is trained on"):
        check_packs(packs[0], packs[0])
    other = packed(tmp_path, sigmas=(1.0, 0.9, 0.6, 0.3))
    with pytest.raises(MismatchError, match=r"step 2 is at sigma 0.6 in --val .* and at 0.5 in --pack"):
        check_sigmas(packs[0], other[1], IMG)
    other[1].d_model = 12
    with pytest.raises(MismatchError, match="rows of width 12"):
        check_packs(packs[0], other[1])
    other[1].d_model, other[1].steps = 8, (0, 1)
    with pytest.raises(MismatchError, match=r"has steps 0, 1, .* has 0, 2: FVU needs"):
        check_packs(packs[0], other[1])


@pytest.mark.gpu
def test_figures_on_a_gpu_are_those_of_the_cpu_to_rounding_and_the_same_again(packs: Packs) -> None:
    means = means_of(packs[0], TXT)
    slow, fast, again = (evaluate(mixed(TXT), means, packs[1], device) for device in ("cpu", "cuda", "cuda"))
    assert fast == again
    for one, other in zip(slow, fast, strict=True):
        assert (one["fvu"], one["cosine"], one["l0"]) == pytest.approx(
            (other["fvu"], other["cosine"], other["l0"]), rel=1e-4
        )
