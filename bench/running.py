"""`python -m bench`: the whole table in one run.  Every sample is kept as JSON; the table is written as Markdown where asked for."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from bench import table
from bench.groups import GROUPS, USUAL, chosen
from bench.lines import Line, Rate, Size, line_of, positive, text_of, wrong
from bench.machine import Machine, drift, machine_of, measured_rates, now, rates_text, this_machine
from bench.timing import cores
from store.errors import DamagedError, UsageError
from store.files import write_json
from store.sizes import human_size

FORMAT = "granary-bench-1"
DRIFT = 1.2
"""a rate that changed by this factor during a run makes the run doubtful"""


@dataclass(frozen=True)
class BenchSettings:
    """Measure Granary beside its peers and beside what this machine could do at best; one table."""

    only: str = USUAL
    """groups to measure: harvest, store, pack, loader, step, trainers, shared, scores, features, coherence, circuits;
    default: all but shared"""
    size: Size = "quick"
    """quick: the table, about ten minutes on 2 cores; full: larger and more cases; tiny: only to see that all of it runs"""
    out: Path = Path("build/bench.json")
    """where every sample is kept, for `python -m bench compare` and `show`"""
    markdown: Path | None = None
    """write what is printed here as well"""

    def __post_init__(self) -> None:
        chosen(self.only)
        for flag, path in (("--out", self.out), ("--markdown", self.markdown)):
            if path is not None and path.is_dir():
                raise UsageError(f"{flag} {path} is a folder: name a file")


@dataclass(frozen=True)
class Run:
    """What one run measured."""

    machine: Machine
    date: str
    size: str
    rates: dict[str, float]
    """at its start; what floors are computed with"""
    rates_at_end: dict[str, float] | None = None
    left_out: tuple[str, ...] = ()
    groups: dict[str, list[Line]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """that each group took"""

    def as_json(self) -> dict[str, Any]:
        """What is kept."""
        lines = {name: [line.as_json(self.rates) for line in lines] for name, lines in self.groups.items()}
        return {**asdict(self), "format": FORMAT, "groups": lines}


def run_of(path: Path) -> Run:
    """The run that was kept in a file; `UsageError` where there is none, `DamagedError` for anything else."""
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder: name the file that `python -m bench --out FILE` kept, such as build/bench.json"
        )
    if not path.is_file():
        raise UsageError(f"{path} is not there: `python -m bench --out {path}` measures and keeps a run")
    try:
        value = json.loads(path.read_bytes())
    except ValueError:  # no JSON, or no text at all
        value = None
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise DamagedError(
            f"{path} is no run that `python -m bench` of this version kept (format {FORMAT}): measure again"
        )
    try:
        measured, end = _mapping(value["groups"]), value["rates_at_end"]
        groups = {name: [line_of(line) for line in lines] for name in GROUPS if (lines := measured.get(name))}
        return Run(
            machine_of(value["machine"]), text_of(value["date"]), text_of(value["size"]), _rates_of(value["rates"]),
            None if end is None else _rates_of(end), tuple(map(text_of, value["left_out"])), groups,
            {name: positive(seconds) for name, seconds in _mapping(value["seconds"]).items()},
        )  # fmt: skip
    except DamagedError as error:
        raise DamagedError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} {wrong(error)}: measure again") from None


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} where names and their values belong")
    return value


def _rates_of(value: object) -> dict[str, float]:
    """Every rate that a floor may need."""
    rates = _mapping(value)
    return {name: positive(rates[name]) for name in get_args(Rate)}


def run(settings: BenchSettings) -> Run:
    """Measure and print each line as it ends; keep the figures after every group."""
    names, folder = chosen(settings.only), Path(tempfile.gettempdir())
    _room(names, settings.size, folder)
    for flag, path in (("--out", settings.out), ("--markdown", settings.markdown)):
        if path is not None:
            _refuse_unwritable(flag, path)
    machine, rates = this_machine(folder), _rates(settings.size)
    lacking = (peers.missing() for name in names if (peers := GROUPS[name].peers) is not None)
    found = Run(machine, now(), settings.size, rates, left_out=tuple(line for line in lacking if line))
    print("\n".join(opening(found)), flush=True)
    with tqdm(total=len(names), unit="group", desc="bench", leave=False, disable=None) as bar:
        for name in names:
            bar.set_postfix_str(f"{name}: {GROUPS[name].about}")
            torch.set_num_threads(cores())
            begun = time.perf_counter()
            found.groups[name] = []
            for line in GROUPS[name].lines(settings.size):
                found.groups[name].append(line)
                for row in table.rows(name, line, rates):
                    bar.write(row)
            found.seconds[name] = time.perf_counter() - begun
            bar.update()
            write_json(settings.out, found.as_json())
    found = replace(found, rates_at_end=_rates(settings.size))
    write_json(settings.out, found.as_json())
    print("\n".join(closing(found)))
    if settings.markdown is not None:
        settings.markdown.write_text("\n".join(whole(found)) + "\n")
    print(f"\nkept in {settings.out}" + (f" and {settings.markdown}" if settings.markdown else ""))
    return found


def _rates(size: Size) -> dict[str, float]:
    """The machine's, measured now."""
    torch.set_num_threads(cores())
    with tempfile.TemporaryDirectory() as place:
        return measured_rates(Path(place), size)


def _room(names: list[str], size: Size, folder: Path) -> None:
    """Refuse before anything is measured where a group would fill the disk."""
    needed = 0.1e9 if size == "tiny" else 1e9 * max(GROUPS[name].disk for name in names)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"{folder} has {human_size(free)} free, and {human_size(needed)} are needed for a while: name another by TMPDIR=FOLDER"
        )


def _refuse_unwritable(flag: str, path: Path) -> None:
    """Refuse before anything is measured a file that could not be written at the end; what is in it stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # a JSON file is written beside, and renamed
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written ({error.strerror}): name another file") from None


def _busy(machine: Machine) -> bool:
    return machine.load > machine.cores / 2


def doubts(found: Run) -> list[str]:
    """What makes a run's figures worth little, in words."""
    said = ["size tiny, whose times and goals mean nothing"] if found.size == "tiny" else []
    if _busy(found.machine):
        said.append(f"not idle at the start (load {found.machine.load:g} on {found.machine.cores} cores)")
    if found.rates_at_end is None:
        said.append("it was not finished")
    elif not _steady(drifted := drift(found.rates, found.rates_at_end)):
        said.append(f"not steady ({drifted[0]} at the end {drifted[1]:.2f} times its rate of the beginning)")
    return said


def _steady(drifted: tuple[str, float]) -> bool:
    return 1 / DRIFT < drifted[1] < DRIFT


def opening(found: Run) -> list[str]:
    """The machine, its rates, what is left out, and the head of the table."""
    return [
        f"{found.date}, size {found.size}: {found.machine.text()}",
        f"rates of this machine with all cores, measured first: {rates_text(found.rates)}",
        *(["size tiny shows that all of it runs: its times and goals mean nothing"] if found.size == "tiny" else []),
        *(
            ["the machine was not idle at the start: seconds, rates and floors are worth little"]
            if _busy(found.machine)
            else []
        ),
        *(f"left out: {line}" for line in found.left_out),
        "",
        *table.head(),
    ]


def closing(found: Run) -> list[str]:
    """What stands below the table."""
    lines = ["", *table.notes(found.groups)]
    if found.rates_at_end is not None:
        name, factor = drifted = drift(found.rates, found.rates_at_end)
        lines.append(
            f"- the machine at the end: {name} {factor:.2f} times its rate of the beginning, the others changed less"
            + ("" if _steady(drifted) else "; something else was running: measure again when it is not")
        )
    minutes = sum(found.seconds.values()) / 60
    groups = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.seconds.items())
    return [*lines, f"- measured in {minutes:.1f} minutes: {groups}"]


def whole(found: Run) -> list[str]:
    """The printed page of a run."""
    rows = [
        row
        for name, lines in found.groups.items()
        for line in lines
        for row in table.rows(name, line, found.rates)
    ]  # fmt: skip
    return [*opening(found), *rows, *closing(found)]
