"""The four programs: what their tables name is there, and is imported only when it is needed."""

import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from store.command import Command, program
from tests.test_house import OURS, ROOT


@pytest.mark.parametrize("package", OURS)
def test_every_command_names_settings_and_a_function_that_takes_them(package: str) -> None:
    for name, command in importlib.import_module(f"{package}.__main__").COMMANDS.items():
        settings, run = command.load_settings(), command.load_run()
        assert is_dataclass(settings), name
        taken = next(iter(inspect.signature(run, eval_str=True).parameters.values())).annotation
        assert taken is settings or taken is object, (name, taken)


def commands_said(text: str) -> set[tuple[str, str]]:
    """(package, command) of every `-m analyze COMMAND` in a text; harvest, and train at times, go on with a flag instead."""
    return set(re.findall(rf"-m ({'|'.join(OURS)}) ([a-z][a-z-]*)", text))


@pytest.mark.parametrize("file", ["README.md", "Makefile", "CHANGELOG.md", "notebooks/README.md"])
def test_every_command_that_is_written_down_is_there(file: str) -> None:
    there = {(package, name) for package in OURS for name in importlib.import_module(f"{package}.__main__").COMMANDS}
    said = commands_said((ROOT / file).read_text())
    assert said and not said - there
    assert commands_said("python -m analyze nothing --out O; $(PY) -m harvest --model M") == {("analyze", "nothing")}


@pytest.mark.parametrize("package", ["store", "analyze"])
def test_the_list_of_commands_waits_for_no_torch(package: str) -> None:
    code = (
        f"import sys; from {package}.__main__ import COMMANDS; from store.command import program\n"
        f"code = program('{package}', COMMANDS, ['--help']); print(code, 'torch' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False"


def test_an_interrupt_while_python_imports_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "interrupted_module.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    there, gone = "store.info:InfoSettings", "interrupted_module:anything"
    assert program("store", {"info": Command(gone, gone, "")}, ["info", "STORE"]) == 1
    assert capsys.readouterr().err == "error: interrupted before anything was done\n"
    assert program("store", {"info": Command(there, gone, "")}, ["info", "STORE"]) == 1
    assert capsys.readouterr().err.startswith("error: interrupted. What was committed is safe")
