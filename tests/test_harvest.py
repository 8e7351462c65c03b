"""A harvest keeps exactly what the model did, the same whatever the batch and however often it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harvest import HarvestSettings, run
from harvest.__main__ import COMMANDS
from harvest.models.model import TINY_FLUX_FOLDER
from store import Site, Store, open_store
from store.command import program
from tests.test_store import tree

ROOT = Path(__file__).parent.parent
IMG, TXT = Site.parse("img_1"), Site.parse("txt_1")


def harvest(out: Path, **options: Any) -> Store:
    defaults: dict[str, Any] = {"images": 6, "layers": "1", "batch_size": 4, "threads": 1, "pictures": "png"}
    run(HarvestSettings(out=out, **{**defaults, **options}))
    return open_store(out)


def command(*words: str) -> int:
    return program("harvest", COMMANDS, list(words), default="harvest")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return harvest(tmp_path_factory.mktemp("plain") / "store")


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import FluxPipeline

    from harvest.quiet import quiet

    with quiet():
        pipe = FluxPipeline.from_pretrained(TINY_FLUX_FOLDER, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_store_holds_the_picture_that_the_plain_pipeline_draws(plain: Store, pipe: Any) -> None:
    rows = plain.prompts()
    for image in (0, 5):
        drawn = pipe(
            rows.column("prompt")[image].as_py(),
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=0.0,
            max_sequence_length=16,
            generator=torch.Generator("cpu").manual_seed(rows.column("seed")[image].as_py()),
        ).images[0]
        picture = plain.picture(image)
        assert picture is not None
        assert np.abs(np.asarray(drawn, int) - np.asarray(picture, int)).max() <= 1


def test_mlp_out_is_the_mlp_of_mlp_in(tmp_path: Path, pipe: Any) -> None:
    store = harvest(tmp_path / "store", store_dtype="float32", images=3)
    for site, mlp in (
        (IMG, pipe.transformer.transformer_blocks[1].ff),
        (TXT, pipe.transformer.transformer_blocks[1].ff_context),
    ):
        for step in store.steps:
            with torch.inference_mode():
                expected = mlp(torch.from_numpy(store.read(site, step, "mlp_in"))).numpy()
            np.testing.assert_allclose(store.read(site, step, "mlp_out"), expected, atol=2e-5)


def test_sigma_is_stored_as_received_and_as_scheduled(plain: Store, tmp_path: Path) -> None:
    assert plain.prompts().column("sigma")[0].as_py() == [1.0, 0.75, 0.5, 0.25]
    half = harvest(tmp_path / "half", dtype="bfloat16", images=1, batch_size=1)
    assert half.prompts().column("sigma")[0].as_py() == [1.0, 0.75390625, 0.5, 0.25]
    assert half.prompts().column("scheduler_sigma")[0].as_py() == [1.0, 0.75, 0.5, 0.25]


def test_a_picture_does_not_depend_on_its_batch(plain: Store, tmp_path: Path) -> None:
    alone = harvest(tmp_path / "store", batch_size=1)
    for image in range(6):
        one, other = alone.picture(image), plain.picture(image)
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    np.testing.assert_allclose(
        alone.read(IMG, 3, "mlp_in").astype(np.float32), plain.read(IMG, 3, "mlp_in").astype(np.float32), atol=0.05
    )


def test_sampled_tokens_are_rows_of_the_full_store(plain: Store, tmp_path: Path) -> None:
    few = harvest(tmp_path / "store", tokens="7", text_tokens="real+2", steps="1,3", streams="img,txt")
    assert few.steps == (1, 3)
    lengths = few.prompts().column("text_length").to_numpy()
    for site in (IMG, TXT):
        for step in few.steps:
            positions = few.tokens(site.stream, step)
            full, kept = plain.read(site, step, "mlp_out"), few.read(site, step, "mlp_out")
            for image in range(6):
                there = positions[image][positions[image] >= 0]
                np.testing.assert_array_equal(kept[image][: len(there)], full[image][there])
                if site is TXT:
                    assert len(there) == min(lengths[image] + 2, 16)


def test_truth_says_what_was_drawn_and_where(plain: Store) -> None:
    rows = [json.loads(text) for text in plain.prompts().column("truth").to_pylist()]
    assert sum(row["drawn"] for row in rows) >= 5
    for row in rows:
        for thing in row["objects"]:
            assert len(thing["coverage"]) == 64
            assert 1 <= sum(thing["coverage"]) <= 40


def test_equal_settings_give_equal_bytes(plain: Store, tmp_path: Path) -> None:
    again = harvest(tmp_path / "elsewhere" / "again")
    assert tree(again.path) == tree(plain.path)


QUICK: dict[str, Any] = {"images": 160, "layers": "1", "num_inference_steps": 1, "streams": "txt", "pictures": "none"}


def started(out: Path, *more: str) -> "subprocess.Popen[bytes]":
    """A harvest of three parts in a process of its own, with the settings of `QUICK`."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    words = [sys.executable, "-m", "harvest", *flags, "--threads", "1", "--batch-size", "4", "--out", str(out), *more]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def stopped(out: Path, marker: str, how: signal.Signals) -> int:
    """Run a harvest and stop it as soon as the file `marker` is there; its exit code."""
    process = started(out)
    while not (out / marker).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(how)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.slow
def test_a_harvest_killed_at_any_time_goes_on_and_ends_in_the_same_store(tmp_path: Path) -> None:
    whole = harvest(tmp_path / "whole", **QUICK)
    broken = tmp_path / "broken"
    assert stopped(broken, "zarr.json", signal.SIGKILL) == -signal.SIGKILL  # while it is being created
    assert not (broken / "commits/part-00000.json").exists()
    assert stopped(broken, "commits/part-00000.json", signal.SIGTERM) == 1  # while a part is being drawn
    assert not (broken / "seal.json").exists()
    summary = run(HarvestSettings(resume=broken))
    assert summary.finished  # type: ignore[attr-defined]
    assert tree(broken) == tree(whole.path)


@pytest.mark.slow
def test_processes_that_share_a_store_by_parts_make_the_same_store(tmp_path: Path) -> None:
    whole = harvest(tmp_path / "whole", **QUICK)
    both = [started(tmp_path / "split", "--parts", parts) for parts in ("2", "0-1")]
    assert [process.wait(timeout=120) for process in both] == [0, 0], [process.communicate() for process in both]
    for process in both:
        process.communicate()
    assert tree(tmp_path / "split") == tree(whole.path)


def test_the_function_runs_as_often_as_it_is_called(tmp_path: Path) -> None:
    import harvest as package

    for _ in range(2):
        package.run(HarvestSettings(out=tmp_path / "store", **{**QUICK, "images": 1}))  # type: ignore[arg-type]


def test_the_same_command_on_a_finished_store_does_nothing(plain: Store, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(plain.path)
    harvest(Path(plain.path))
    assert "0 images harvested" in capsys.readouterr().out
    assert tree(plain.path) == before


def test_copied_weights_recompute_mlp_out(tmp_path: Path) -> None:
    from safetensors.torch import load

    store = harvest(tmp_path / "store", weights="copy", images=2, store_dtype="float32")
    weights = load(store.weights_file(IMG) or b"")
    x = torch.from_numpy(store.read(IMG, 0, "mlp_in"))
    before = x @ weights["net.0.proj.weight"].T + weights["net.0.proj.bias"]
    hidden = torch.nn.functional.gelu(before, approximate="tanh")
    y = hidden @ weights["net.2.weight"].T + weights["net.2.bias"]
    np.testing.assert_allclose(store.read(IMG, 0, "mlp_out"), y.numpy(), atol=2e-5)


def test_any_real_prompt_harvests_without_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    prompts = [
        "portrait of an élan vital, 8k, octane render, " * 12 + "4k",
        "日本の風景 🌸 — ultra-wide",
        "A",
        "x" * 700,
        "tab\there :: 2",
    ]
    file.write_text("\n".join(prompts))
    store = harvest(tmp_path / "store", prompts=str(file), images=None, max_sequence_length=64)
    assert store.prompts().column("prompt").to_pylist() == prompts
    shown = capfd.readouterr()
    assert "warn" not in (shown.out + shown.err).lower()
    assert "cut at 64 T5 tokens" in shown.out


def words(*more: str) -> Sequence[str]:
    return ["--images", "2", "--threads", "1", *more]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--layers", "0-15"], 2, "tiny-flux has double blocks 0 to 4"),
        (["--layers", "single:0-2"], 2, "tiny-flux has single blocks 0 to 1: write --layers single:all"),
        (["--layers", "first"], 2, "write numbers and ranges"),
        (["--steps", "4"], 2, "there is no step 4"),
        (["--streams", "img,video"], 2, "is no stream"),
        (["--tokens", "65"], 2, "from 1 to 64"),
        (["--text-tokens", "most"], 2, r"real\+N"),
        (["--resolution", "60"], 2, "multiples of 8"),
        (["--resolution", "64", "--height", "64", "--width", "64"], 2, "not both"),
        (["--height", "64"], 2, "together"),
        (["--guidance", "3.5"], 2, "no guidance embedding"),
        (["--guidance", "nan"], 2, "must be 0 or more"),
        (["--batch-size", "0"], 2, "at least 1"),
        (["--parts", "1"], 2, "there is no part 1"),
        (["--device", "tpu"], 2, "is no device"),
        (["--device", "cuda"], 2, "sees no CUDA device"),
        (["--max-sequence-length", "513"], 2, "at most 512"),
        (["--model", "tiny-flax"], 2, "unknown model 'tiny-flax'"),
        (["--model", "."], 2, "has no model_index.json"),
        (["--model", "black-forest-labs/FLUX.1-schnell", "--layers", "0-15"], 2, "gated.*MODEL=tiny-flux"),
        (["--prompts", "a red circle " * 40], 2, "there is no prompt file"),
        (["--prompts", "nowhere.txt"], 2, "there is no prompt file"),
        (["--store-dtype", "int8"], 2, None),
        (["--frobnicate"], 2, None),
    ],
)
def test_wrong_arguments_are_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str | None
) -> None:
    import re

    out = tmp_path / "store"
    assert command(*words(*more), "--out", str(out)) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert not out.exists()
    if message is not None:
        assert error.startswith("error: ")
        assert re.search(message, error, re.DOTALL), error


def test_no_place_to_write_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--images", "2") == 2
    assert "--out STORE" in capsys.readouterr().err


def test_a_folder_with_another_run_is_refused(plain: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--images", "6", "--layers", "1", "--threads", "1", "--seed", "9", "--out", str(plain.path)) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_full_disk_is_refused_before_the_first_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    assert command(*words("--out", str(tmp_path / "store"))) == 1
    assert not (tmp_path / "store").exists()
    assert "has 1 KB free" in capsys.readouterr().err


def test_a_disk_that_fills_up_meanwhile_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from store.writer import StoreWriter

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(StoreWriter, "_encoded", full)
    assert command(*words("--out", str(tmp_path / "store"))) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "What was committed is safe" in error
