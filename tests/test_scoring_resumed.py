"""Scores are the same bytes from any number of workers, however often a run is killed; nobody's work is lost or mixed up."""

import contextlib
import fcntl
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze.inputs import Subject, open_analysis
from analyze.scoring import cluster, matrices, plan, scores, work
from analyze.scoring.findings import Findings
from analyze.scoring.work import Hands
from bench.scores import CASES, random_dictionary, random_store
from store.errors import DamagedError, MismatchError, StoreError, UsageError
from tests.small_scoring import (
    digests,
    options_of,
    small_pieces,
    whole_dictionary,
)
from train.dictionaries.checkpoint import save_dictionary

ROOT = Path(__file__).parent.parent


def test_two_workers_and_a_memory_for_one_pane_give_the_same_bytes(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder, expected = scored_small
    small_pieces(monkeypatch)
    scores.run(options_of(folder, tmp_path / "two", workers=2))
    assert digests(tmp_path / "two") == expected
    monkeypatch.setattr(plan, "MARGIN", 0)
    analysis = open_analysis(options_of(folder, "x"))
    every = [(subject, step) for subject in analysis.subjects for step in analysis.steps]
    least = plan.ScorePlan(analysis, options_of(folder, "x", workers=1), every).held_bytes()
    capsys.readouterr()
    scores.run(options_of(folder, tmp_path / "little", workers=2, memory=f"{least - 1}B"))
    assert digests(tmp_path / "little") == expected
    assert "is read up to" in capsys.readouterr().out


def test_a_run_that_is_killed_goes_on_from_its_blocks_and_ends_with_the_same_bytes(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = scored_small
    small_pieces(monkeypatch)
    publish, done = Hands._publish, 0

    def publish_until(last: int) -> Callable[..., None]:
        def counted(self: Hands, *words: Any) -> None:
            nonlocal done
            if done == last:
                raise KeyboardInterrupt
            publish(self, *words)
            done += 1

        return counted

    total = 2 * 2 * 3  # dictionaries, panes, blocks
    for last in (2, 7):
        monkeypatch.setattr(Hands, "_publish", publish_until(last))
        with pytest.raises(KeyboardInterrupt):
            scores.run(options_of(folder, tmp_path / "out", workers=1))
        assert not list((tmp_path / "out").glob("*_txt_0"))
    (tmp_path / "out/unfinished/sae_txt_0/step.0/matrix/scores/c/0/0.0123.partial").write_bytes(b"torn")
    monkeypatch.setattr(Hands, "_publish", publish_until(total + 1))
    scores.run(options_of(folder, tmp_path / "out", workers=2))
    assert done == total  # nothing twice
    assert digests(tmp_path / "out") == expected


def test_what_another_dictionary_left_unfinished_is_not_gone_on_with(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = scored_small
    small_pieces(monkeypatch)
    shutil.copytree(folder / "d", tmp_path / "d")
    shutil.rmtree(tmp_path / "d/sae_txt_0")
    save_dictionary(tmp_path / "d/sae_txt_0", whole_dictionary("txt_0", 5, "sae"), None, [])
    monkeypatch.setattr(Hands, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        scores.run(replace(options_of(folder, tmp_path / "out"), dictionaries=tmp_path / "d"))
    monkeypatch.undo()
    small_pieces(monkeypatch)
    scores.run(options_of(folder, tmp_path / "out"))
    assert digests(tmp_path / "out") == expected


def test_a_chunk_and_its_names_are_on_the_disk_before_its_block_is_said_to_be_done_and_there_at_the_end(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored_small
    small_pieces(monkeypatch)
    synced: list[Path] = []
    save, finish = Findings.save, Hands.finish

    def saved(self: Findings, path: Path) -> None:
        for name in ("scores", "argmax_token"):
            chunks = [p for p in (path.parents[1] / "matrix" / name).rglob("*") if not p.name.startswith("zarr")]
            assert len(chunks) > 2 and set(chunks) <= set(synced)
        save(self, path)

    def finished(self: Hands, subject: Subject, step: int) -> None:
        (tmp_path / "out/unfinished" / subject.name / f"step.{step}" / "matrix/argmax_token/c/2/1").unlink()
        finish(self, subject, step)

    monkeypatch.setattr(matrices, "fsync_file", synced.append)
    monkeypatch.setattr(Findings, "save", saved)
    monkeypatch.setattr(Hands, "finish", finished)
    with pytest.raises(DamagedError, match=r"c/2/1 was written and is not there any more: delete .*unfinished"):
        scores.run(options_of(folder, tmp_path / "out", workers=1))
    assert not list((tmp_path / "out").glob("*/step.0"))


def test_a_dictionary_that_is_replaced_during_a_run_is_refused(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored_small
    small_pieces(monkeypatch)
    shutil.copytree(folder / "d", tmp_path / "d")
    options = replace(options_of(folder, tmp_path / "out", workers=1), dictionaries=tmp_path / "d")
    claim = scores.claim_output

    def claimed(*words: Any) -> None:
        claim(*words)
        shutil.rmtree(tmp_path / "d/sae_txt_0")
        save_dictionary(tmp_path / "d/sae_txt_0", whole_dictionary("txt_0", 5, "sae"), None, [])

    monkeypatch.setattr(scores, "claim_output", claimed)
    with pytest.raises(MismatchError, match="sae_txt_0 holds another dictionary than when this command began"):
        scores.run(options)
    assert not list((tmp_path / "out").glob("*/step.0"))


def test_a_lock_that_is_taken_while_its_folder_goes_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = work.held(tmp_path / "out"), work.held(tmp_path / "out")
    first.__enter__()
    flock = fcntl.flock

    def late(file: int, how: int) -> None:
        monkeypatch.setattr(work.fcntl, "flock", flock)
        first.__exit__(None, None, None)  # between the second one's open and its lock
        assert not (tmp_path / "out/unfinished").exists()
        flock(file, how)

    monkeypatch.setattr(work.fcntl, "flock", late)
    with second, pytest.raises(StoreError, match="another process computes scores"), work.held(tmp_path / "out"):
        pass
    assert not (tmp_path / "out/unfinished").exists()


@pytest.mark.parametrize("moment", ["run.json", "last rename"])
def test_what_a_run_leaves_that_is_killed_at_its_beginning_or_end_is_cleaned_up_by_the_next(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder, expected = scored_small
    small_pieces(monkeypatch)
    out, left = tmp_path / "out", tmp_path / "out/unfinished/sae_txt_0/step.0/findings"
    if moment == "last rename":
        shutil.copytree(folder / "alone", out)
    left.mkdir(parents=True)
    (out / "unfinished/lock").touch()
    if moment == "run.json":
        (out / ".run.json.0badf00d.tmp").write_bytes(b"{")
    else:
        (left / "00000.0.found").write_bytes(b"of a result that is there")
    summary = scores.run(options_of(folder, out))
    assert summary.computed == (2 if moment == "run.json" else 0)
    assert digests(out) == expected
    assert not (out / "unfinished").exists()


def test_what_is_left_of_other_dictionaries_stays_to_be_gone_on_with(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    shutil.copytree(scored_small[0] / "alone", tmp_path / "out")
    left = tmp_path / "out/unfinished/img_3/step.0/findings/00000.0.found"
    left.parent.mkdir(parents=True)
    left.touch()
    scores.run(options_of(scored_small[0], tmp_path / "out"))
    assert left.exists()


def test_an_out_is_claimed_under_the_lock_and_a_folder_of_something_else_is_left_alone(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored_small
    small_pieces(monkeypatch)
    with work.held(tmp_path / "out"), pytest.raises(StoreError, match="another process computes scores"):
        scores.run(options_of(folder, tmp_path / "out"))
    assert not (tmp_path / "out/run.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(UsageError, match="is not empty and holds no analysis"):
        scores.run(options_of(folder, tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_scores_of_other_choices_are_refused_where_they_were_carried_into_an_out(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored_small
    small_pieces(monkeypatch)
    changes: dict[str, Any]
    for number, (changes, match) in enumerate(
        [
            ({"padding": True}, "padding_counted: True, expected False"),
            ({"active_above": 0.5}, r"active_above: 0\.5, expected 0\.0"),
            ({"dtype": "float16"}, "in float16, expected float32"),
        ]
    ):
        out, other = tmp_path / f"{number}", tmp_path / f"other{number}"
        shutil.copytree(folder / "alone", out)
        scores.run(options_of(folder, other, **changes))
        shutil.rmtree(out / "sae_txt_0")
        shutil.copytree(other / "sae_txt_0", out / "sae_txt_0")
        with pytest.raises(MismatchError, match=match):
            scores.run(options_of(folder, out))


def test_the_workers_of_a_cluster_write_the_same_bytes(
    scored_small: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distributed

    folder, expected = scored_small
    small_pieces(monkeypatch)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None, host="127.0.0.1",
        memory_limit=None,
    ) as there:  # fmt: skip
        settings = options_of(folder, tmp_path / "out", scheduler=there.scheduler_address)
        scores.run(settings)
        assert digests(tmp_path / "out") == expected
        assert len(cluster._held) == 0
        monkeypatch.setattr(cluster, "LOADED", ("another",) * 2)
        job = cluster.job_of(plan.ScorePlan(open_analysis(settings), settings, ()))
        monkeypatch.undo()
        with pytest.raises(MismatchError, match="another version of Granary"):
            cluster._new_hands(job)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s", 1500, 16, 64)
    dictionary = random_dictionary(CASES[0], 64, 6000)
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    scores.run(options_of(tmp_path, "alone", workers=1))
    words = [
        sys.executable,
        "-m",
        "analyze",
        "scores",
        "--store",
        str(store),
        "--dictionaries",
        str(tmp_path / "d"),
        "--out",
    ]
    kills, chance = 0, np.random.default_rng(0)
    for attempt in range(5):
        process = subprocess.Popen(
            [*words, str(tmp_path / "out"), "--workers", str(1 + attempt % 2)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 60
        while not (tmp_path / "out/unfinished/img_0").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, 0.5))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    scores.run(options_of(tmp_path, "out"))
    assert kills > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
