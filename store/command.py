"""How a program of ours runs: settings from the command line, one message for a failure, an exit code.

Every program is a table of commands, each a frozen dataclass of settings and the function that takes
it.  `python -m train --pack …` and `train.run(TrainSettings(pack=…))` are the same thing.  The table names
them as `module:name`, so that a program imports (torch alone takes seconds) only what the command needs.
"""

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import tyro

from store.errors import GranaryError, Interrupted

OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.EIO, errno.ESTALE, errno.EFBIG,
}  # fmt: skip
"""Errors of the file system that a user can do something about; anything else is a bug of ours and shows its traceback."""
REMEDIES = {
    errno.EISDIR: "that is a folder where a file is to be: name a file",
    errno.ENOTDIR: "that is a file where a folder is to be: name another",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@dataclass(frozen=True)
class Command:
    """One command of a program: its settings class, what runs it, and one line of help."""

    settings: type[Any] | str
    run: Callable[[Any], Any] | str
    help: str

    def load_settings(self) -> type[Any]:
        """The settings class; imported now if it is named as `module:name`."""
        return _imported(self.settings)  # type: ignore[no-any-return]

    def load_run(self) -> Callable[[Any], Any]:
        """The function; imported now if it is named as `module:name`."""
        return _imported(self.run)  # type: ignore[no-any-return]


def _imported(found: Any) -> Any:
    if not isinstance(found, str):
        return found
    module, name = found.split(":")
    return getattr(importlib.import_module(module), name)


def program(
    name: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None, default: str | None = None
) -> int:
    """Run `python -m NAME [COMMAND] FLAGS` and return its exit code: 0 done, 1 failed, 2 wrong usage.

    `default` names the command that is meant when the first word is a flag.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = words.pop(0) if words and words[0] in commands else default
    if chosen is None:
        return _usage(name, commands, words)
    if default is not None and len(commands) > 1 and words[:1] in (["-h"], ["--help"]) and chosen == default:
        _usage(name, commands, words)
    command = commands[chosen]
    prog = f"python -m {name}" + ("" if chosen == default else f" {chosen}")
    try:
        settings = _parsed(command.load_settings(), command.help, prog, words)
    except SystemExit as stop:  # tyro has explained itself
        return stop.code if isinstance(stop.code, int) else 2
    except GranaryError as error:  # settings that contradict each other
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted before anything was done"))
    except BrokenPipeError:
        return _nobody_listens()
    return guarded(lambda: command.load_run()(settings))


def _parsed(settings: type[Any], description: str, prog: str, words: list[str]) -> Any:
    """The settings; a `GranaryError` of theirs comes through as itself, where tyro would draw a box around it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                settings, prog=prog, description=description, args=words, config=(tyro.conf.DisallowNone,)
            )  # "None" is no word of ours: a flag that is left out has no value
    except SystemExit as stop:
        if isinstance(stop.__context__, GranaryError):
            raise stop.__context__ from None
        sys.stderr.write(said.getvalue())
        raise


def guarded(work: Callable[[], Any]) -> int:
    """Run `work`; a failure that we foresaw becomes one message on stderr and an exit code, never a traceback."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        work()
    except GranaryError as error:
        return _fail(error)
    except _Terminated:
        return _fail(Interrupted("terminated by SIGTERM. What was committed is safe: run the same command again."))
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted. What was committed is safe: run the same command again."))
    except BrokenPipeError:
        return _nobody_listens()
    except MemoryError as error:
        return _fail(
            GranaryError(
                f"not enough memory: {error}. What was committed is safe: ask for less at once, or more memory"
            )
        )
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        return _fail(
            GranaryError(
                f"{error.strerror}: {error.filename or 'while writing'}. What was committed is safe: "
                f"{REMEDIES.get(error.errno, 'make room or choose another folder')}, then run the same command again."
            )
        )
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived.  No `Exception`, or a library would take it for a failure of its own work and say something else."""


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _nobody_listens() -> int:
    """The reader of our output went away, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _fail(error: GranaryError) -> int:
    sys.stdout.flush()
    if not error.said:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _usage(name: str, commands: Mapping[str, Command], words: Sequence[str]) -> int:
    asked = words[:1] in (["-h"], ["--help"])
    out = sys.stdout if asked else sys.stderr
    if words and not asked:
        print(f"error: python -m {name} has no command {words[0]!r}; it has: {', '.join(commands)}", file=out)
    print(f"usage: python -m {name} COMMAND …   (python -m {name} COMMAND --help lists its flags)\n", file=out)
    for command_name, command in commands.items():
        print(f"  {command_name:<12} {command.help}", file=out)
    print(file=out)
    return 0 if asked else 2
