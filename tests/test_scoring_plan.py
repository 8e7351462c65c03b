"""What a run of scores will take is said before, and is what it takes; too little disk or memory is refused."""

import math
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zarr

from analyze.inputs import open_analysis
from analyze.scoring import announcing, encoding, matrices, plan, scores
from store.errors import StoreError, UsageError
from tests.small_scoring import D_MODEL, FEATURES, options_of, small_pieces, whole_dictionary, whole_store
from train.dictionaries.checkpoint import save_dictionary


def test_the_plan_gives_the_files_and_bytes_that_are_written_and_writes_nothing(
    scored_small: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    folder, expected = scored_small
    small_pieces(monkeypatch)
    summary = scores.run(options_of(folder, tmp_path / "out", plan=True))
    assert (summary.computed, list(tmp_path.iterdir())) == (0, [])
    said = capsys.readouterr().out
    analysis = open_analysis(options_of(folder, "alone"))
    planned = plan.ScorePlan(analysis, options_of(folder, "alone"), [(subject, 0) for subject in analysis.subjects])
    assert planned.files == len(expected) - 2  # run.json and images.parquet
    assert f"{planned.files} files" in said and "2 score matrices of 11 images, 2 dictionaries with 44 features" in said
    places = [
        folder / "alone" / s.name / "step.0" / name for s in analysis.subjects for name in ("scores", "argmax_token")
    ]
    arrays = [zarr.open_array(place, mode="r") for place in places]
    chunks = sum(math.prod(array.chunks) * math.prod(array.cdata_shape) * array.dtype.itemsize for array in arrays)
    assert planned.array_bytes == chunks
    tables = sum(len(content) for name, content in expected.items() if name.endswith("features.parquet"))
    assert tables <= planned.table_bytes
    assert planned.read_bytes == 11 * 8 * D_MODEL * 2 * 2  # images, tokens, bfloat16, two points
    assert planned.reads == 1
    assert planned.operations == 2 * 11 * 8 * D_MODEL * FEATURES * 2


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match=r"are to be written and 1 KB are free on that disk.*--dtype float16"):
        scores.run(options_of(scored_small[0], tmp_path / "out", plan=True))


def test_a_memory_that_is_too_little_says_how_much_would_do(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"--memory 1 MB is too little for .*; use --memory (\d+)MB or more"
    ) as refused:
        scores.run(options_of(scored_small[0], tmp_path / "out", memory="1MB", plan=True))
    enough = str(refused.value).split("use --memory ")[1].split()[0]
    scores.run(options_of(scored_small[0], tmp_path / "out", memory=enough, workers=1, plan=True))


def test_ten_times_the_images_take_no_more_memory_but_for_what_is_known_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    for module in (matrices, plan):
        monkeypatch.setattr(module, "IMAGE_BLOCK", 16)
    for module in (encoding, plan):
        monkeypatch.setattr(module, "PANE", 512)
    monkeypatch.setattr(matrices, "FEATURE_BLOCK", 512)
    monkeypatch.setattr(encoding, "ROWS", 256)
    dictionary = whole_dictionary("img_0", 0, n_features=1024)
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    peaks = []
    for images in (16, 160):
        whole_store(tmp_path / "s", n_images=images, steps=(0,), sites=("img_0",), chunk_images=16)
        tracemalloc.start()
        scores.run(options_of(tmp_path, f"{images}", workers=1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        shutil.rmtree(tmp_path / "s")
    scores_of_images = 144 * 1024 * 8
    assert peaks[1] - peaks[0] < scores_of_images / 4, peaks  # prompts, and what is known of each image


def test_what_is_on_the_disk_of_a_run_that_goes_on_need_not_be_free_again(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored_small
    options = options_of(folder, tmp_path / "out", plan=True)
    analysis = open_analysis(options)
    planned = plan.ScorePlan(analysis, options, [(subject, 0) for subject in analysis.subjects])
    need = planned.array_bytes + planned.table_bytes + planned.scratch_bytes
    monkeypatch.setattr(announcing.shutil, "disk_usage", lambda _path: SimpleNamespace(free=need - 5000))
    with pytest.raises(StoreError, match="are to be written"):
        scores.run(options)
    there = tmp_path / "out/unfinished/sae_txt_0/step.0/matrix/scores/c/0/0"
    there.parent.mkdir(parents=True)
    there.write_bytes(bytes(5000))
    scores.run(options)
    there.write_bytes(bytes(4999))
    with pytest.raises(StoreError, match="are to be written"):
        scores.run(options)


def test_only_the_encoding_half_is_held_and_counted() -> None:
    dictionary = whole_dictionary("txt_0", 0, time_embed_dim=8, skip=True)
    encoder = encoding.Encoder(dictionary, torch.device("cpu"))
    held = encoder._dictionary.state_dict()
    assert not [name for name in held if name.startswith(("decoder", "skip"))]
    assert encoding.weight_bytes(dictionary) == sum(tensor.nbytes for tensor in held.values())
    every = sum(tensor.nbytes for tensor in dictionary.state_dict().values())
    assert encoding.weight_bytes(dictionary) + encoding.passing_bytes(dictionary) == every
    assert {"decoder", "skip"} <= set(dict(dictionary.named_children()))  # what was given is as it was
    x, sigma = torch.ones(2, D_MODEL), torch.ones(2)
    found = encoder.pane(encoder.prepared(x, sigma), slice(0, FEATURES), torch.empty(2, FEATURES))
    assert torch.equal(found, dictionary.encode(x, sigma))


def test_a_memory_that_is_too_little_for_several_dictionaries_is_refused_once(tmp_path: Path) -> None:
    whole_store(tmp_path / "s", steps=(0,), sites=("txt_0",))
    for kind, n_features in (("sae", 64), ("transcoder", 30_000)):
        dictionary = whole_dictionary("txt_0", 0, kind, n_features)
        save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    with pytest.raises(UsageError, match=r"for transcoder_txt_0 \(and for 1 more\): its encoder takes") as refused:
        scores.run(options_of(tmp_path, "out", memory="1MB", plan=True))
    enough = str(refused.value).split("use --memory ")[1].split()[0]
    scores.run(options_of(tmp_path, "out", memory=enough, workers=1, plan=True))


def test_groups_that_read_different_points_read_each_once(scored_small: tuple[Path, dict[str, bytes]]) -> None:
    options = options_of(scored_small[0], "x", workers=1)
    analysis = open_analysis(options)
    planned = plan.ScorePlan(analysis, options, [(subject, 0) for subject in analysis.subjects])
    together = planned.read_bytes
    planned.groups = {subject.site: [((each, (0,)),) for each in analysis.subjects] for subject in analysis.subjects}
    del planned.read_bytes
    assert (planned.reads, planned.read_bytes) == (1, together)
    planned.groups = {subject.site: 2 * groups for subject in analysis.subjects for groups in planned.groups.values()}
    assert planned.reads == 2


def test_a_plan_draws_nothing_from_the_random_numbers_of_the_process(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    scores.run(options_of(scored_small[0], tmp_path / "out", plan=True))
    assert torch.equal(before, torch.get_rng_state())
