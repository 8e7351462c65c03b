"""Several processes of one run, as torchrun starts them: who does what, and how none waits for ever for one that died.

    --parallel models   each rank trains its share of the models; they meet when all have ended
    --parallel rows     every rank trains every model on batches of its own: rank r of w takes batches k*w + r, gradients are
                        averaged, so all hold the same weights; rank 0 writes

A rank says every few seconds in the store of the rendezvous that it lives, and whoever waits there for a rank that has said
nothing for a minute, or that has failed, stops with a message.  Collectives stop at once when a peer's connection closes, and
after `COLLECTIVE_SECONDS` when it hangs.  What goes wrong on several ranks is said once.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from store.errors import GranaryError, Interrupted, UsageError
from store.files import sha256_bytes

Parallel = Literal["models", "rows"]

BEAT_SECONDS = 2.0
PATIENCE_SECONDS = 60.0
COLLECTIVE_SECONDS = 600.0
SAYING_SECONDS = 10.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LostRankError(GranaryError):
    """Another process of the same run died or failed: nothing can be averaged or waited for any more."""


@dataclass
class Ranks:
    """The processes of a run; one alone by default, for which every method does nothing."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """rank on this machine: the CUDA device of this process"""
    here: int = 1
    """ranks on this machine, which share its memory"""
    parallel: Parallel = "models"
    launched: bool = False
    """whether torchrun, or somebody like it, started this process"""
    _store: Any = None
    _flags: Any = None
    """the group in which the CPU asks the others something, without waiting for the device"""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of_environment(cls) -> "Ranks":
        """As torchrun's variables say, before it is known what is shared; `UsageError` for variables that make no sense."""
        size = _number("WORLD_SIZE", 1)
        rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
        if not 0 <= rank < size:
            raise UsageError(f"RANK is {rank} of WORLD_SIZE {size}: start the processes with torchrun, which sets both")
        absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if size > 1 and absent:
            raise UsageError(
                f"WORLD_SIZE is {size} and the environment has no {', '.join(absent)}: start the processes with torchrun, which sets "
                "them all, or unset WORLD_SIZE"
            )
        return cls(rank, size, local, _number("LOCAL_WORLD_SIZE", 1), launched="WORLD_SIZE" in os.environ)

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def sharers(self) -> int:
        """Ranks that share each model's batches."""
        return self.size if self.parallel == "rows" else 1

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of so many models this rank, or another, trains: neighbours, because they share a read."""
        if self.parallel == "rows":
            return range(count)
        place = self.rank if rank is None else rank
        return range(place * count // self.size, (place + 1) * count // self.size)

    @contextmanager
    def speaking_once(self) -> Iterator[None]:
        """Inside, what goes wrong on several ranks is told to the user by one of them: the first.

        Ranks that meet the same error have the same words.  A rank that lost another, or is told to stop, is silent where
        anything was said before.  Needs a store that outlives ranks, which torchrun has; without one each speaks for itself.
        """
        try:
            yield
        except GranaryError as error:
            error.said = not self._is_first_to_say("" if isinstance(error, LostRankError | Interrupted) else str(error))
            raise
        except KeyboardInterrupt as stop:  # SIGTERM as well: torchrun ends the others when one has failed
            if self._is_first_to_say(""):
                raise
            quiet = Interrupted("stopped because another rank was")
            quiet.said = True
            raise quiet from stop

    def _is_first_to_say(self, words: str) -> bool:
        """Whether nobody has said these words; "" stands for any words."""
        if self.size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return True
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=SAYING_SECONDS)))
            times: int = store.add("said", 1)
            if words:
                times = store.add(f"said/{sha256_bytes(words.encode())}", 1)
            return times == 1
        except RuntimeError:  # nobody answers: better twice than never
            return True

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Inside, the ranks know of each other; a failure of this one is told to those that wait for it."""
        if self.size == 1:
            yield
            return
        _stay_on_this_machine()
        stop = threading.Event()
        with self._watched("at the start"):
            self._store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=COLLECTIVE_SECONDS)))
            self._beat(0)
        heart = threading.Thread(target=self._beats, args=(stop,), daemon=True)
        heart.start()
        try:
            with self.speaking_once():
                if self.parallel == "rows":
                    self._connect(device)
                yield
                self.wait("the end")
        except BaseException as error:
            with contextlib.suppress(RuntimeError):
                self._set(f"failed/{self.rank}", str(error) or type(error).__name__)
            raise
        finally:
            stop.set()
            heart.join()
            if dist.is_initialized():
                dist.destroy_process_group()
            self._store = self._flags = None

    def wait(self, where: str) -> None:
        """Go on when every rank has come here; `LostRankError` when one has failed or says nothing any more."""
        if self._store is None:
            return
        with self._watched(where):
            self._set(f"{where}/{self.rank}", "here")
            for other in range(self.size):
                self._wait_for(other, where)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks that share batches, in place; the same bits on all of them."""
        if self.sharers == 1:
            return
        with self._watched("while gradients were averaged"):
            found = list(tensors)
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in found]:
                assert work is not None
                work.wait()
            for tensor in found:
                tensor.div_(self.size)

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks that share batches, in place."""
        if self.sharers > 1:
            with self._watched("while counters were added up"):
                dist.all_reduce(tensor)

    def greatest(self, number: int) -> int:
        """The greatest of the numbers that the ranks which share batches give here."""
        if self.sharers == 1:
            return number
        found = torch.tensor(number)
        with self._watched("between two steps"):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._flags)
        return int(found)

    def copy_of_first(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors of rank 0 to all that share batches, in place."""
        if self.sharers > 1:
            with self._watched("while rank 0's weights were handed out"):
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def _connect(self, device: torch.device) -> None:
        """Make the groups in which ranks average and ask."""
        with self._watched("at the start"):
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("collectives", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=COLLECTIVE_SECONDS),
                device_id=device if device.type == "cuda" else None,
            )
            if device.type == "cuda":
                self._flags = dist.new_group(backend="gloo")

    def _wait_for(self, other: int, where: str) -> None:
        heard, beat = time.monotonic(), b""
        while not self._has(f"{where}/{other}"):
            if self._has(f"failed/{other}"):
                raise LostRankError(f"rank {other} of {self.size} failed: {self._get(f'failed/{other}').decode()}")
            now = self._get(f"beat/{other}") if self._has(f"beat/{other}") else b""
            if now != beat:
                heard, beat = time.monotonic(), now
            if time.monotonic() - heard > PATIENCE_SECONDS:
                raise LostRankError(
                    f"rank {other} of {self.size} has not been heard of for {PATIENCE_SECONDS:.0f} s ({where}): it was killed, or "
                    "its machine is gone. What was saved is safe: run the same command again, it goes on from there"
                )
            time.sleep(0.05)

    @contextmanager
    def _watched(self, where: str) -> Iterator[None]:
        """What torch raises when a peer is gone, as a message of ours."""
        try:
            yield
        except (RuntimeError, TimeoutError) as error:  # DistError and its kinds are RuntimeErrors
            raise LostRankError(
                f"rank {self.rank} of {self.size} lost the other processes {where}: one of them failed, was killed, or cannot be "
                f"reached ({str(error).splitlines()[0]}). What was saved is safe: run the same command again, it goes on from there"
            ) from None

    def _beats(self, stop: threading.Event) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: whoever waits in the main thread says so
            while not stop.wait(BEAT_SECONDS):
                count += 1
                self._beat(count)

    def _beat(self, count: int) -> None:
        self._set(f"beat/{self.rank}", str(count))

    def _set(self, key: str, value: str) -> None:
        with self._lock:
            self._store.set(key, value)

    def _has(self, key: str) -> bool:
        with self._lock:
            return bool(self._store.check([key]))

    def _get(self, key: str) -> bytes:
        with self._lock:
            return bytes(self._store.get(key))


def _number(name: str, default: int) -> int:
    word = os.environ.get(name, str(default))
    if not word.isdecimal():
        raise UsageError(f"the environment says {name}={word!r}, which is no number: start the processes with torchrun")
    return int(word)


def _stay_on_this_machine() -> None:
    """Where all ranks are on this machine, let gloo use the loopback interface: the host's name need not resolve then."""
    here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    names = {name for _, name in socket.if_nameindex()}
    if (here or os.environ.get("MASTER_ADDR") in _LOOPBACK) and "lo" in names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
