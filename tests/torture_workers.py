"""Processes that harvest: forks of one that has imported everything and has run nothing, or Pythons of their own."""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from store.command import program


@dataclass
class Worker:
    """One process that harvests, in a group of its own."""

    pid: int
    words: Sequence[str]
    log: Path
    code: int | None = None
    """exit code, or minus the signal that ended it"""

    def ended(self) -> bool:
        """Whether it is no more; it is reaped then."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def preload() -> None:
    """Import what a harvest imports, so that a fork need not; runs nothing of it."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before torch is there
    from harvest.quiet import quiet

    with quiet():
        import pandas  # noqa: F401  # by pyarrow, when it first makes a table
        from diffusers import (  # noqa: F401
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            FluxPipeline,
            FluxTransformer2DModel,
        )
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast  # noqa: F401

        import harvest.fill  # noqa: F401


def start(words: Sequence[str], log: Path, fresh: bool = False) -> Worker:
    """Let `python -m harvest WORDS` begin, what it prints going to `log`; a new Python when it is to be `fresh`."""
    log.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        _become_harvest(words, log, fresh)
    return Worker(pid, words, log)


def _become_harvest(words: Sequence[str], log: Path, fresh: bool) -> NoReturn:
    """In the child: be `python -m harvest WORDS`, and end."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell ignores for a background job
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", "harvest", *words])
        from harvest.__main__ import COMMANDS

        sys.argv[:] = ["harvest", *words]
        code = program("harvest", COMMANDS, list(words), default="harvest")
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def children() -> list[int]:
    """The processes whose parent is this one."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it may end while we look
            if (
                folder.name.isdecimal()
                and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
            ):
                found.append(int(folder.name))
    return found
