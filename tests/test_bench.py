"""`python -m bench`: the table, what is kept, the comparison of two runs, and what is refused.  No test asserts a speed."""

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import groups, harvest_overhead, machine, running, table, timing, trainers
from bench.__main__ import COMMANDS
from bench.comparing import CompareSettings, ShowSettings, changes, compare, show
from bench.groups import GROUPS, Group
from bench.lines import MOVES, Line, Need, Peer, line_of, spread
from bench.peer import Answer
from bench.peers import PEERS, Amount
from bench.running import BenchSettings, Run, run_of
from harvest.settings import HarvestSettings
from store.command import program
from store.errors import DamagedError, UsageError
from store.format import CHUNK_IMAGES_MAX

RATES = {
    "write": 1e9, "read": 2e9, "cached": 1e10, "copy": 1e10, "crc32c": 2e10, "sha256": 1e9, "float32": 1e11, "bfloat16": 1e12,
}  # fmt: skip
HERE = machine.Machine("a processor", 2, 2**34, "ext4 on /dev/disk", "Linux 6", "3.11.7", "2.13.0", 0.1)
WRITE = Line(
    "write 1 GB", (2.0, 2.5, 2.1), (Peer("raw file", (1.0, 1.2), goal=1.5), Peer("zarr", (4.0,))),
    (Need("write", 1e9), Need("crc32c", 1e9), Need("sha256", 2e9)), "in parts",
)  # fmt: skip
STEP = Line("step", (0.05, 0.06), (Peer("plain loop", (0.2, 0.3), goal=1 / 3),), (Need("float32", 1e9),))


def run_with(ours: tuple[float, ...], its: tuple[float, ...] = (1.0,), **changes: Any) -> Run:
    """A run of one line."""
    line = replace(WRITE, ours=ours, peers=(Peer("raw file", its),))
    return replace(Run(HERE, "2030-01-02", "quick", RATES, groups={"store": [line]}), **changes)


def kept(path: Path, run: Run) -> Path:
    path.write_text(json.dumps(run.as_json()))
    return path


def test_the_floor_is_the_slower_of_disk_and_cores_and_each_adds_up_what_it_serves() -> None:
    seconds, binds = WRITE.floor(RATES) or (0.0, "")
    assert (seconds, binds) == (pytest.approx(1e9 / 2e10 + 2e9 / 1e9), "cores")
    both = replace(WRITE, needs=(Need("write", 1e9), Need("read", 1e9), Need("cached", 1e9)))
    assert both.floor(RATES) == (pytest.approx(1.5), "disk")
    assert replace(WRITE, needs=()).floor(RATES) is None


def test_bytes_and_operations_are_counted_from_the_needs() -> None:
    line = replace(WRITE, needs=(*(Need(rate, 1.0) for rate in MOVES), Need("crc32c", 5.0), Need("bfloat16", 7.0)))
    assert (line.moved, line.operations) == (4.0, 7.0)


def test_a_row_says_ours_its_ratio_goal_bytes_floor_and_one_more_peer_is_one_more_row() -> None:
    first, second = table.rows("store", WRITE, RATES)
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == [
        "store", "write 1 GB", "2.00 s", "raw file", "1.00 s", "2.00", "≤ 1.5 missed", "1 GB", "", "2.05 s cores", "0.98",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.strip("|").split("|")][:7] == ["", "", "", "zarr", "4.00 s", "0.50", ""]
    (row,) = table.rows("step", STEP, RATES)
    assert "≤ 0.333 met" in row and "1.00 GFLOP" in row and " 10.0 ms cores |" in row


def test_every_row_of_the_table_is_as_wide_as_its_head_and_fits_200_columns() -> None:
    lines = [*table.head(), *table.rows("store", WRITE, RATES), *table.rows("step", STEP, RATES)]
    assert {len(line) for line in lines} == {200}
    assert {line.count("|") for line in lines} == {len(table.COLUMNS) + 1}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (123.4, "123 s"),
        (12.34, "12.3 s"),
        (0.9996, "1000 ms"),
        (0.01234, "12.3 ms"),
        (4.56e-6, "4.56 µs"),
        (1e-8, "0.01 µs"),
    ],
)
def test_seconds_have_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert table.seconds_text(seconds) == text


def test_the_spread_is_how_far_the_median_lies_above_the_best() -> None:
    assert spread((1.0,)) == 0
    assert spread((1.2, 1.0, 9.0)) == pytest.approx(0.2)
    assert spread((1.0, 1.1, 1.3, 5.0)) == pytest.approx(0.2)


def test_a_kept_run_comes_back_with_every_sample_and_shows_the_same_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(
        HERE,
        "2030-01-02",
        "quick",
        RATES,
        RATES,
        ("nobody: not installed",),
        {"store": [WRITE], "step": [STEP]},
        {"store": 61.0},
    )
    path = kept(tmp_path / "run.json", run)
    assert run_of(path) == run
    floor = json.loads(path.read_text())["groups"]["store"][0]["floor"]
    assert floor == {"seconds": pytest.approx(2.05), "binds": "cores", "over": pytest.approx(2.0 / 2.05)}
    show(ShowSettings(path))
    page = capsys.readouterr().out
    assert page == "\n".join(running.whole(run)) + "\n"
    assert "a processor, 2 cores, 16 GiB of memory" in page and "left out: nobody" in page
    assert "medians lie at most 10% above (step, step)" in page and "measured in 1.0 minutes: store 61 s" in page


def test_by_turns_keeps_every_run_but_the_first_and_takes_turns() -> None:
    said: list[str] = []
    first, second = timing.by_turns(
        lambda: said.append("a"), lambda: said.append("b"), rounds=2, before=lambda: said.append("-")
    )
    assert "".join(said) == "-a-b" * 3
    assert len(first) == len(second) == 2


def test_a_run_measures_prints_and_keeps_what_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(Group):
        def lines(self, size: Any) -> Iterator[Line]:
            yield {"store": WRITE, "step": STEP}[self.module]

    for name in ("store", "step"):
        monkeypatch.setitem(GROUPS, name, Small(name, name, 1e-9, peers=groups.Peers("nobody", f"{tmp_path}/no")))
    out, page = tmp_path / "deep" / "run.json", tmp_path / "table.md"
    found = running.run(BenchSettings(only="step,store", size="tiny", out=out, markdown=page))
    assert list(found.groups) == ["store", "step"]
    printed = capsys.readouterr().out
    assert page.read_text() in printed
    assert printed.count("left out: nobody: not installed; `make ") == 2
    assert run_of(out) == found
    assert set(found.rates) == set(RATES) and min(found.rates.values()) > 0


@pytest.mark.parametrize(
    ("ours", "its", "verdict"),
    [
        ((2.0,), (1.0,), "as before"),
        ((1.0,), (1.0,), "faster"),
        ((4.0,), (1.0,), "slower"),
        ((4.0,), (2.0,), "as before"),  # the machine is half as fast today: both are
        ((2.06, 2.2, 2.3), (1.0,), "as before"),  # 3 % more, and samples that lie 7 % apart
        ((2.2, 2.2, 2.2), (1.0,), "slower"),
    ],
)
def test_a_change_counts_beside_the_peer_and_beyond_the_spread(
    ours: tuple[float, ...], its: tuple[float, ...], verdict: str
) -> None:
    (change,) = changes(run_with((2.0,)), run_with(ours, its))
    assert change.verdict == verdict


def test_compare_lists_the_greatest_gain_first_warns_of_another_machine_and_names_what_has_no_match(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = run_with((2.0,))
    old.groups["step"] = [STEP, replace(STEP, what="gone")]
    other = replace(HERE, processor="another", load=3.0)
    new = run_with((1.0,), machine=other)
    new.groups["step"] = [replace(STEP, ours=(0.1,))]
    found = compare(CompareSettings(kept(tmp_path / "old.json", old), kept(tmp_path / "new.json", new)))
    assert [(change.group, change.verdict) for change in found] == [("store", "faster"), ("step", "slower")]
    said = capsys.readouterr().out
    assert "the machines differ (processor: a processor and another)" in said and "load: " not in said
    assert "rates of the machine, new over old: write 1.00, read 1.00" in said
    assert "1 faster, 1 slower, 0 as before" in said
    assert "not the same work in both: step, gone" in said


def test_compare_repeats_what_each_run_found_doubtful_about_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steady = kept(tmp_path / "steady.json", run_with((2.0,), rates_at_end=RATES))
    changed = {
        "size": "tiny",
        "machine": replace(HERE, load=4.0),
        "rates_at_end": {**RATES, "read": RATES["read"] / 43},
    }
    odd = kept(tmp_path / "odd.json", run_with((2.0,), **changed))
    compare(CompareSettings(steady, odd))
    said = capsys.readouterr().out
    assert "the old run is doubtful" not in said
    assert (
        "the new run is doubtful: size tiny, whose times and goals mean nothing; not idle at the start (load 4 on 2 cores)"
        in said
    )
    assert "not steady (read at the end 0.02 times its rate of the beginning)" in said


def test_runs_without_a_line_in_common_are_not_compared(tmp_path: Path) -> None:
    old, new = run_with((1.0,)), run_with((1.0,))
    new.groups["store"] = [replace(WRITE, needs=(Need("write", 5.0),))]
    with pytest.raises(UsageError, match="nothing in common: run both with the same --size and --only"):
        compare(CompareSettings(kept(tmp_path / "old.json", old), kept(tmp_path / "new.json", new)))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: name the file that"):
        run_of(tmp_path)
    with pytest.raises(UsageError, match="is not there: `python -m bench --out"):
        run_of(tmp_path / "none.json")
    for content in ("no JSON", "[1, 2]", '{"format": "another"}'):
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(DamagedError, match="is no run that `python -m bench` of this version kept"):
            run_of(tmp_path / "odd.json")
    value = run_with((1.0,)).as_json()
    del value["groups"]["store"][0]["ours"]
    (tmp_path / "odd.json").write_text(json.dumps(value))
    with pytest.raises(DamagedError, match="lacks 'ours'"):
        run_of(tmp_path / "odd.json")


DAMAGE: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "groups a list": (("groups",), []),
    "a group no list": (("groups", "store"), 3),
    "a line no mapping": (("groups", "store", 0), "a"),
    "no run of ours": (("groups", "store", 0, "ours"), []),
    "ours no time": (("groups", "store", 0, "ours"), [0.0]),
    "ours in words": (("groups", "store", 0, "ours"), ["a"]),
    "ours endless": (("groups", "store", 0, "ours"), [float("nan")]),
    "a peer without runs": (("groups", "store", 0, "peers", 0, "seconds"), []),
    "a goal in words": (("groups", "store", 0, "peers", 0, "goal"), "a"),
    "an unknown rate": (("groups", "store", 0, "needs", 0, "rate"), "tape"),
    "a note null": (("groups", "store", 0, "note"), None),
    "rates a list": (("rates",), []),
    "a rate null": (("rates", "write"), None),
    "rates at the end a list": (("rates_at_end",), [1.0]),
    "a machine in words": (("machine",), "a"),
    "load in words": (("machine", "load"), "a"),
    "seconds null": (("seconds",), None),
    "a group's seconds null": (("seconds", "store"), None),
    "what is left out a number": (("left_out",), 1),
    "the size null": (("size",), None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_figures_that_no_run_kept_are_refused_by_show_and_compare(tmp_path: Path, name: str) -> None:
    good = kept(tmp_path / "good.json", run_with((1.0,), seconds={"store": 1.0}))
    value = inside = json.loads(good.read_text())
    *keys, last = DAMAGE[name][0]
    for key in keys:
        inside = inside[key]
    inside[last] = DAMAGE[name][1]
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(value))
    with pytest.raises(DamagedError, match=r"odd\.json"):
        show(ShowSettings(odd))
    with pytest.raises(DamagedError, match=r"odd\.json"):
        compare(CompareSettings(good, odd))


def test_a_rate_that_a_floor_needs_and_was_not_kept_is_named(tmp_path: Path) -> None:
    value = run_with((1.0,)).as_json()
    del value["rates"]["sha256"]
    (tmp_path / "odd.json").write_text(json.dumps(value))
    with pytest.raises(DamagedError, match="lacks 'sha256': measure again"):
        run_of(tmp_path / "odd.json")


@pytest.mark.parametrize("flag", ["out", "markdown"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "measured_rates", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("not a folder")
    settings = replace(
        BenchSettings(only="step", size="tiny", out=tmp_path / "run.json"), **{flag: tmp_path / "file/x"}
    )
    with pytest.raises(UsageError, match=f"--{flag} .*file/x cannot be written .*: name another file"):
        running.run(settings)


def test_asking_whether_a_file_can_be_written_leaves_no_file_and_keeps_what_is_there(tmp_path: Path) -> None:
    running._refuse_unwritable("--out", tmp_path / "deep" / "new.json")
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "old.json").write_text("old")
    running._refuse_unwritable("--out", tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"


def test_every_harvest_beside_which_overhead_is_measured_has_parts_that_are_written_while_others_are_drawn() -> None:
    for size in ("quick", "full"):
        cases, rounds = harvest_overhead.SIZES[size]
        assert rounds > 1 and all(case.images > CHUNK_IMAGES_MAX for case in cases)
        assert [case.tokens[-1] for case in cases if case.goal is not None] == ["all"]
        assert all(case.images >= 6 * CHUNK_IMAGES_MAX for case in cases if case.goal is not None)
    text, small = (Path(groups.__file__).parent / "README.md").read_text(), harvest_overhead.SMALL
    assert f"`{small.images} pictures of {small.pixels} px, 64 of 64 tokens`" in text


def test_a_harvest_to_be_timed_is_asked_for_as_users_do(tmp_path: Path) -> None:
    asked = harvest_overhead.asked(harvest_overhead.SMALL, "64", tmp_path / "prompts.txt")
    usual = HarvestSettings(out=tmp_path / "store")
    odd = {name for name, value in vars(asked).items() if value != vars(usual)[name]}
    assert odd == {"prompts", "tokens", "resolution"}


def test_wrong_flags_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="there is no group 'nothing'; there are harvest, store"):
        BenchSettings(only="store,nothing")
    for flag in ("out", "markdown"):
        with pytest.raises(UsageError, match=f"--{flag} .* is a folder: name a file"):
            BenchSettings(**{flag: tmp_path})
    assert program("bench", COMMANDS, ["--only", "odd"], default="run") == 2
    assert "no group 'odd'" in capsys.readouterr().err


def test_a_full_disk_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "store", replace(GROUPS["store"], disk=1e12))
    with pytest.raises(UsageError, match="are needed for a while: name another by TMPDIR=FOLDER"):
        running.run(BenchSettings(only="store"))


def test_every_group_has_lines_by_size_and_its_module_says_what_the_least_work_is() -> None:
    for name, group in GROUPS.items():
        module = importlib.import_module(f"bench.{group.module}")
        assert list(inspect.signature(module.lines).parameters) == ["size"], name
        assert re.search(r"Least work", module.__doc__ or ""), name


@pytest.mark.parametrize("name", ["loader", "step", "scores", "features", "coherence"])
def test_a_group_runs_in_small(name: str) -> None:
    lines = list(GROUPS[name].lines("tiny"))
    assert lines
    for line in lines:
        assert min(line.ours) > 0 and line.peers and line.needs
        assert line_of(line.as_json(RATES)) == line


def test_a_trainer_that_cannot_do_a_step_is_named_and_its_place_is_empty() -> None:
    answers = {name: Answer(both=[100.0, 200.0]) for name in PEERS}
    answers["eai-sparsify"] = Answer(why_not="it has TopK alone")
    line = trainers.line(Amount(4, 16, 10, 100, 1.0), "relu", True, answers)
    assert line.ours == (0.1, 0.05)
    assert [peer.name for peer in line.peers] == ["sae-lens", "dictionary-learning"]
    assert line.note == "eai-sparsify left out: it has TopK alone"
    assert line.needs == (Need("bfloat16", 10 * 4 * 16 * 10),)


def test_the_benchmark_s_readme_names_every_group_and_every_rate() -> None:
    text = (Path(groups.__file__).parent / "README.md").read_text()
    for word in (*GROUPS, *RATES):
        assert f"`{word}`" in text, word
