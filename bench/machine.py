"""The machine: what it is, and how fast it copies, writes, reads, hashes and multiplies, with all its cores.

copy      bytes copied from one place of the memory to another
cached    bytes of a file in the page cache read into memory
read      bytes of a file that is not in the page cache; whether the disk below has one of its own nobody can tell from here
write     bytes written into a new file, until `fsync` has returned
crc32c    bytes that CRC-32C is computed of
sha256    bytes that SHA-256 is computed of
float32   operations of a product of square float32 matrices; bfloat16 likewise
"""

import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import torch

from bench.lines import Size
from bench.timing import by_turns, cores, forget

BYTES = {"tiny": 1 << 20, "quick": 256 << 20, "full": 256 << 20}
MATRIX = {"tiny": 256, "quick": 2048, "full": 2048}
BLOCK = 16 << 20
UNITS = {"float32": "FLOP/s", "bfloat16": "FLOP/s"}


@dataclass(frozen=True)
class Machine:
    """What a run was measured on."""

    processor: str
    cores: int
    memory: int
    """bytes"""
    disk: str
    """file system and device below the benchmark's temporary folder"""
    system: str
    python: str
    torch: str
    load: float
    """runnable processes in the minute before the run began; a quiet machine has less than 0.5"""

    def text(self) -> str:
        """In one line."""
        return (
            f"{self.processor}, {self.cores} cores, {self.memory / 2**30:.0f} GiB of memory, {self.disk}, {self.system}, "
            f"Python {self.python}, torch {self.torch}; load {self.load:.1f} at the start"
        )

    def differences(self, other: "Machine") -> list[str]:
        """What makes times on the two incomparable, in words."""
        mine, its = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} and {its[name]}" for name in mine if name != "load" and mine[name] != its[name]]


def this_machine(folder: Path) -> Machine:
    """This machine, and the disk that `folder` is on."""
    return Machine(
        processor=_processor(),
        cores=cores(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk=_disk(folder),
        system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        load=round(os.getloadavg()[0], 2),
    )


def _processor() -> str:
    """`Intel(R) Xeon(R) Processor (family 6, model 207)`: virtual machines hide the name, and not the model's number."""
    info = Path("/proc/cpuinfo")
    found: dict[str, str] = (
        dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", info.read_text(), re.MULTILINE))
        if info.exists()
        else {}
    )
    if "model name" not in found:
        return platform.processor() or platform.machine()
    number = f" (family {found['cpu family']}, model {found['model']})" if {"cpu family", "model"} <= set(found) else ""
    return found["model name"] + number


def _disk(folder: Path) -> str:
    """`ext4 on /dev/vda`: the mount that is longest among those that hold the folder."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "a disk"
    best = ("", "unknown", "unknown")
    for device, place, kind in (line.split()[:3] for line in mounts.read_text().splitlines()):
        if folder.resolve().is_relative_to(place) and len(place) >= len(best[0]):
            best = (place, kind, device)
    return f"{best[1]} on {best[2]}"


def measured_rates(folder: Path, size: Size) -> dict[str, float]:
    """Bytes and operations a second, the best of several, in about ten seconds; `folder` is on the disk in question."""
    return {**_of_memory(BYTES[size]), **_of_disk(folder, BYTES[size]), **_of_products(MATRIX[size])}


def rates_text(rates: dict[str, float]) -> str:
    """`copy 9.8 GB/s, …, float32 310 GFLOP/s`"""
    return ", ".join(f"{name} {rate / 1e9:.3g} G{UNITS.get(name, 'B/s')}" for name, rate in rates.items())


def drift(start: dict[str, float], end: dict[str, float]) -> tuple[str, float]:
    """The rate that changed most between the beginning and the end of a run, and by which factor."""
    name = max(start, key=lambda name: abs(np.log(end[name] / start[name])))
    return name, end[name] / start[name]


def _best(works: dict[str, Callable[[], object]], amount: float, rounds: int = 8) -> dict[str, float]:
    times = by_turns(*works.values(), rounds=rounds)
    return {name: amount / min(seconds) for name, seconds in zip(works, times, strict=True)}


def _of_memory(count: int) -> dict[str, float]:
    """Each core on a share of its own."""
    source, target = np.ones(count, np.uint8), np.zeros(count, np.uint8)
    edges = np.linspace(0, count, cores() + 1).astype(int)
    shares = [slice(a, b) for a, b in itertools.pairwise(edges)]
    with ThreadPoolExecutor(len(shares)) as pool:
        return _best(
            {
                "copy": lambda: list(pool.map(lambda share: np.copyto(target[share], source[share]), shares)),
                "crc32c": lambda: list(pool.map(lambda share: crc32c.crc32c(source[share].data), shares)),
                "sha256": lambda: list(pool.map(lambda share: hashlib.sha256(source[share].data).digest(), shares)),
            },
            count,
        )


def _of_disk(folder: Path, count: int) -> dict[str, float]:
    """One file for each core."""
    block = np.random.default_rng(0).integers(0, 256, min(BLOCK, count // cores()), np.uint8)
    blocks = max(1, count // cores() // len(block))
    paths = [folder / f"rate-{number}" for number in range(cores())]
    buffers = [np.empty_like(block) for _ in paths]

    def write(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(blocks):
                file.write(block.data)
            os.fsync(file.fileno())

    def read(path: Path, buffer: np.ndarray) -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer.data):
                pass

    amount = len(paths) * blocks * len(block)
    with ThreadPoolExecutor(len(paths)) as pool:
        found = _best({"write": lambda: list(pool.map(write, paths))}, amount, 3)
        found |= _best({"cached": lambda: list(pool.map(read, paths, buffers))}, amount)
        (cold,) = by_turns(
            lambda: list(pool.map(read, paths, buffers)), rounds=3, warm_up=False, before=lambda: forget(paths)
        )
    for path in paths:
        path.unlink()
    return {**found, "read": amount / min(cold)}


def _of_products(width: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(width, width).to(dtype), torch.randn(width, width).to(dtype)
        out = torch.empty_like(a)
        found |= _best({name: lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, 2 * width**3, 16)  # type: ignore[misc]
    return found


def machine_of(value: dict[str, Any]) -> Machine:
    """The machine that `asdict` kept; `TypeError` or `ValueError` for what is none."""
    found = Machine(**value)
    for field in fields(Machine):
        kept, wanted = getattr(found, field.name), (int, float) if field.type is float else (field.type,)
        if type(kept) not in wanted:
            raise ValueError(f"{kept!r} where the machine's {field.name} belongs")
    return found


def now() -> str:
    """The date, for the head of a table."""
    return time.strftime("%Y-%m-%d")
