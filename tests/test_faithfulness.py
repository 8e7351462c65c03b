"""`analyze faithfulness`: its figures are those of a plain account, the same command goes on, and bad input never loads a model."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from analyze.faithfulness import command, plots
from analyze.faithfulness.groups import Group, sites_text, splicings_of
from analyze.faithfulness.plots import block_lines, blocks_plot, last_layer, sparsity_plot, steps_plot
from analyze.faithfulness.settings import FaithfulnessSettings
from analyze.faithfulness.table import figure, pool, with_recovered
from analyze.steering.drawing import Painter, open_painter
from analyze.steering.shelf import Shelf
from store import Site, open_store
from store.errors import GranaryError, MismatchError, UsageError
from store.sites import parse_sites
from store.sizes import human_size
from tests.object_server import tree
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.collection import load_dictionaries

Measure = Callable[..., command.FaithfulnessMeasured]


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a transcoder and an SAE of img_1, both TopK."""
    folder = tmp_path_factory.mktemp("saes")
    for kind in ("transcoder", "sae"):
        made = transcoder("img_1", kind=kind, activation="topk", k=12)
        save_dictionary(folder / made.name, made, None, [])
    return folder


@pytest.fixture(scope="module")
def painter(traced_flux: Path) -> Painter:
    return open_painter(open_store(traced_flux / "store"))


@pytest.fixture
def measure(traced_flux: Path, tmp_path: Path, painter: Painter, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Runs the command on the small store; the model is loaded once for all tests."""

    def opened(_store: Any, _model: Any, _device: Any, _dtype: Any, batch_size: int | None, canvas: Any) -> Painter:
        painter.batch_size, painter.canvas, painter.forwards = batch_size or 2, canvas, 0
        return painter

    monkeypatch.setattr(command, "open_painter", opened)

    def run(out: str = "out", **choices: Any) -> command.FaithfulnessMeasured:
        given = {"store": traced_flux / "store", "dictionaries": (traced_flux / "dictionaries",), **choices}
        return command.run(FaithfulnessSettings(out=tmp_path / out, **given))

    return run


def test_figures_are_those_of_the_stored_rows_where_nothing_before_was_replaced(
    measure: Measure, traced_flux: Path
) -> None:
    """At step 0 of a single site the run is still the plain one, so the store's rows tell what FVU, cosine and L0 must be."""
    found = measure(sites="img_1,txt_2", scope="site", images="0-2", exact=0, pictures=False, baseline=False)
    assert found.results is not None
    store = open_store(traced_flux / "store")
    lengths = store.prompts()["text_length"].to_numpy()
    rows = {(row["site"], row["step"], row["tokens"]): row for row in found.results.sites.to_pylist()}
    assert {key[2] for key in rows} == {"all", "real", "padding"} and {key[1] for key in rows} == {0, 1, 2, 3}
    for dictionary in load_dictionaries(traced_flux / "dictionaries", parse_sites("img_1,txt_2")):
        site = dictionary.site
        x, y = (np.asarray(store.read(site, 0, point, 0, 3), np.float64) for point in ("mlp_in", "mlp_out"))
        real = np.ones(x.shape[:2], bool) if site.stream == "img" else np.arange(x.shape[1]) < lengths[:, None]
        sigma = torch.ones(int(real.sum()))
        with torch.no_grad():
            z = dictionary.encode(torch.from_numpy(x[real]).float(), sigma)
            explained = dictionary.decode(z).double().numpy()
        target = y[real]
        row = rows[str(site), 0, "all" if site.stream == "img" else "real"]
        assert row["rows"] == len(target)
        fvu = ((explained - target) ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum()
        assert row["fvu"] == pytest.approx(fvu, rel=1e-4)
        assert row["l0"] == pytest.approx(float((z > 0).sum(1).double().mean()), rel=1e-3)
        norms = np.linalg.norm(explained, axis=1) * np.linalg.norm(target, axis=1)
        assert row["cosine"] == pytest.approx(((explained * target).sum(1) / norms).mean(), abs=1e-5)


def test_a_run_writes_its_tables_and_one_that_was_stopped_ends_with_the_same_bytes(
    measure: Measure, saes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices: dict[str, Any] = {
        "dictionaries": (saes,), "images": "0-1", "scope": "site", "steps": "1,3", "each_step": True, "exact": 1,
    }  # fmt: skip
    planned = measure(**choices, plan=True)
    said = capsys.readouterr().out
    assert planned.results is None and not (tmp_path / "out").exists()
    done = measure(**choices)
    # 3 groups (baseline, transcoder, SAE) at both steps and each alone: 9 splicings of 2 images; plain; 4 pictures for each of 2 exact
    assert done.pictures == 2 * (9 + 1) + 2 * 4 and done.forwards == 4 * done.pictures
    assert f"RUNS THE MODEL: {done.pictures} pictures (8 of them" in said and f"{done.forwards} passes" in said
    summary = pq.read_table(tmp_path / "out" / "faithfulness.parquet")
    assert summary["group"].to_pylist() == 3 * ["mean output"] + 3 * ["transcoder k 12"] + 3 * ["sae k 12"]
    assert summary["steps"].to_pylist() == 3 * ["1,3", "1", "3"] and set(summary["sites"].to_pylist()) == {"img_1"}
    assert {"fvu", "latent_fvu", "recovered", "latent_cosine", "psnr", "ssim", "flip", "clip", "kept_colour"} <= set(
        summary.column_names
    )
    assert summary["recovered"].to_pylist()[:3] == [0.0, 0.0, 0.0] and summary["fvu"][0].as_py() == pytest.approx(
        1, abs=0.2
    )
    assert done.results is not None and done.results.exactness is not None
    exact = done.results.exactness.to_pylist()
    assert [row["errors"] for row in exact] == ["live", "kept"] * 2 and max(row["largest"] for row in exact) < 2e-5
    text = (tmp_path / "out" / "faithfulness.md").read_text()
    for words in (
        "## Transcoders against SAEs",
        "| img_1 | k 12 |",
        "## Step by step",
        "step 3 alone",
        "## Errors added back",
    ):
        assert words in text
    for name in ("faithfulness.png", "steps.png", "pictures.png", "images.parquet", "sites.parquet", "run.json"):
        assert (tmp_path / "out" / name).exists(), name
    before = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "splicings" / "sae-k-12_img_1_step-3")
    (tmp_path / "out" / "faithfulness.parquet").unlink()
    again = measure(**choices)
    assert again.pictures == 2 * 2 and tree(tmp_path / "out") == before
    with pytest.raises(
        UsageError, match=r"was made with settings images \[0, 1\], now \[0, 1, 2\]: choose another --out"
    ):
        measure(**{**choices, "images": "0-2"})
    with pytest.raises(UsageError, match=r"was made with groups \(3 of them, now 2\)"):
        measure(**{**choices, "baseline": False})


REFUSED: dict[str, tuple[dict[str, Any], type[GranaryError], str]] = {
    "site": ({"sites": "img_7"}, UsageError, "has no img_7; it has img_0"),
    "step": ({"steps": "2-4"}, UsageError, "there is no step 4: there are 4, 0 to 3"),
    "image": ({"images": "0-3"}, UsageError, "there is no image 3: there are 3, 0 to 2"),
    "scope": ({"scope": "site,sites"}, UsageError, "--scope 'sites' is none: choose of site, cumulative, all"),
    "folder": ({"dictionaries": (Path("nowhere"),)}, UsageError, "there is no folder nowhere"),
    "no folder": ({"dictionaries": ()}, UsageError, "--dictionaries names no folder"),
    "exact": ({"exact": -1}, UsageError, "--exact is -1"),
    "batch": ({"batch_size": 0}, UsageError, "--batch-size is 0"),
    "clip without pictures": ({"clip": "x", "pictures": False}, UsageError, "leave out --no-pictures"),
    "device": ({"device": "abacus"}, UsageError, "--device 'abacus' is no device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_a_model_is_loaded(
    name: str, measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(command, "open_painter", load)
    choices, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        measure(**choices)
    assert not (tmp_path / "out").exists()


def test_dictionaries_of_another_width_or_block_are_refused(measure: Measure, tmp_path: Path) -> None:
    for number, (made, words) in enumerate((
        (transcoder("img_1", d_model=64), "has d_model 64, tiny-flux has 128"),
        (transcoder("img_9"), "is of block 9, tiny-flux has double blocks 0 to 4"),
    )):  # fmt: skip
        save_dictionary(tmp_path / f"d{number}" / made.name, made, None, [])
        with pytest.raises(MismatchError, match=words):
            measure(dictionaries=(tmp_path / f"d{number}",))


def group(kind: str, sites: str, label: str) -> Group:
    return Group(
        label, kind, "", Shelf({}), tuple(sorted(parse_sites(sites), key=lambda site: (site.layer, site.stream)))
    )


def test_splicings_are_each_site_then_block_by_block_then_all_and_none_twice() -> None:
    settings = FaithfulnessSettings(
        store="s", dictionaries=(Path("d"),), out=Path("o"), scope="all,cumulative,site", each_step=True, steps="0,2"
    )
    groups = [
        group("mean", "img_0-1,txt_1", "m"),
        group("transcoder", "img_0-1,txt_1", "t"),
        group("sae", "img_1", "s"),
    ]
    found = splicings_of(settings, groups, 4)
    assert len({splicing.file_name for splicing in found}) == len(found)
    at_all_steps = {(s.group.label, sites_text(s.sites)): s.scopes for s in found if s.every_step}
    assert at_all_steps == {
        ("m", "img_0"): ("site", "cumulative"), ("m", "img_1"): ("site", "all", "cumulative"), ("m", "txt_1"): ("site",),
        ("m", "img_0-1,txt_1"): ("cumulative", "all"),
        ("t", "img_0"): ("site", "cumulative"), ("t", "img_1"): ("site",), ("t", "txt_1"): ("site",),
        ("t", "img_0-1,txt_1"): ("cumulative", "all"),
        ("s", "img_1"): ("site", "cumulative", "all"),
    } | {("m", "img_1"): at_all_steps["m", "img_1"]}  # fmt: skip
    assert set(at_all_steps["m", "img_1"]) == {"site", "cumulative", "all"}
    assert [s.steps for s in found if s.group.label == "s"] == [(0, 2), (0,), (2,)]
    with pytest.raises(UsageError, match="there is no step 2"):
        splicings_of(settings, groups, 2)


def test_figures_are_pooled_as_sums_and_compared_with_the_baseline_at_the_same_sites_and_steps() -> None:
    rows = [
        {"rows": 3, "residual": 1.0, "deviation": 2.0, "l0": 4.0, "cosine": 1.0},
        {"rows": 1, "residual": 2.0, "deviation": 10.0, "l0": 8.0, "cosine": 0.0},
    ]
    assert pool(rows) == {"l0": 5.0, "cosine": 0.75, "fvu": 0.25}
    assert pool([]) == {"l0": None, "fvu": None, "cosine": None}
    named = [
        {"kind": kind, "sites": sites, "steps": "0", "latent_fvu": off}
        for kind, sites, off in (("mean", "img_1", 0.2), ("sae", "img_1", 0.05), ("sae", "img_2", 0.05))
    ]
    assert [row["recovered"] for row in with_recovered(named)] == [0.0, pytest.approx(0.75), None]
    shown = {
        figure("latent_fvu", 0.00123),
        figure("fvu", None),
        figure("psnr", float("inf")),
        figure("kept_colour", 1.0),
    }
    assert shown == {"0.123", "-", "equal", "100.0"}
    assert last_layer("img_0-4,txt_3") == 4 and sites_text([Site.parse("txt_3"), Site.parse("img_2")]) == "img_2,txt_3"


def block(group: str, kind: str, sites: str, off: float) -> dict[str, Any]:
    return {"group": group, "kind": kind, "sites": sites, "latent_fvu": off, "scopes": "cumulative", "every_step": True}


def test_a_line_of_the_baseline_grows_by_the_sites_of_a_group_that_is_drawn() -> None:
    chains = {"img_0": 0.1, "img_0-1": 0.2, "img_0-2": 0.3}
    rows = [block("mean output", "mean", sites, 10 * off) for sites, off in chains.items()]
    rows += [block("mean output", "mean", "img_2", 9.0)]  # the SAE's only site: no line, and no point of another's
    rows += [block("t", "transcoder", sites, off) for sites, off in chains.items()] + [block("s", "sae", "img_2", 0.5)]
    lines, means = block_lines(rows)
    assert lines == {"mean output": [(0, 1.0), (1, 2.0), (2, 3.0)], "t": [(0, 0.1), (1, 0.2), (2, 0.3)]}
    assert means == {"mean output"} and blocks_plot(rows) is not None
    rows += [block("mean output", "mean", "img_1-2", 7.0), block("s", "sae", "img_1-2", 0.7)]
    rows = [row for row in rows if row != block("mean output", "mean", "img_2", 9.0)] + [
        block("mean output", "mean", "img_2", 6.0)
    ]
    lines, means = block_lines(rows)
    assert means == {"mean output, img_0-2", "mean output, img_1-2"}  # a line for each chain of sites
    assert lines["mean output, img_1-2"] == [(2, 6.0), (2, 7.0)] and list(lines)[:2] == [
        "mean output, img_0-2",
        "mean output, img_1-2",
    ]


def test_a_site_without_dictionaries_of_a_kind_has_no_empty_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [
        {
            "site": site,
            "sites": site,
            "step": step,
            "kind": kind,
            "group": kind,
            "tokens": "all",
            "every_step": True,
            "fvu": 0.1,
        }
        for kind, site in (("transcoder", "img_0"), ("transcoder", "img_2"), ("sae", "img_2"))
        for step in (0, 1)
    ]
    shown: list[tuple[str, bool]] = []

    def look(figure: Any) -> bytes:
        shown.extend((axes.get_title("left"), axes.get_visible()) for axes in figure.axes)
        return b""

    monkeypatch.setattr(plots, "png", look)
    assert steps_plot([], sites) == b""
    assert dict(shown) == {
        "img_0, transcoders": True, "img_2, transcoders": True, "img_0, SAEs": False, "img_2, SAEs": True
    }  # fmt: skip


def test_the_plan_says_what_is_written_and_what_kept_errors_take(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices: dict[str, Any] = {"sites": "img_1", "scope": "site", "images": "0-1", "exact": 2}
    measure(**choices, plan=True)
    said = capsys.readouterr().out
    kept = 4 * 2 * 4 * 64 * 128  # float32, images, steps, tokens, d_model
    assert f"{human_size(kept)} for errors that are kept" in said
    (most,) = re.findall(r"written +at most ([\d.]+) (kB|MB)", said)
    measure(**choices)
    there = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert there <= float(most[0]) * {"kB": 1e3, "MB": 1e6}[most[1]]


def test_there_is_no_plot_where_there_is_nothing_to_plot() -> None:
    assert sparsity_plot([]) is None and steps_plot([], []) is None
