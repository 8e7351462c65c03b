"""`--plan --scale`: what so many prompts take, held against what is known, what is written, and what a process was seen to take."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harvest import HarvestSettings
from harvest.__main__ import COMMANDS
from harvest.planning.budget import policies_of
from harvest.planning.device_memory import HostWeights, Way, device_bytes, weights_on_device, weights_on_host
from harvest.planning.live_memory import META, peak_bytes
from harvest.planning.operating import PYTHON, _disk, _host, columns_of, operating_text, time_table
from harvest.planning.parameters import Held, Part, file_dtypes, held_by_a_batch, in_dtype, parts_of_model, shortened
from harvest.planning.plan import Outline, Plan, make_outline, make_plan
from harvest.planning.rates import rates_of
from harvest.planning.reserve import (
    BATCH,
    EXPANSION,
    Reserve,
    host_parts,
    parameters_of,
    staging_on_host,
    training_bytes,
)
from harvest.planning.volume import as_pinned, part_bytes
from harvest.settings import DEV, SCHNELL, SD3_MEDIUM, SD35_MEDIUM
from store import UsageError, open_store
from store.command import program
from store.pack import PackSettings
from store.packing.budget import Budget
from store.packing.plan import PackPlan
from store.sites import Site
from store.sizes import human_size
from store.split import Split
from tests import small_models
from tests.small_store import small_meta
from train import DictionaryConfig
from train.memory import Need
from train.models import Model
from train.recipe import Recipe

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "operating.md"
BLOCKS = re.findall(r"```console\n\$ ([^\n]*)\n(.*?)\n```", DOCUMENT.read_text(), re.DOTALL)
SPLITS: tuple[Split, ...] = ("train", "val")


def outline(model: str = SCHNELL, **options: Any) -> Outline:
    return make_outline(
        HarvestSettings(plan=True, model=model, **{"scale": "1000,60000", "images_per_second": 2.0, **options})
    )


@pytest.fixture(scope="module")
def tiny() -> Plan:
    return make_plan(HarvestSettings(plan=True, scale="1000", images_per_second=2.0, threads=1, images=64))


@pytest.fixture(scope="module")
def schnell() -> tuple[Part, ...]:
    return parts_of_model(outline().settings)


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=[command.split()[4] for command, _ in BLOCKS])
def test_the_tables_of_the_document_are_what_the_command_prints(
    command: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "harvest"] and "--scale" in words
    assert program("harvest", COMMANDS, words[3:], default="harvest") == 0
    assert capsys.readouterr().out.rstrip() == shown


def test_the_figures_of_the_summary_stand_in_the_tables() -> None:
    summary, tables = DOCUMENT.read_text().partition("```console")[::2]
    figures = re.findall(r"\*\*([\d.,]+ [TGM]B)\*\*", summary)
    assert len(figures) > 8
    assert all(re.search(rf"\s{re.escape(figure)}\b", tables) for figure in figures), figures


def test_the_figures_of_the_readme_stand_in_the_tables() -> None:
    command, shown = BLOCKS[0]
    assert SCHNELL in command

    def cell(after: str, row: str) -> str:
        line = next(line for line in shown.partition(after)[2].splitlines() if line.strip().startswith(row))
        return re.split(r"  +", line.strip())[-2]  # of column B: 64 image tokens, and what else is usual

    readme = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(
        r"60,000 prompts at 64 image tokens: ([\d.]+ TB) with packs and dictionaries, ([\d.]+ GB) of RAM a worker, "
        r"a GPU of ([\d.]+ GB), or ([\d.]+ GB) with `--text-encoders first`",
        readme,
    )
    assert said is not None and said.groups() == (
        cell("  60,000 prompts\n", "all but embeddings"),
        cell("memory of a worker", "in all"),
        cell("memory of a GPU", "as it is"),
        cell("memory of a GPU", "--text-encoders first"),
    )


def test_parameters_are_those_that_are_known_and_those_that_are_loaded(tiny: Plan, schnell: tuple[Part, ...]) -> None:
    known = {"transformer": 11.90e9, "text_encoder": 123.06e6, "text_encoder_2": 4.762e9, "vae": 83.82e6}
    found = {part.name: part for part in parts_of_model(outline(DEV).settings)}
    assert {name: part.parameters for name, part in found.items()} == pytest.approx(known, rel=2e-4)
    smaller = next(part for part in schnell if part.name == "transformer")
    embedder = 256 * 3072 + 3072 + 3072 * 3072 + 3072  # of guidance, which schnell has not
    assert found["transformer"].parameters - smaller.parameters == embedder
    for part in parts_of_model(tiny.settings):
        loaded = getattr(tiny.sampler.pipe, part.name)
        assert part.parameters == sum(parameter.numel() for parameter in loaded.parameters())


def test_the_height_of_a_computation_is_counted_to_the_byte() -> None:
    with META:
        first, second = nn.Linear(8, 32, bias=False), nn.Linear(32, 16, bias=False)

    def work() -> object:
        rows = torch.empty(100, 8)
        return second(first(rows))

    assert peak_bytes(work, first, second) == 4 * 100 * (8 + 32 + 16)

    def attends() -> object:
        q, k, v = (torch.empty(2, 3, 100, 8) for _ in range(3))
        return nn.functional.scaled_dot_product_attention(q, k, v)

    assert peak_bytes(attends) == 4 * (4 * 2 * 3 * 100 * 8)  # and no matrix of 100 x 100


def test_two_blocks_of_a_kind_hold_as_much_as_all_of_them(tiny: Plan) -> None:
    parts = parts_of_model(tiny.settings)
    short = held_by_a_batch(parts, tiny.meta, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harvest.planning.parameters.shortened", lambda *_: _Nothing())
        assert held_by_a_batch(parts, tiny.meta, "float32") == short
    transformer: Any = next(part.module for part in parts if part.name == "transformer")
    with shortened(transformer):
        assert len(transformer.transformer_blocks) == 2
    assert len(transformer.transformer_blocks) == 5


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_weights_on_a_gpu_follow_from_the_way_that_is_chosen(schnell: tuple[Part, ...]) -> None:
    parts = schnell
    sizes = {part.name: part.parameters for part in parts}
    transformer, encoders = sizes["transformer"], sizes["text_encoder"] + sizes["text_encoder_2"]
    everything = weights_on_device(Way(), parts, "bfloat16")
    assert everything.denoising == everything.encoding == 2 * sum(sizes.values())
    first = weights_on_device(Way(text_encoders="first"), parts, "bfloat16")
    assert (first.encoding, first.denoising) == (2 * encoders, 2 * (transformer + sizes["vae"]))
    assert weights_on_device(Way("model"), parts, "bfloat16").denoising == 2 * transformer
    nf4 = weights_on_device(Way(quantize="nf4", text_encoders="first"), parts, "bfloat16").denoising - 2 * sizes["vae"]
    assert nf4 == pytest.approx(transformer * (0.5 + 4 / 64), rel=1e-3)
    block = (
        2 * 339_831_296
    )  # bytes of a double block: 24 products of 3072 x 3072 for two streams, 12 for modulations; norms, biases
    group = weights_on_device(Way("group"), parts, "bfloat16").denoising
    assert 2 * block < group < 2.2 * block
    held, ways = Held(1, 2, 3), [Way(), Way(text_encoders="first"), Way("model"), Way("group"), Way("sequential")]
    needed = [device_bytes(way, parts, "bfloat16", held, 10**6) or 0 for way in ways]
    assert needed == sorted(needed, reverse=True)
    assert device_bytes(Way(), parts, "bfloat16", Held(1, None, 3), 0) is None


def test_what_is_pinned_is_rounded_up_to_a_power_of_two_and_counted_so() -> None:
    assert [as_pinned(size) for size in (0, 1, 2**20, 2**20 + 1, 456 * 2**20)] == [0, 1, 2**20, 2**21, 2**29]
    meta = outline(DEV, layers="single:all").meta  # 38 sites x 4 images x 1,536 tokens: 1,368 MiB a point
    assert staging_on_host(meta, True) == 2 * 2 * 2**31
    assert staging_on_host(outline(layers="0-15", streams="img").meta, True) == 2 * 2 * 2**29  # 384 MiB each


def test_weights_lie_in_ram_while_they_are_converted_and_where_they_are_offloaded(schnell: tuple[Part, ...]) -> None:
    sizes = {part.name: part.weights("bfloat16") for part in schnell}
    encoders, every = sizes["text_encoder"] + sizes["text_encoder_2"], sum(sizes.values())
    ram = partial(weights_on_host, parts=schnell, dtype="bfloat16")
    assert ram(Way(), mapped=sizes) == HostWeights(0, 0)
    assert ram(Way(), mapped=()) == HostWeights(every, 0)
    assert ram(Way(text_encoders="first"), mapped=()).loading == every - encoders
    assert ram(Way("model"), mapped=sizes) == HostWeights(0, every)
    assert ram(Way("model", text_encoders="first"), mapped=()).drawing == every - encoders
    assert 0 < ram(Way(quantize="nf4"), mapped=sizes).loading < sizes["transformer"] / 3
    group = ram(Way("group"), mapped=())
    assert group.drawing - every == pytest.approx((35.3 - 22.6) * 2**30, rel=0.1)  # blocks, matrix by matrix, by hand
    assert group.loading > group.drawing + sizes["transformer"] / 2  # all is pinned before what was loaded goes


def test_what_is_loaded_is_said_by_the_dtype_of_the_files(schnell: tuple[Part, ...]) -> None:
    for model, said in (
        (SCHNELL, "the files are in bfloat16, and mapped"),
        (SD3_MEDIUM, "the files are in float16, and converted to bfloat16"),
        (SD35_MEDIUM, "not known from here; counted as if it were another than bfloat16"),
    ):
        plan = outline(model, layers="0", tokens="64")
        shown = _host(
            [[Reserve(plan, 1000)]], schnell, [Held(1, 2, 3)], True
        ).text()  # its dtypes are those of the model
        assert said in " ".join(shown.split())
        converted = sum(part.weights("bfloat16") for part in schnell) if model != SCHNELL else 0
        rows = dict(re.findall(r"^  (drawing|loading|in all) +(.*)$", shown, re.MULTILINE))
        assert rows["loading"] == human_size(converted + PYTHON)
        assert (
            rows["in all"] == rows["loading" if converted else "drawing"] != rows["drawing" if converted else "loading"]
        )


def test_pictures_compression_and_traces_of_the_disk_table_are_those_asked_for(schnell: tuple[Part, ...]) -> None:
    def shown(**options: Any) -> str:
        return " ".join(_disk([[Reserve(outline(layers="0-1", **options), 1000)]], schnell).text().split())

    usual, other = shown(), shown(pictures="png", codec="zstd", trace=True)
    assert "pictures at 0.35 B a pixel (webp), prompts" in usual and "zstd" not in usual and "trace" not in usual
    assert "pictures at 1.5 B a pixel (png), prompts" in other and "sizes are before it" in other
    assert "store, traces: images 0-9 at steps 0-3, blocks 0-1, bfloat16, however many" in other
    assert "pictures at" not in shown(pictures="none")


def test_packs_are_as_large_as_was_said(pack_store: Path, tiny: Plan, tmp_path: Path) -> None:
    store = open_store(pack_store)
    reserved = Reserve(replace(tiny, meta=store.meta), store.n_images)
    plans = [PackPlan(store, PackSettings(store=pack_store, out=tmp_path / "p", split=split)) for split in SPLITS]
    assert reserved.packs == sum(plan.site_bytes(site) for plan in plans for site in plan.sites)
    assert reserved.scratch == 0 < replace(reserved, prompts=10**9).scratch
    assert reserved.pack_knows == pytest.approx(Budget(plans[0], 2 * 10**9, lanes=2).fixed, rel=0.25)


@pytest.mark.parametrize("d_model", [128, 3072])
def test_a_dictionary_takes_what_training_says_of_it(d_model: int, tmp_path: Path) -> None:
    config = DictionaryConfig(
        kind="transcoder", site=Site.parse("img_0"), d_model=d_model, n_features=EXPANSION * d_model, time_embed_dim=256
    )
    need = Need.of(Model(config.site, Recipe(l1=3e-4), tmp_path, config), BATCH, 4096, torch.device("cpu"))
    assert parameters_of(d_model) == need.parameters
    assert training_bytes(d_model) == pytest.approx(need.lasting + need.passing, rel=0.1)


def test_columns_are_token_policies_and_the_smallest_store_comes_last() -> None:
    columns = columns_of(outline(tokens="256", text_tokens="real+64", layers="0-3"))
    assert [column.policy.flags["tokens"] for column in columns] == ["all", "256", "64", "64"]
    assert columns[1].flags == "--tokens 256 --text-tokens real+64 --store-dtype bfloat16 --targets stored"
    assert (columns[-1].meta.store_dtype, columns[-1].meta.targets) == ("fp8-e4m3", "recomputed")
    sizes = [column.meta.bytes_per_image for column in columns]
    assert sizes == sorted(sizes, reverse=True)


def test_joint_sites_have_policies_and_columns_of_their_own() -> None:
    plan = outline(layers="0,single:0-1", tokens="256")
    for policy in policies_of(plan):
        kept = {stream: tokens.kept for stream, tokens in policy.tokens.items()}
        assert kept["joint"] == kept["img"] + kept["txt"]
    assert [column.meta.streams for column in columns_of(plan)] == [("img", "txt", "joint")] * 4


def test_time_follows_from_a_stated_rate_and_is_unknown_without_one() -> None:
    stated, unknown = outline(disk_per_second="100MB"), outline(images_per_second=None)
    reserved = [[Reserve(stated, 1000)]]
    shown = time_table(reserved, rates_of(stated)).text()
    assert re.search(r"1,000 prompts, drawing +8\.3 min", shown)  # 1,000 / 2 s
    assert re.search(r"1,000 prompts, writing +4 h", shown)  # 1.43 TB / 100 MB/s
    assert "2 images/s, as stated by --images-per-second" in shown and "100 MB/s, as stated" in shown
    shown = time_table(reserved, rates_of(unknown)).text()
    assert "unknown" in shown and "its weights are not here" in shown and "disk that keeps up" not in shown


def test_a_model_that_is_here_is_measured(tiny: Plan) -> None:
    settings = replace(tiny.settings, images_per_second=None)
    shown = operating_text(replace(tiny, settings=settings))
    assert re.search(r"images/s, measured now with the tokens asked for \(cpu, a batch of \d+ in", shown)
    assert "memory of a GPU" not in shown and "a batch" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale", "1000"], "give it with --plan"),
        (["--plan", "--scale", "1e3"], "write numbers of prompts"),
        (["--plan", "--scale", "0"], "write numbers of prompts"),
        (["--plan", "--scale", "1000", "--budget", "2TB"], "without --budget"),
        (["--plan", "--images-per-second", "2"], "give it with --plan --scale"),
        (["--plan", "--scale", "10", "--images-per-second", "0"], "must be more than 0"),
        (["--plan", "--scale", "10", "--disk-per-second", "fast"], "--disk-per-second: 'fast' is no size"),
        (["--plan", "--scale", "9" * 5000], "write numbers of prompts"),
        (
            ["--plan", "--scale", "10", "--images-per-second", "1", "--model", "nobody/nothing"],
            "configuration is not here",
        ),
        (["--plan", "--scale", "10", "--model", "nobody/nothing"], "configuration is not here"),
    ],
)
def test_what_says_nothing_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = [] if "--plan" in flags else ["--out", "nowhere"]
    assert program("harvest", COMMANDS, [*flags, *out], default="harvest") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("make", [small_models.sd3, small_models.flux2_klein, small_models.flux_dev])
def test_every_family_is_counted_from_a_folder(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    parts = parts_of_model(HarvestSettings(plan=True, model=str(folder)))
    files = sum(file.stat().st_size for part in parts for file in (folder / part.name).glob("*.safetensors"))
    assert set(file_dtypes(HarvestSettings(plan=True, model=str(folder)), parts).values()) == {"float32"}
    assert sum(part.weights("float32") for part in parts) == pytest.approx(
        files, rel=0.2
    )  # headers, and what is saved twice
    sizes = {"height": 32, "width": 32, "pixels_per_token": 8, "max_sequence_length": 16}
    meta = replace(small_meta(4), **sizes)  # type: ignore[arg-type]
    held = held_by_a_batch(parts, meta, "float32")
    assert held.denoising is not None and min(held.encoding, held.denoising, held.decoding) > 4 * 16 * 32 * 4


def test_a_model_of_unknown_configuration_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UsageError, match="its configuration is not here"):
        parts_of_model(HarvestSettings(plan=True, model=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parts", "batch"])
def test_a_harvest_takes_at_most_the_memory_that_was_said(kind: str, tmp_path: Path) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("peaks cannot be counted anew here")
    words = [sys.executable, "-m", "tests.test_operating", kind, str(tmp_path)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["taken"] < 1.1 * found["planned"], found
    least = found["planned"] - found["part"]  # the part before may be written and gone before the next is full
    assert found["taken"] > 0.8 * least, found


CASES: dict[str, dict[str, Any]] = {
    "parts": {"resolution": 96, "images": 192, "batch_size": 16},
    "batch": {"resolution": 256, "images": 16, "batch_size": 16, "tokens": "16", "pictures": "none"},
}
"""in one of them two parts are most of what is held, in the other a batch is"""


def _measured(case: dict[str, Any], out: Path) -> dict[str, int]:
    """What a harvest of tiny-flux was said to hold, and its peak of resident memory above what stood there before."""
    from harvest import run
    from harvest.planning.plan import make_plan

    def resident(name: str) -> int:
        words = Path("/proc/self/status").read_text().split()
        return 1024 * int(words[words.index(name) + 1])

    run(HarvestSettings(out=out / "small", threads=1, images=8, layers="0"))  # what is imported on the way is there now
    plan = make_plan(HarvestSettings(plan=True, threads=1, **case))
    parts, meta = parts_of_model(plan.settings), plan.meta
    held = held_by_a_batch(parts, meta, meta.dtype)
    batch = max(held.encoding, held.denoising or 0, held.decoding)
    pictures = 6 * meta.height * meta.width * meta.chunk_images * (meta.pictures != "none")
    in_dtype(parts, "float32")
    del plan
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS:")
    run(HarvestSettings(out=out / "large", threads=1, **case))
    planned = host_parts(meta) + staging_on_host(meta, False) + batch + pictures
    return {"planned": planned, "taken": resident("VmHWM:") - before, "part": part_bytes(meta)}


if __name__ == "__main__":
    print(json.dumps(_measured(CASES[sys.argv[1]], Path(sys.argv[2]))))
