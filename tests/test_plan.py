"""What a harvest says beforehand is what it then writes; what does not fit is refused; `--plan` writes nothing."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

import harvest.fill
import harvest.planning.budget
import harvest.planning.estimate
import harvest.planning.plan
from harvest import HarvestSettings, run
from harvest.__main__ import COMMANDS
from harvest.models.model import tensors_hash
from harvest.planning.budget import Choice, choices, varied
from harvest.planning.estimate import Disk, announce, refuse_what_does_not_fit, spans, volume_of
from harvest.planning.plan import Outline, Plan, make_outline, make_plan
from harvest.prompts import load_prompts
from harvest.settings import DEV, SCHNELL
from store import open_store
from store.command import program
from store.errors import GranaryError, UsageError
from store.format import StreamTokens
from store.sizes import human_size
from tests.test_store import tree

SMALL: dict[str, Any] = {"images": 3, "layers": "1", "batch_size": 4, "threads": 1, "num_inference_steps": 2}


def command(*words: str) -> int:
    return program("harvest", COMMANDS, list(words), default="harvest")


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of 70 images in two parts."""
    return make_plan(HarvestSettings(plan=True, **{**SMALL, "images": 70}))


def flux(**options: Any) -> Outline:
    return make_outline(HarvestSettings(plan=True, **{"model": SCHNELL, "layers": "0-15", "images": 8, **options}))


def sizes_of(folder: Path, inside: str = "") -> list[int]:
    return [file.stat().st_size for file in (folder / inside).rglob("*") if file.is_file()]


# what is planned, and what is written


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "copy", "pictures": "png"},
        {"store_dtype": "fp8-e4m3", "tokens": "7", "text_tokens": "real+2", "steps": "1", "pictures": "none"},
        {"targets": "recomputed", "streams": "txt", "text_tokens": "real"},
    ],
)
def test_the_bytes_and_files_planned_are_those_written(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(harvest.fill, "announce", lambda plan, *_, **__: plans.append(plan))
    run(HarvestSettings(out=tmp_path / "store", **SMALL, **options))
    volume = volume_of(plans[0])
    planned, written = volume.by_kind(1, new=True), {}
    for kind in ("activations", "tokens"):
        chunks = list((tmp_path / "store" / kind).rglob("c.*"))
        written[kind] = sum(file.stat().st_size for file in chunks)
    assert written == {kind: planned[kind] for kind in written}
    everything = sizes_of(tmp_path / "store")
    assert volume.files(1, new=True) == len(everything)
    assert volume.folders == sum(1 for each in (tmp_path / "store").rglob("*") if each.is_dir()) + 1
    weights = sum(sizes_of(tmp_path / "store", "weights"))
    assert planned["weights"] == pytest.approx(weights, abs=200 * len(volume.weights))
    statistics = sum(sizes_of(tmp_path / "store", "statistics"))
    assert 0.8 * statistics < planned["statistics"] < 1.25 * statistics
    tables = sum(sum(sizes_of(tmp_path / "store", folder)) for folder in ("prompts", "images"))
    rest = sum(everything) - sum(written.values()) - weights - statistics - tables
    assert 0.6 * rest < planned["commits"] + planned["metadata"] < 1.6 * rest
    assert tables < planned["prompts"] + planned.get("pictures", 0)  # which are those of a part of 64 images


def test_what_is_written_once_does_not_count_again(plan: Plan) -> None:
    volume = volume_of(plan)
    assert volume.files(2, new=True) - volume.files(1, new=True) == volume.files(1, new=False)
    assert volume.by_kind(1, new=False).keys() == volume.part.keys()
    assert volume.on_disk(2, True, 4096) > sum(volume.by_kind(2, True).values())


def test_the_plan_says_which_number_of_images_can_be_extended(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    announce(plan, None, [0, 1], measure=False)
    assert "6 images leave the last part short: this store cannot be extended as it is; with --images 128 it could" in (
        capsys.readouterr().out
    )
    announce(replace(plan, meta=replace(plan.meta, n_images=128)), None, [0, 1], measure=False)
    assert "the store can be extended" in capsys.readouterr().out


def test_only_what_is_missing_counts(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    announce(plan, tmp_path / "store", [1], measure=False)
    shown = capsys.readouterr().out
    assert "6 images in 1 part; the other parts" in shown
    assert human_size(volume_of(plan).by_kind(1, True)["activations"]) in shown
    announce(plan, tmp_path / "store", [])
    assert "nothing to harvest" in capsys.readouterr().out


def test_spans_of_numbers() -> None:
    assert (spans((0, 1, 2, 3, 7)), spans((4,)), spans((1, 3))) == ("0-3,7", "4", "1,3")


# what does not fit


def test_a_disk_with_too_few_bytes_or_inodes_is_refused_to_the_byte(plan: Plan, tmp_path: Path) -> None:
    volume = volume_of(plan)
    needed, inodes = volume.on_disk(2, True, 512), volume.files(2, True) + volume.folders
    refuse_what_does_not_fit(volume, Disk(tmp_path, needed, inodes, 512), 2, new=True)
    refuse_what_does_not_fit(volume, Disk(tmp_path, needed, None, 512), 2, new=True)
    with pytest.raises(GranaryError, match=rf"{human_size(needed)} are still .*64 of these images would fit.*--tokens"):
        refuse_what_does_not_fit(volume, Disk(tmp_path, needed - 1, inodes, 512), 2, new=True)
    with pytest.raises(GranaryError, match=rf"{inodes} files and folders .* has {inodes - 1} inodes free"):
        refuse_what_does_not_fit(volume, Disk(tmp_path, needed, inodes - 1, 512), 2, new=True)


@pytest.mark.parametrize("lacking", ["bytes", "inodes"])
@pytest.mark.parametrize("flag", [(), ("--plan",)])
def test_a_full_disk_ends_a_harvest_and_a_plan_with_1_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lacking: str, flag: tuple[str]
) -> None:
    usage, about = shutil.disk_usage(tmp_path), os.statvfs(tmp_path)
    if lacking == "bytes":
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    else:
        changed = [10 if i == 7 else value for i, value in enumerate(about)]  # f_favail
        monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result([*changed[:5], 1000, *changed[6:]]))
    assert command("--images", "2", "--layers", "1", "--threads", "1", *flag, "--out", str(tmp_path / "store")) == 1
    shown = capsys.readouterr()
    assert ("has 1 KB free" if lacking == "bytes" else "has 10 inodes free") in shown.err
    assert "site " in shown.out  # the plan, with its bytes by site
    assert list(tmp_path.iterdir()) == []


# measuring


def test_plan_measures_and_writes_nothing_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--images", "3", "--layers", "1", "--threads", "1", "--num-inference-steps", "2"]
    assert command(*words, "--plan", "--out", str(tmp_path / "deep" / "store")) == 0
    shown = capsys.readouterr().out
    assert "images/s" in shown
    assert "limited by drawing" in shown
    assert list(tmp_path.iterdir()) == []
    assert command(*words, "--plan") == 0  # nor does it need a place


def test_a_measured_harvest_is_byte_equal_to_one_that_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(HarvestSettings(out=tmp_path / "plain", **SMALL))
    assert "not measured" in capsys.readouterr().out
    monkeypatch.setattr(harvest.planning.estimate, "FEW_BATCHES", 0)
    run(HarvestSettings(out=tmp_path / "measured", **SMALL))
    assert "was drawn in" in capsys.readouterr().out
    assert tree(tmp_path / "plain") == tree(tmp_path / "measured")
    before = tree(tmp_path / "plain")
    run(HarvestSettings(out=tmp_path / "plain", plan=True, **SMALL))
    assert tree(tmp_path / "plain") == before


def test_a_batch_that_the_device_cannot_hold_is_one_message(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr("harvest.drawing.fill_part", full)
    with pytest.raises(
        GranaryError, match=r"a batch of 4 images does not fit on cpu: CUDA out .* 2.00 GiB\. Use a smaller --batch-"
    ):
        announce(plan, None, [0])


def test_all_that_is_missing_has_to_fit_whatever_a_workers_share_is(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    volume, block = volume_of(plan), Disk.of(tmp_path).block
    one, both = (volume.on_disk(parts, True, block) for parts in (1, 2))
    assert one < both
    free = [both]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=free[0]))
    announce(plan, tmp_path / "store", [0, 1], [1], measure=False)
    shown = capsys.readouterr().out
    assert "6 images in 1 part; the other parts" in shown
    assert f"all 2 missing parts, of all workers, take {human_size(both)}" in shown
    free[0] = both - 1
    with pytest.raises(GranaryError, match=f"for all 2 missing parts, {human_size(one)} of it in the 1 part that this"):
        announce(plan, tmp_path / "store", [0, 1], [1], measure=False)


def test_compression_is_not_foreseen_and_the_plan_says_so(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    announce(replace(plan, meta=replace(plan.meta, codec="zstd")), None, [0], measure=False)
    assert "codec zstd, before compression" in capsys.readouterr().out


def test_a_plan_of_another_run_is_refused(tmp_path: Path) -> None:
    run(HarvestSettings(out=tmp_path / "store", **SMALL))
    with pytest.raises(UsageError, match="holds another run"):
        run(HarvestSettings(out=tmp_path / "store", plan=True, **{**SMALL, "seed": 3}))


# a published model whose weights are not here


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(harvest.planning.plan, "load_frame", fail)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_flux_is_planned_from_its_published_sizes() -> None:
    meta = flux().meta
    assert 2 * meta.row_bytes == 12_288  # a bfloat16 pair
    assert {stream: tokens.total for stream, tokens in meta.tokens.items()} == {"img": 1024, "txt": 512}
    assert meta.bytes_per_image == 16 * 4 * (1024 + 512) * 12_288  # 1.2 GB
    assert flux(max_sequence_length=256).meta.bytes_per_image == 1_006_632_960  # 1.0 GB
    assert flux(targets="recomputed").meta.bytes_per_image * 2 == meta.bytes_per_image
    assert flux(store_dtype="fp8-e4m3").meta.row_bytes == 3072 + 4
    assert (meta.chunk_images, flux(tokens="64", streams="img").meta.chunk_images) == (4, 64)
    assert 32 * flux(weights="copy").weights_file_bytes == pytest.approx(4.83e9, rel=1e-3)
    everything = flux(layers="all", model=DEV, guidance=3.5)
    assert len(everything.meta.sites) == 2 * 19
    with pytest.raises(UsageError, match="double blocks 0 to 18"):
        flux(layers="19")
    with pytest.raises(UsageError, match="no guidance embedding"):
        flux(guidance=3.5)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_plan_without_weights_is_whole_but_for_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", SCHNELL, "--layers", "6", "--tokens", "16", "--text-tokens", "real", "--images", "64"]
    assert command(*words, "--plan", "--out", str(tmp_path / "store")) == 0
    shown = capsys.readouterr().out
    for expected in ("16 of 1024 tokens", "6,144 B", "yvdao/midjourney-v6 (not fetched", "unknown until the weights"):
        assert expected in shown
    assert list(tmp_path.iterdir()) == []
    assert command("--model", SCHNELL, "--resolution", "500", "--plan") == 2


# the plan the other way round


def cells(outline: Outline, budget: int) -> list[Choice]:
    return [choice for row in choices(outline, budget) for choice in row]


@pytest.mark.parametrize("budget", [10**8, 2 * 10**12])
def test_what_fits_into_a_budget_fits_and_one_part_more_does_not(budget: int, plan: Plan) -> None:
    outline = plan if budget < 10**9 else flux(layers="3")
    found = cells(outline, budget)
    assert len(found) >= 6 * 3
    for choice in found:
        volume = volume_of(varied(outline, choice.policy, choice.dtype, choice.targets))
        parts, left = divmod(choice.images, volume.meta.chunk_images)
        assert left == 0
        assert sum(volume.by_kind(parts, True).values()) <= budget < sum(volume.by_kind(parts + 1, True).values())


def test_the_flags_of_the_budget_are_those_of_a_store_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", SCHNELL, "--layers", "2-3", "--plan", "--budget", "500GB", "--images", "10000"]
    assert command(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25
    (best,) = [line for line in lines if line.startswith("10,000 images fit with ")]
    flags = best.removeprefix("10,000 images fit with ").split()
    options = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    outline = flux(**options, layers="2-3", images=10_000)
    volume = volume_of(outline)
    assert sum(volume.by_kind(outline.meta.n_parts, True).values()) <= 5 * 10**11
    assert command(*words[:-1], "10000000") == 0
    assert "10,000,000 images fit into none of these: at most" in capsys.readouterr().out


def test_the_budget_keeps_what_was_asked_for_among_its_lines(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    asked = flux(tokens="100", text_tokens="real+3", layers="2", store_dtype="float16", images=None)
    tokens = {"img": StreamTokens("sample", 100, 1024), "txt": asked.meta.tokens["txt"]}
    same = [c for c in cells(asked, 10**11) if c.policy.tokens == tokens and c.dtype == "float16"]
    assert [choice.targets for choice in same] == ["stored", "recomputed"]
    harvest.planning.budget.show(replace(asked, settings=replace(asked.settings, budget="100GB")))
    shown = capsys.readouterr().out
    assert f"as asked: --images {same[0].images} --tokens 100 --text-tokens real+3 --store-dtype float16" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "--budget", "2XB"], "is no size"),
        (["--plan", "--budget", "0GB"], "nothing fits"),
        (["--budget", "2TB", "--out", "x"], "give it with --plan"),
        (["--images", "3"], "--out STORE"),
        (["--plan", "--parts", "1", "--images", "3"], "there is no part 1"),
        (["--plan", "--worker", "2/2"], "i from 0 to n - 1"),
    ],
)
def test_wrong_arguments_of_a_plan_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == 2
    assert message in capsys.readouterr().err


# what decides a byte does not depend on how many images there are


def test_what_a_store_says_of_its_prompts_is_a_function_of_those_used(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,score\n" + "".join(f"prompt {i},{i if i < 5 else 'high'}\n" for i in range(8)))
    for options in ({"prompts": str(file)}, {}, {"split": "val"}, {"seeds_per_prompt": 2}):
        few, many = (load_prompts(HarvestSettings(plan=True, images=n, **options)) for n in (3, 8))  # type: ignore[arg-type]
        assert few.prompts == many.prompts[:3]
        assert few.source == many.source_of_first(3) != many.source
        assert few.columns == many.columns
        assert [few.seed_of(i, 5) for i in range(3)] == [many.seed_of(i, 5) for i in range(3)]
    assert load_prompts(HarvestSettings(plan=True, images=3, prompts=str(file))).source["columns"] == {
        "score": "string"
    }


def test_slots_for_real_text_tokens_do_not_depend_on_the_prompts_used(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a red circle\na small blue ring at the top left on a white background\n")
    for options in ({"prompts": str(file)}, {}):
        plans = [
            make_plan(HarvestSettings(plan=True, **{**SMALL, "images": n, "text_tokens": "real", **options}))
            for n in (1, 2)
        ]
        assert plans[0].meta.origin == plans[1].meta.origin
        assert max(len(t.ids) for t in plans[0].tokenized) < plans[0].meta.tokens["txt"].kept


# weights


def test_weights_are_one_file_a_site_named_by_their_content(tmp_path: Path) -> None:
    settings = HarvestSettings(out=tmp_path / "store", targets="recomputed", **SMALL)
    run(settings)
    store = open_store(tmp_path / "store")
    assert (store.points, store.meta.targets, store.meta.codec, store.meta.parent) == (
        ("mlp_in",),
        "recomputed",
        "none",
        None,
    )
    files = store.meta.weights["files"]
    assert set(files) == {"img_1", "txt_1"}
    for name in files.values():
        tensors = load_file(tmp_path / "store" / "weights" / name)
        assert set(tensors) == {"net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias"}
        assert name == f"sha256-{tensors_hash(tensors)}.safetensors"


def test_sites_with_equal_matrices_share_a_file(plan: Plan) -> None:
    block = plan.sampler.pipe.transformer.transformer_blocks[1]
    kept = {name: tensor.clone() for name, tensor in block.ff_context.state_dict().items()}
    try:
        block.ff_context.load_state_dict(block.ff.state_dict())
        files = harvest.planning.plan.weights_files(plan.sampler.pipe.transformer, plan.sampler.sites)
        assert files["img_1"] == files["txt_1"] == plan.meta.weights["files"]["img_1"]
    finally:
        block.ff_context.load_state_dict(kept)
    content = plan.weights(files["img_1"])
    assert hashlib.sha256(content).digest() == hashlib.sha256(plan.weights(files["img_1"])).digest()
    assert torch.equal(load(content)["net.2.bias"], block.ff.state_dict()["net.2.bias"])
    copying = replace(plan, meta=replace(plan.meta, weights={"policy": "copy", "files": files}))
    assert len(volume_of(copying).weights) == 1
