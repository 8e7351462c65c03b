"""Activations that others made become a store: the same values, in bounded memory, resumable; what cannot be is refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from store import Site, open_store
from store.command import program
from store.errors import DamagedError, NonFiniteError, UsageError
from store.foreign.arrays import Rows, open_array
from store.foreign.importing import ImportSettings, run
from store.foreign.schedules import received_sigmas, scheduler_sigmas
from store.info import describe
from store.split import split_of
from store.tokens import kept_positions
from store.writer import StoreWriter
from tests.foreign_files import COMMAND, files, imported, normal, saved

GOLDEN = Path(__file__).parent / "golden" / "scores_a"
IMG, TXT = Site.parse("img_5"), Site.parse("txt_5")


def bits(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).tobytes()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize(
    ("dtype", "store_dtype", "expected"),
    [
        (np.float32, None, ml_dtypes.bfloat16),
        (np.float16, None, np.float16),
        (ml_dtypes.bfloat16, None, ml_dtypes.bfloat16),
        (np.float64, None, ml_dtypes.bfloat16),
        (np.float32, "float32", np.float32),
        (np.float32, "float16", np.float16),
        (np.float16, "bfloat16", ml_dtypes.bfloat16),
        (np.float64, "float32", np.float32),
    ],
)
def test_values_of_every_format_and_dtype_are_those_of_the_file_rounded_once(
    tmp_path: Path, suffix: str, dtype: Any, store_dtype: Any, expected: Any
) -> None:
    values = normal(6, 9, 8, dtype=dtype)
    store = imported(tmp_path, saved(tmp_path / f"a{suffix}", values), store_dtype=store_dtype)
    found = store.read(IMG, 0, "mlp_out")
    assert found.dtype == expected
    assert bits(found) == bits(values.astype(expected))
    lost = values.astype(np.float64) - found.astype(np.float64)
    assert store.statistics(IMG, 0, "mlp_out").error == pytest.approx((lost**2).sum(), rel=1e-9, abs=0)
    assert (store.points, store.steps, store.meta.grid) == (("mlp_out",), (0,), (3, 3))


def test_numbers_of_the_other_byte_order_mean_what_they_say(tmp_path: Path) -> None:
    values = normal(3, 4, 8).astype(">f4")
    store = imported(tmp_path, saved(tmp_path / "a.npy", values), store_dtype="float32")
    np.testing.assert_array_equal(store.read(IMG, 0, "mlp_out"), values.astype("<f4"))


def test_fp8_is_near_and_its_cost_is_measured(tmp_path: Path) -> None:
    values = normal(6, 16, 32)
    store = imported(tmp_path, saved(tmp_path / "a.npy", values), store_dtype="fp8-e4m3", codec="zstd")
    found = store.read(IMG, 0, "mlp_out").astype(np.float32)
    relative = np.sqrt(((found - values) ** 2).sum() / (values**2).sum())
    assert 0.01 < relative < 0.04
    assert store.statistics(IMG, 0, "mlp_out").relative_error == pytest.approx(relative, rel=0.01)


def test_the_golden_activations_give_the_golden_scores(tmp_path: Path) -> None:
    import shutil

    import zarr

    from analyze.scoring import scores
    from analyze.scoring.settings import ScoresSettings

    golden = safetensors.numpy.load_file(GOLDEN / "first_images.safetensors")
    store = imported(tmp_path, GOLDEN / "first_images.safetensors", store_dtype="float32")
    assert (store.n_images, store.meta.grid, store.meta.d_model) == (4, (8, 8), 48)
    np.testing.assert_array_equal(store.read(IMG, 0, "mlp_out"), golden["activations"])
    (tmp_path / "dictionaries").mkdir()
    shutil.copy(GOLDEN / "sae_best.pt", tmp_path / "dictionaries" / "sae_img_5.pt")
    where = {"store": tmp_path / "store", "dictionaries": tmp_path / "dictionaries", "out": tmp_path / "out"}
    scores.run(ScoresSettings(**where))  # type: ignore[arg-type]
    found = zarr.open_array(tmp_path / "out" / "img_5" / "step.0" / "scores", mode="r")[:]
    np.testing.assert_allclose(np.asarray(found), golden["S"], atol=1e-5)


def test_rows_of_many_steps_in_one_long_array_are_told_apart(tmp_path: Path) -> None:
    values = normal(3, 5, 6, 8)
    flat = saved(tmp_path / "flat.npy", values.reshape(-1, 8))
    store = imported(
        tmp_path, flat, rows_per_image="5x6", step="1,3", grid="2x3", sigma="1,.9,.7,.5,.2", store_dtype="float32"
    )
    assert (store.steps, store.meta.num_inference_steps, store.meta.grid) == ((1, 3), 5, (2, 3))
    for step in (1, 3):
        np.testing.assert_array_equal(store.read(IMG, step, "mlp_out"), values[:, step])
    assert store.prompts()["sigma"][0].as_py() == pytest.approx([1, 0.9, 0.7, 0.5, 0.2])
    for shape in ((3, 30, 8), (15, 6, 8), (3, 5, 6, 8)):
        array = open_array(saved(tmp_path / "other.npy", values.reshape(shape)), rows=Rows(5, 6))
        np.testing.assert_array_equal(array.read(2, 4), values[2, 4])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_the_files_of_a_folder_follow_one_another_in_natural_order(tmp_path: Path, suffix: str) -> None:
    values = normal(12, 4, 8)
    for image in range(12):
        saved(tmp_path / "dump" / f"image_{image}{suffix}", values[image])  # 10 comes after 9, and not after 1
    (tmp_path / "dump" / "notes.txt").write_text("made on a Monday")
    store = imported(tmp_path, tmp_path / "dump", store_dtype="float32")
    np.testing.assert_array_equal(store.read(IMG, 0, "mlp_out"), values)
    (facts,) = (store.meta.parent or {})["imported"]
    assert (facts["file"], facts["files"], facts["shape"]) == ("dump", 12, [12, 4, 8])


def test_files_of_several_images_are_joined(tmp_path: Path) -> None:
    values = normal(7, 4, 8)
    for name, images in {"batch_0": values[:3], "batch_1": values[3:5], "batch_2": values[5:]}.items():
        saved(tmp_path / "dump" / f"{name}.npy", images)
    store = imported(tmp_path, tmp_path / "dump", images=6, store_dtype="float32")
    np.testing.assert_array_equal(store.read(IMG, 0, "mlp_out"), values[:6])


def test_several_arrays_make_a_store_of_several_sites_steps_and_points(tmp_path: Path) -> None:
    arrays = {
        f"{site}:{step}:{point}": normal(4, 4 if "img" in site else 6, 8, seed=number)
        for number, (site, step, point) in enumerate(
            (site, step, point) for site in ("img_5", "txt_5") for step in (1, 2) for point in ("mlp_in", "mlp_out")
        )
    }
    path = tmp_path / "all.safetensors"
    safetensors.numpy.save_file({name.replace(":", "."): values for name, values in arrays.items()}, path)
    words = [f"{name}={path}#{name.replace(':', '.')}" for name in arrays]
    store = imported(tmp_path, *words[:2], ",".join(reversed(words[2:])), store_dtype="float32")
    assert (store.meta.sites, store.steps, store.points) == (("img_5", "txt_5"), (1, 2), ("mlp_in", "mlp_out"))
    for name, values in arrays.items():
        site, step, point = name.split(":")
        np.testing.assert_array_equal(store.read(Site.parse(site), int(step), point), values)  # type: ignore[arg-type]
    assert store.prompts()["text_length"].to_pylist() == [6] * 4
    run(ImportSettings(activations=tuple(words), out=tmp_path / "again", store_dtype="float32"))
    assert files(tmp_path / "again") == files(tmp_path / "store")  # the order of the flags decides nothing


def test_a_joint_site_is_text_then_image(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", normal(3, 10, 8))
    store = imported(tmp_path, path, site="joint_2", grid="2x3")
    assert (store.meta.max_sequence_length, store.meta.grid) == (4, (2, 3))
    with pytest.raises(UsageError, match="say --grid"):
        imported(tmp_path / "b", path, site="joint_2")
    with pytest.raises(UsageError, match="which are not"):
        imported(tmp_path / "b", path, site="joint_2", grid="4x3")


def test_tokens_are_drawn_as_a_harvest_draws_them(tmp_path: Path) -> None:
    values = normal(5, 16, 8)
    store = imported(tmp_path, saved(tmp_path / "a.npy", values), tokens="3", seed=7, store_dtype="float32")
    policy = store.meta.tokens["img"]
    for image in range(5):
        kept = kept_positions(policy, 7, image, 0, "img", 0)
        np.testing.assert_array_equal(store.tokens("img", 0)[image], kept)
        np.testing.assert_array_equal(store.read(IMG, 0, "mlp_out")[image], values[image, kept])


def test_real_text_tokens_are_those_that_the_prompt_file_names(tmp_path: Path) -> None:
    values = normal(3, 6, 8)
    rows = [{"prompt": f"a {i}", "text_length": n, "seed": 40 + i, "mood": "calm"} for i, n in enumerate((2, 4, 3))]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = imported(
        tmp_path, saved(tmp_path / "a.npy", values), site="txt_5", prompts=tmp_path / "p.jsonl", text_tokens="real",
        store_dtype="float32",
    )  # fmt: skip
    assert store.meta.tokens["txt"].kept == 4
    found = store.read(TXT, 0, "mlp_out")
    for image, length in enumerate((2, 4, 3)):
        np.testing.assert_array_equal(found[image, :length], values[image, :length])
        assert np.isnan(found[image, length:]).all()
        assert (store.tokens("txt", 0)[image, length:] == -1).all()
    table = store.prompts()
    assert (table["seed"].to_pylist(), table["mood"].to_pylist()) == ([40, 41, 42], ["calm"] * 3)


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.parquet"])
def test_prompts_of_every_kind_of_file_are_kept_with_their_split(tmp_path: Path, name: str) -> None:
    prompts = ["a red circle, small", "zwei Kreise ä", "3"]
    path = tmp_path / name
    if name == "p.txt":
        path.write_text("\n\n".join(prompts) + "\n")
    elif name == "p.csv":
        path.write_text("prompt,size\n" + "\n".join(f'"{text}",{i}' for i, text in enumerate(prompts)))
    else:
        pq.write_table(pa.table({"prompt": prompts, "size": [0, 1, 2], "truth": ["x"] * 3}), path)
    store = imported(tmp_path, saved(tmp_path / "a.npy", normal(6, 4, 8)), prompts=path, seeds_per_prompt=2)
    table = store.prompts()
    assert table["prompt"].to_pylist() == [text for text in prompts for _ in range(2)]
    assert table["split"].to_pylist() == [split_of(text) for text in prompts for _ in range(2)]
    assert table["seed"].to_pylist() == [None] * 6
    assert "size" not in table.column_names if name == "p.txt" else table["size"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert "truth" not in table.column_names
    assert (store.meta.prompts["source"], store.meta.prompts["count"]) == (name, 3)


def test_what_nobody_said_is_assumed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = imported(tmp_path, saved(tmp_path / "acts.npy", normal(100, 5, 8)))
    prompts = store.prompts()
    assert prompts["prompt"].to_pylist() == [f"image {i} of acts.npy" for i in range(100)]
    assert set(prompts["split"].to_pylist()) == {"train", "val"}
    assert prompts["sigma"][0].as_py() == [1.0, 0.75390625, 0.5, 0.25]
    assert (store.meta.grid, store.meta.model["id"]) == ((1, 5), "unknown")
    assumed = (store.meta.parent or {})["assumed"]
    said = capsys.readouterr().out
    for words in ("1 x 5", "FLUX.1[schnell]", "no prompts are known", "nothing about the model"):
        assert any(words in sentence for sentence in assumed)
        assert words in said
    assert "unknown" in describe(store)


def test_what_was_said_is_not_assumed(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo")
    store = imported(
        tmp_path, saved(tmp_path / "a.npy", normal(2, 6, 8)), prompts=tmp_path / "p.txt", grid="2x3", sigma="0.5",
        model_id="some/model", revision="main", guidance=3.5, pixels_per_token=8,
    )  # fmt: skip
    assert (store.meta.parent or {})["assumed"] == []
    assert (store.meta.height, store.meta.width, store.meta.num_inference_steps) == (16, 24, 1)
    assert (store.meta.model["id"], store.meta.model["revision"], store.meta.guidance) == ("some/model", "main", 3.5)


@pytest.mark.parametrize(("name", "steps", "tokens"), [("schnell", 4, 1024), ("dev", 20, 4096), ("dev", 28, 256)])
def test_computed_sigmas_are_those_of_the_scheduler_in_bfloat16(name: Any, steps: int, tokens: int) -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=name == "dev", shift=3.0 if name == "dev" else 1.0)
    mu = np.interp(tokens, [256, 4096], [0.5, 1.15])
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    scheduled = scheduler_sigmas(name, steps, tokens)
    np.testing.assert_allclose(scheduled, scheduler.sigmas[:-1].numpy(), rtol=3e-7)
    received = (scheduler.timesteps.to(torch.bfloat16) / 1000).float().numpy()
    np.testing.assert_array_equal(received_sigmas(scheduled), received)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """400 MB are read; a part has 8 MB and an image 1 MB."""
    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float32, shape=(400, 256, 1024))
    array[::7, 3, 5] = 1.0  # the rest stays a hole in the file
    del array
    saved(tmp_path / "small.npy", normal(2, 4, 8))
    code = """
        import re, sys
        from pathlib import Path
        from store.foreign.importing import ImportSettings, run
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        folder = Path(sys.argv[1])
        def grown(name, **more):
            before = peak()
            run(ImportSettings(activations=(str(folder / name),), site="img_0", step="0", out=folder / (name + ".store"), **more))
            return peak() - before
        grown("small.npy")  # loads what is loaded once
        print("GROWN", grown("a.npy", tokens="16"))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("GROWN")[1]) < 64 * 2**20
    assert open_store(tmp_path / "a.npy.store").n_images == 400


def test_an_import_that_is_killed_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", normal(130, 9, 8, dtype=np.float16))
    words = ["import", "--activations", f"img_5:0={path}", "--store-dtype", "float32", "--tokens", "4", "--out"]
    assert program("store", COMMAND, [*words, str(tmp_path / "whole")]) == 0
    whole = files(tmp_path / "whole")
    assert len(open_store(tmp_path / "whole").committed_parts) == 3
    code = """
        import os, signal, sys
        from pathlib import Path
        from store.files import temporary_of
        from store.foreign.importing import ImportSettings, run
        from store.writer import StoreWriter
        put = StoreWriter._put
        def dies(self, name, pieces, lease):
            if name == "statistics/part-00001.safetensors":
                temporary_of(self.path / name, lease.tag).write_bytes(b"torn")
                os.kill(os.getpid(), signal.SIGKILL)
            return put(self, name, pieces, lease)
        StoreWriter._put = dies
        run(ImportSettings(activations=(sys.argv[1],), store_dtype="float32", tokens="4", out=Path(sys.argv[2])))
    """
    killed = [sys.executable, "-c", textwrap.dedent(code), f"img_5:0={path}", tmp_path / "killed"]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    assert open_store(tmp_path / "killed", unfinished=True).committed_parts == (0,)
    first = (tmp_path / "killed" / "commits" / "part-00000.json").stat().st_mtime_ns
    assert [name for name in files(tmp_path / "killed") if name.endswith(".tmp")]
    assert program("store", COMMAND, [*words, str(tmp_path / "killed")]) == 0
    assert files(tmp_path / "killed") == whole
    assert (tmp_path / "killed" / "commits" / "part-00000.json").stat().st_mtime_ns == first
    assert program("store", COMMAND, [*words, str(tmp_path / "killed")]) == 0  # and once more changes nothing
    assert files(tmp_path / "killed") == whole


def test_a_file_that_changed_meanwhile_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(70, 20, 8)
    saved(tmp_path / "a.npy", values)
    write = StoreWriter.write_part

    def dies(self: StoreWriter, part: int, *rest: Any) -> None:
        if part == 1:
            raise KeyboardInterrupt
        write(self, part, *rest)

    monkeypatch.setattr(StoreWriter, "write_part", dies)
    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path, tmp_path / "a.npy", store_dtype="float32", codec="zstd")
    monkeypatch.undo()
    saved(tmp_path / "a.npy", values + 1)
    with pytest.raises(UsageError, match=r"holds another run; it differs in\n  parent.imported"):
        imported(tmp_path, tmp_path / "a.npy", store_dtype="float32", codec="zstd")
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(UsageError, match="was truncated, or is still being written"):
        imported(tmp_path, tmp_path / "a.npy", store_dtype="float32", codec="zstd")


def test_a_file_that_is_cut_while_it_is_read_is_an_error_of_ours(tmp_path: Path) -> None:
    array = open_array(saved(tmp_path / "a.npy", normal(4, 4, 8)))
    os.truncate(tmp_path / "a.npy", 400)
    assert array.read(0, 0).shape == (4, 8)
    with pytest.raises(DamagedError, match=r"a.npy became shorter"):
        array.read(3, 0)


@pytest.mark.parametrize(
    ("value", "store_dtype", "words"),
    [
        (np.nan, None, "holds nan"),
        (-np.inf, "float32", "holds -inf"),
        (7e4, "float16", "holds 70000, which float16 cannot hold"),
    ],
)
def test_a_value_that_is_no_number_stops_the_import_by_name_and_commits_nothing_of_its_part(
    tmp_path: Path, value: float, store_dtype: Any, words: str
) -> None:
    values = normal(70, 20, 8)
    values[69, 17, 3] = value
    path = saved(tmp_path / "a.npy", values)
    pattern = rf"mlp_out of img_5 at step 0, image 69, token 17, channel 3 {words}.* \({path}\).*Nothing of this part"
    with pytest.raises(NonFiniteError, match=pattern):
        imported(tmp_path, path, store_dtype=store_dtype)
    assert open_store(tmp_path / "store", unfinished=True).committed_parts == (0,)
    assert not [name for name in files(tmp_path / "store") if "part-00001" in name or "c.1." in name or ".tmp" in name]


def test_plan_says_what_would_be_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "a.npy", normal(100, 4, 8))
    assert not run(
        ImportSettings(activations=(str(path),), site="img_5", step="0", out=tmp_path / "store", plan=True)
    ).finished
    assert "100 images" in (said := capsys.readouterr().out) and "12.8 KB are read, 6.4 KB written in 2 parts" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npy"]


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    path = saved(tmp_path / "a.npy", normal(100, 4, 8))
    words = ["--activations", str(path), "--site", "img_5", "--step", "0", "--out", str(tmp_path / "store")]
    assert program("store", COMMAND, ["import", *words]) == 1
    assert "6.4 KB are still to be written and the disk has 1 KB free" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_an_imported_store_packs_and_trains_a_transcoder_and_an_sae(tmp_path: Path) -> None:
    from analyze.scoring import scores
    from analyze.scoring.settings import ScoresSettings
    from store.pack import PackSettings
    from store.pack import run as pack
    from train import TrainSettings
    from train import run as train

    words = [
        f"img_5:1:{point}={saved(tmp_path / f'{point}.npy', normal(60, 16, 8))}" for point in ("mlp_in", "mlp_out")
    ]
    imported(tmp_path, *words)
    pack(PackSettings(store=tmp_path / "store", out=tmp_path / "pack"))
    for kind in ("transcoder", "sae"):
        train(
            TrainSettings(
                pack=tmp_path / "pack", out=tmp_path / "dictionaries", kind=kind, activation="topk", k=4, batch=64,
                expansion=2, threads=1, time_embed_dim=16,
            )  # type: ignore[arg-type]
        )  # fmt: skip
    where = {"store": tmp_path / "store", "dictionaries": tmp_path / "dictionaries", "out": tmp_path / "out"}
    assert scores.run(ScoresSettings(**where)).computed == 2  # type: ignore[arg-type]
