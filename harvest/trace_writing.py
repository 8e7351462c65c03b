"""Writes traces beside the model: a block's files are serialised, hashed and synced while the next block is computed.

One block waits at most, so the tensors of two are ever held: a slow disk slows the model, and fills no memory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import safetensors.torch
from torch import Tensor

KeepTrace = Callable[[str, bytes, Mapping[str, float]], dict[str, Any]]
"""writes a trace's file of that name and content, with these replay errors, and gives its entry in the commit"""


@dataclass(frozen=True)
class BlockTrace:
    """A trace that is ready to be written: the file's name, its tensors on the host, and what it says of itself."""

    name: str
    tensors: Mapping[str, Tensor]
    about: str
    """JSON, the file's metadata key `granary`"""
    replay: Mapping[str, float]

    def content(self) -> bytes:
        """The file's bytes."""
        return bytes(safetensors.torch.save(dict(self.tensors), {"granary": self.about}))


class TraceWriter:
    """Writes the traces of a part through `keep`, in the order in which they come; everything is written when its context ends.

    What `keep` raises is raised by the next `put`, or when the context ends.  `waited` is told the seconds that either stood still.
    """

    def __init__(self, keep: KeepTrace, waited: Callable[[float], None] = lambda _seconds: None) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        """file -> its entry in the commit; whole after the context"""
        self._keep, self._waited = keep, waited
        self._pool = ThreadPoolExecutor(1, "traces")
        self._writing: Future[None] | None = None

    def put(self, traces: Sequence[BlockTrace]) -> None:
        """Have the traces of a block written, once those of the block before are."""
        self._settle()
        self._writing = self._pool.submit(self._write, traces)

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        begun = time.perf_counter()
        self._pool.shutdown(wait=True)  # nothing is renamed any more once the lease may be given back
        self._waited(time.perf_counter() - begun)
        if kind is None:
            self._settle()

    def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            begun = time.perf_counter()
            try:
                writing.result()
            finally:
                self._waited(time.perf_counter() - begun)

    def _write(self, traces: Sequence[BlockTrace]) -> None:
        for each in traces:
            self.entries[each.name] = self._keep(each.name, each.content(), each.replay)
