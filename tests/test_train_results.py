"""What a training leaves to look at: logs without doubled lines, pictures and tables that are the same bytes every time."""

import io
import json
import re
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.results.plots
import train.results.sweep
from store.errors import DamagedError
from store.files import read_self_checked, sha256_file, temporary_of
from store.sites import Site
from tests.object_server import fetched, sent
from train import load_dictionaries
from train.dictionaries.checkpoint import LogLine, save_dictionary
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import Dictionary, build
from train.results.evaluate import DENSITY_LOG10_EDGES, figures
from train.results.logs import Logs
from train.results.pareto import _panels, on_front, pareto
from train.results.plots import curves, density, running_mean, short_number
from train.results.sweep import save, table


def measured(l0: float, fvu: float, stream: str = "img", n_features: int = 16) -> dict[str, Any]:
    """What `evaluate` says of a made-up dictionary."""
    rows = 1000
    active = np.linspace(0, 2 * l0 * rows / n_features, n_features).astype(np.int64)
    whole = figures(rows, fvu, 0.9 * rows, 1.0, active)
    assert whole is not None
    found = {
        "pack": "sha256-val",
        "split": "val",
        "targets": "stored",
        "density_log10_edges": list(DENSITY_LOG10_EDGES),
    }
    steps = {"steps": {"0": whole}}
    groups = {"real": {**whole, **steps}, "padding": {**whole, **steps, "fvu": fvu / 2}} if stream == "txt" else {}
    return {**found, **whole, **steps, **groups}


def made(
    site: str = "img_0", l0: float | None = 4.0, fvu: float = 0.25, kind: str = "transcoder", **training: Any
) -> Dictionary:
    """An untrained dictionary that says it was trained and measured so; not measured when `l0` is None."""
    k = training.pop("k", None)
    config = DictionaryConfig(
        kind=kind, site=Site.parse(site), d_model=4, n_features=16, activation="topk" if k else "relu", k=k,
        training={"l1": 0.0 if k else 3e-4, "seed": 0, **training}, steps=3, rows=3072,
    )  # fmt: skip
    return build(config, None if l0 is None else measured(l0, fvu, site.partition("_")[0]))


def lines(count: int, first: int = 0) -> list[LogLine]:
    """A made-up log, a line every tenth step."""
    return [
        {"step": 10 * i, "rows": 10240 * i + 1024, "loss": 2 / (i + 1), "residual": 1 / (i + 1), "sparsity": 3.0, "auxiliary": 0.0,
         "l0": 40.0 + i, "lr": 2e-4, "dead": 0.5 / (i + 1), "dead_rows": 50_000, "resampled": 3 * i}
        for i in range(first, count)
    ]  # fmt: skip


def text_chunks(picture: bytes) -> dict[str, Any]:
    return {key: value for key, value in Image.open(io.BytesIO(picture)).info.items() if isinstance(value, str)}


# logs


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def test_a_log_has_a_line_and_events_for_each_line_of_training_with_time_and_rate(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "out.runs", "l1-0.0003/transcoder_img_0")
    assert not (tmp_path / "out.runs").exists()  # nothing before the first line
    for line in lines(4):
        logs.line(line, 1234.56)
    logs.close()
    folder = tmp_path / "out.runs" / "l1-0.0003" / "transcoder_img_0"
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in r.items() if k not in ("time", "rows_per_second")} for r in records] == lines(4)
    assert all(record["rows_per_second"] == 1234.6 and record["time"] > 1.7e9 for record in records)
    found = events(folder)
    names = ("loss", "residual", "sparsity", "auxiliary", "l0", "lr", "dead", "resampled", "rows_per_second")
    assert found.Tags()["scalars"] == [f"training/{name}" for name in names]
    assert [(each.step, each.value) for each in found.Scalars("training/loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines(4)
    ]


@pytest.mark.parametrize("again", [2, 0])
def test_a_training_that_goes_on_after_a_kill_doubles_no_line(tmp_path: Path, again: int) -> None:
    killed = Logs(tmp_path, "transcoder_img_0")
    for line in lines(5):
        killed.line(line, 1.0)
    killed.close()
    folder = tmp_path / "transcoder_img_0"
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"l0": 45.0, "loss": 0.3')  # torn
    resumed = Logs(tmp_path, "transcoder_img_0")
    for line in lines(7, first=again):  # the last checkpoint was before line 2, or there was none
        resumed.line(line, 1.0)
    resumed.close()
    assert logged(folder) == [0, 10, 20, 30, 40, 50, 60]
    assert [each.step for each in events(folder).Scalars("training/loss")] == [0, 10, 20, 30, 40, 50, 60]


def test_final_figures_are_scalars_and_densities_a_histogram(tmp_path: Path) -> None:
    metrics = measured(4.0, 0.25, "txt")
    logs = Logs(tmp_path, "transcoder_txt_0")
    for line in lines(2):
        logs.line(line, 1.0)
    logs.figures(metrics, 11)
    logs.close()
    found = events(tmp_path / "transcoder_txt_0")
    ((fvu,), (padding,)) = found.Scalars("held-out/fvu"), found.Scalars("held-out padding/fvu")
    assert (fvu.step, fvu.value, padding.value) == (11, 0.25, 0.125)
    assert len(found.Scalars("training/loss")) == 2
    (histogram,) = found.Histograms("held-out real/log10 density")
    value, counts = histogram.histogram_value, metrics["real"]["density_histogram"]["counts"]
    assert value.num == sum(counts) == 15  # one is never active
    assert {limit: n for limit, n in zip(value.bucket_limit, value.bucket, strict=True) if n} == {
        limit: n for limit, n in zip(DENSITY_LOG10_EDGES[1:], counts, strict=True) if n
    }


# pictures


def test_pictures_are_the_same_bytes_whatever_matplotlib_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionaries = [
        made(l0=4, fvu=0.2),
        made(l0=2, fvu=0.4, l1=1e-3),
        made("txt_1", k=2),
        made("txt_1", kind="sae", k=4),
    ]

    def draw() -> list[bytes]:
        return [
            curves(lines(150), "a title"),
            density(measured(4, 0.25, "txt"), "a title"),
            pareto(dictionaries) or b"",
        ]

    pictures = draw()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 31.0)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 30)
    assert draw() == pictures and matplotlib.rcParams["font.size"] == 31.0
    assert [text_chunks(picture) for picture in pictures] == [{}, {}, {}]  # no date, no version
    assert all(min(Image.open(io.BytesIO(picture)).size) > 400 for picture in pictures)


def test_curves_show_dead_features_and_those_that_were_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[float]] = {}
    monkeypatch.setattr(
        train.results.plots, "_curve",
        lambda axes, points, *_: drawn.update({axes.get_title(loc="left"): points[:, 1].tolist()}),
    )  # fmt: skip
    curves(lines(3), "a title")
    dead, resampled = "dead, %: active on none of the last 50 k rows", "features resampled so far"
    assert drawn[dead] == pytest.approx([50, 25, 50 / 3]) and drawn[resampled] == [0, 3, 6] and len(drawn) == 6
    drawn.clear()
    curves([{key: value for key, value in line.items() if key != "resampled"} for line in lines(3)], "a title")
    assert drawn[dead][0] == 50 and drawn["sparsity term, before its weight"] == [3, 3, 3] and resampled not in drawn


def test_the_word_in_a_density_plot_stands_above_every_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    figures_drawn: list[Any] = []
    monkeypatch.setattr(train.results.plots, "png", lambda figure: figures_drawn.append(figure) or b"")
    density(measured(4.0, 0.25, "txt"), "a title")
    for never, axes in zip(figures_drawn[0].axes[::2], figures_drawn[0].axes[1::2], strict=True):
        (word,) = axes.texts
        bottom = word.get_window_extent(figures_drawn[0].canvas.get_renderer()).y0
        tops = [bar.get_window_extent().y1 for bar in (*never.patches, *axes.patches)]
        assert len(tops) > 10 and max(tops) < bottom


@pytest.mark.parametrize("some", [[], lines(1), [{**line, "l0": float("nan")} for line in lines(12)]])
def test_curves_of_a_short_or_partial_log_are_drawn(some: Sequence[LogLine]) -> None:
    assert curves(list(some), "short").startswith(b"\x89PNG")


def test_densities_where_no_feature_was_ever_active_are_drawn() -> None:
    assert density(measured(0.0, 1.0), "all dead").startswith(b"\x89PNG")


def test_a_running_mean_is_over_what_there_is_at_the_ends() -> None:
    assert running_mean(np.arange(5.0), 3) == pytest.approx([0.5, 1, 2, 3, 3.5])
    words = {0.0: "0", 2e-4: "2e-4", 5e-5: "5e-5", 0.25: "0.25", 1500.0: "1.5 k", 2.5e6: "2.5 M"}
    assert {value: short_number(value) for value in words} == words


def test_nothing_measured_gives_no_pareto_plot() -> None:
    assert pareto([made(l0=None)]) is None and pareto([]) is None


def test_the_front_holds_whom_no_other_of_its_site_and_kind_beats() -> None:
    rng = np.random.default_rng(0)
    dictionaries = [
        made(site, float(l0), float(fvu), kind)
        for site in ("img_0", "img_1") for kind in ("transcoder", "sae")
        for l0, fvu in rng.integers(1, 8, (12, 2)) / 8
    ]  # fmt: skip
    dictionaries += [made(l0=None), made(l0=0.5, fvu=0.125), made(l0=0.5, fvu=0.125)]
    found = on_front(dictionaries, "all")
    for each, is_best in zip(dictionaries, found, strict=True):
        rivals = [d for d in dictionaries if d.site == each.site and d.config.kind == each.config.kind and d.metrics]
        beaten = each.metrics is None or any(
            d.metrics["l0"] <= each.metrics["l0"] and d.metrics["fvu"] <= each.metrics["fvu"]
            and (d.metrics["l0"], d.metrics["fvu"]) != (each.metrics["l0"], each.metrics["fvu"])
            for d in rivals if d.metrics
        )  # fmt: skip
        assert is_best != beaten
    assert 0 < sum(found) < len(found)


def test_dictionaries_measured_on_different_rows_are_not_compared_and_the_table_says_so() -> None:
    good, bad = made(l0=2, fvu=0.1), made(l0=4, fvu=0.3, seed=1)
    assert on_front([good, bad], "all") == [True, False] and "measured on" not in table([good, bad])
    with_titles = pareto([good, bad])
    for key, value in (("pack", "sha256-0123456789"), ("targets", "recomputed")):
        other = made(l0=4, fvu=0.3, seed=1)
        assert other.metrics is not None
        other.metrics = {**other.metrics, key: value}
        assert on_front([good, other], "all") == [False, False]  # nobody to compare with
        assert on_front([good, bad, other, deepcopy(other)], "all") == [True, False, True, True]
        assert "measured on" in table([good, other]) and value.removeprefix("sha256-")[:8] in table([good, other])
        assert pareto([good, other]) != with_titles


# the table


def test_the_table_says_what_varies_and_gives_text_its_groups() -> None:
    text = table([made("txt_0", l0=4, fvu=0.2, seed=0), made("txt_0", l0=5, fvu=0.3, seed=1), made(k=2, lr=1e-3)])
    head, *rest = [line for line in text.splitlines() if "mean of" not in line]
    assert re.split(r"\s{2,}", head) == [
        "dictionary", "sparsity", "seed", "rows", "features", "FVU", "L0", "L0 %", "dead %", "cosine", "held-out rows", "front",
    ]  # fmt: skip
    assert [line.split()[0] for line in rest] == ["transcoder_txt_0", "real", "padding"] * 2 + ["transcoder_img_0"]
    first, real, padding, second, *_, counted = rest
    assert first.split()[1:6] == ["l1", "3e-4", "0", "3,072", "16"] and "0.2000" in first and first.endswith("*")
    assert "0.2000" in real and "0.1000" in padding and padding.endswith("*")
    assert second.split()[3] == "1" and not second.endswith("*") and counted.split()[1:3] == ["k", "2"]
    assert "lr" not in head.split()  # another site's: nothing to compare


def test_the_table_of_dictionaries_that_were_not_measured_says_none() -> None:
    text = table([made(l0=None), made(l0=4, l1=1e-3), made(l0=5, l1=1e-4)])
    _, missing, whole, _ = text.splitlines()
    assert missing.split()[-6:] == ["-", "-", "-", "-", "-", "none"] and whole.endswith("*")
    assert "front" not in table([made(l0=None)]) and table([made(l0=None)]).endswith("none")
    imported = build(DictionaryConfig("sae", Site.parse("img_0"), 4, 16))
    assert table([imported]).splitlines()[1].split()[:3] == ["sae_img_0", "-", "0"]
    partial = made()
    partial.metrics = {**(partial.metrics or {}), "fvu": None}
    assert table([partial]).splitlines()[1].split()[5] == "-" and pareto([partial]) is None


def test_the_table_shows_an_l1_beside_k_and_stars_only_those_that_beat_somebody() -> None:
    both = table([made(l0=4, k=8, l1=1e-3), made(l0=4, fvu=0.3, k=8)])
    _, first, second = both.splitlines()
    assert "k 8, l1 1e-3 " in first and "k 8 " in second and "l1" not in second
    assert on_front([made(l0=4)], "all") == [False] and "front" not in table([made(l0=4)])
    assert on_front([made(l0=2, fvu=1.5), made(l0=4, fvu=1.25, seed=1)], "all") == [False, False]
    assert on_front([made(l0=2, fvu=1.5), made(l0=4, fvu=0.5, seed=1)], "all") == [False, True]


def test_seeds_of_one_setting_have_a_line_with_mean_and_deviation() -> None:
    some = [made("txt_0", l0=l0, fvu=fvu, seed=seed) for seed, (l0, fvu) in enumerate([(2, 0.2), (4, 0.3), (6, 0.4)])]
    lines = table([*some, made("txt_0", l1=1e-3)]).splitlines()
    mean, real, padding = lines[10:13]
    assert re.split(r"\s{2,}", mean.strip())[:5] == ["mean of 3 seeds", "l1 3e-4", "3,072", "16", "0.3000 ± 0.1000"]
    assert real.startswith("  mean of 3 seeds, real ") and "4.0 ± 2.0" in real and " 1,000" in real
    assert padding.startswith("  mean of 3 seeds, padding ") and "0.1500 ± 0.0500" in padding
    assert "mean of" not in table([some[0], made("txt_0", seed=1, lr=1e-3), made("img_0", seed=2)])


def test_points_that_differ_in_more_than_seeds_have_a_label_that_says_so() -> None:
    (panel,) = _panels([made(l0=4), made(l0=5, lr=1e-3, project=True), made(l0=6, lr=1e-3, project=True, seed=1)])
    assert [point.label for point in panel.points] == ["λ 3e-4", *["λ 3e-4, lr 1e-3, project"] * 2]
    (panel,) = _panels([made(l0=4, weight_decay=0.0), made(l0=5, weight_decay=0.1)])
    assert [point.label for point in panel.points] == ["λ 3e-4, weight decay 0", "λ 3e-4, weight decay 0.1"]


# the sweep


def put(out: Path, folder: str, dictionary: Dictionary) -> None:
    torch.nn.init.zeros_(dictionary.encoder.bias)
    dictionary.initialise(0)
    save_dictionary(out / folder / dictionary.name, dictionary, dictionary.metrics, lines(3))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_sweep_covers_every_dictionary_below_out_and_is_the_same_bytes_whoever_trained_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("curves", "density"):  # that these are the same bytes has a test of its own
        monkeypatch.setattr(train.results.sweep, name, lambda content, title: f"{title} {content}".encode())
    one, other = tmp_path / "one", tmp_path / "other"
    put(one, "l1-0.001", made("txt_0", l0=2, fvu=0.5, l1=1e-3))
    save(one)
    put(one, "l1-0.0003", made("txt_0", l0=4, fvu=0.25))
    put(other, "l1-0.0003", made("txt_0", l0=4, fvu=0.25))
    put(other, "l1-0.001", made("txt_0", l0=2, fvu=0.5, l1=1e-3))
    for out in (one, other):
        assert [each.folder for each in save(out)] == ["l1-0.0003/transcoder_txt_0", "l1-0.001/transcoder_txt_0"]
    assert contents(one) == contents(other)
    found = read_self_checked(one / "sweep.json")
    assert {name: entry["sha256"] for name, entry in found["files"].items()} == {
        name: sha256_file(one / name) for name in contents(one) if name in found["files"]
    }
    pictures = {
        f"plots/l1-{l1}/transcoder_txt_0-{what}.png" for l1 in ("0.0003", "0.001") for what in ("curves", "density")
    }
    assert set(found["files"]) == {"pareto.png", "sweep.md", *pictures}
    first = found["dictionaries"][0]
    config = read_self_checked(one / "l1-0.0003/transcoder_txt_0/config.json")
    assert first["id"] == f"sha256-{config['sha256']}" and first["training"]["l1"] == 3e-4
    assert first["figures"]["padding"]["fvu"] == 0.125 and first["figures"]["all"]["front"] is True
    links = re.findall(r"\]\(([^)]+)\)", (one / "sweep.md").read_text())
    assert len(links) == 7 and all((one / link).is_file() for link in links)
    (loaded,) = load_dictionaries(one / "l1-0.001")
    assert loaded.name == "transcoder_txt_0"
    sent(one, str(tmp_path / "shelf"))  # a sweep travels whole, table and pictures with it
    fetched(str(tmp_path / "shelf"), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(one)
    (one / "pareto.png").write_bytes(b"scratched")
    with pytest.raises(DamagedError, match=r"pareto\.png differs from the checksum in sweep\.json"):
        sent(one, str(tmp_path / "another shelf"))


def test_a_sweep_forgets_what_is_gone_and_leaves_out_what_is_not_finished_or_not_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dictionary in (made("img_0"), made("img_10", l0=None), made("img_2")):
        put(tmp_path, "", dictionary)
    assert [each.folder for each in save(tmp_path)] == ["transcoder_img_0", "transcoder_img_2", "transcoder_img_10"]
    assert len(load_dictionaries(tmp_path)) == 3  # the sweep's files are in nobody's way
    shutil.rmtree(tmp_path / "transcoder_img_0")
    (tmp_path / "transcoder_img_2" / "config.json").unlink()
    (tmp_path / "plots" / "mine.png").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    plots = [
        tmp_path / "plots" / f"{name}.png" for name in ("mine", "transcoder_img_0-curves", "transcoder_img_10-curves")
    ]
    kept, *left = (temporary_of(path, "0badf00d") for path in (*plots, tmp_path / "sweep.json"))
    for path in (kept, *left):
        path.touch()
    assert [each.folder for each in save(tmp_path)] == ["transcoder_img_10"]
    assert kept.exists() and not any(path.exists() for path in left)  # of a run that was killed while it wrote
    kept.unlink()
    assert "note: left out of the table:" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["mine.png", "transcoder_img_10-curves.png"]
    assert not (tmp_path / "pareto.png").exists()  # nothing that is left was measured


def test_what_is_damaged_beside_dictionaries_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("curves", "density"):
        monkeypatch.setattr(train.results.sweep, name, lambda _content, title: title.encode())
    put(tmp_path, "", made("img_0"))
    save(tmp_path)
    for name, remedy in (
        ("sweep.json", "Remove it and run the same command again: it is written anew"),
        ("transcoder_img_0/log.jsonl", "train or import the dictionary again"),
        ("transcoder_img_0/config.json", f"remove the folder {tmp_path / 'transcoder_img_0'} and train"),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-3])
        with pytest.raises(DamagedError, match=remedy):
            save(tmp_path)
        (tmp_path / name).write_bytes(whole)
    save(tmp_path)
