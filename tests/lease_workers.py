"""What the processes of test_leases.py do.  Imports `store` alone, so that they start at once."""

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import store.leases
from store.errors import GranaryError
from store.format import StoreMeta, part_name
from store.leases import Leases
from store.writer import Part, StoreWriter


def hold(folder: Path, name: str, pipe: Connection, seconds: float) -> None:
    """Take a lease, say so, and do nothing more until told."""
    store.leases.LEASE_SECONDS = seconds
    lease = Leases(folder).take(name)
    pipe.send(lease is not None)
    pipe.recv()


def write_a_part(path: Path, meta: StoreMeta, content: Part, pipe: Connection, seconds: float, pause_at: int) -> None:
    """Write part 0, but say so and wait before the file number `pause_at` is synced; then say how it ended."""
    store.leases.LEASE_SECONDS = seconds
    writer = StoreWriter.open_or_create(path, meta)
    with writer.claim(0) as lease:
        assert lease is not None
        os.fsync = _pausing(os.fsync, pipe, pause_at)
        try:
            writer.write_part(0, content, lease)
        except GranaryError as error:
            pipe.send((type(error).__name__, str(error)))
        else:
            pipe.send(("committed", ""))


def _pausing(fsync: Callable[[int], None], pipe: Connection, pause_at: int) -> Callable[[int], None]:
    calls = iter(range(10**6))

    def paused(descriptor: int) -> None:
        fsync(descriptor)
        if next(calls) == pause_at:
            pipe.send("paused")
            pipe.recv()

    return paused


def race(folder: Path, rounds: int, ready: Barrier, pipe: Connection) -> None:
    """In each round try to take the same lease at the same moment as the others; then say in which this process got it."""
    leases, won = Leases(folder), []
    for number in range(rounds):
        ready.wait()
        if leases.take(part_name(number)) is not None:
            won.append(number)
    ready.wait()  # nobody's leases become a dead process's before the last round is over
    pipe.send(won)


def fill(path: Path, meta: StoreMeta, parts: dict[int, Part], ready: Barrier, pipe: Connection) -> None:
    """Fill and seal a store together with others; then say which parts were written here, or what went wrong."""
    ready.wait()
    done: Any = []
    try:
        writer = StoreWriter.open_or_create(path, meta)
        while missing := writer.missing():
            for part in missing:
                with writer.claim(part) as lease:
                    if lease is not None and not writer.is_committed(part):
                        writer.write_part(part, parts[part], lease)
                        done.append(part)
        assert writer.seal()
    except Exception as error:
        done = repr(error)
    pipe.send(done)
