"""Run records beside a store: who ran what, when, how fast.  No byte of the store depends on them.

`STORE.runs/settings.json` is what `--resume STORE` reads; `STORE.runs/TIME-HOST-PID.json` is one run, and
`STORE.runs/workers/` has under the same name how far it is (`progress.py`).
"""

import dataclasses
import json
import os
import platform
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harvest.settings import OF_TRACES, HarvestSettings
from store import layout
from store.errors import UsageError
from store.files import write_json
from store.format import StoreMeta
from store.opening import WITHOUT_TRACES, peek
from store.sites import spans

OF_THIS_RUN = (
    "out",
    "resume",
    "extend",
    "plan",
    "budget",
    "scale",
    "images_per_second",
    "disk_per_second",
    "parts",
    "worker",
    "wait",
    "lease_seconds",
    "dask",
    "allow_mixed",
    "offload",
    "text_encoders",
)
"""settings that say how a store is filled now, and nothing about its content"""
HOLDING = ("offload", "text_encoders")
"""those of them that say how the model fits on its device: kept for the runs that go on, which may say something else"""
DECIDED = (
    "threads", "dtype", "images", "device", "batch_size", "num_inference_steps", "guidance", "trace_images",
    "resolution", "max_sequence_length",
)  # fmt: skip
"""settings that the machine or the model decides where nothing is said: `keep_settings` keeps what it decided"""


def restored(settings: HarvestSettings) -> HarvestSettings:
    """`settings` with `--resume` and `--extend` replaced by the settings that the store was begun with.

    `UsageError` when they are not beside it, or when flags were given that they decide.
    """
    folder = settings.resume or settings.extend
    if folder is None:
        return settings
    flag = "--resume" if settings.resume is not None else "--extend"
    own = (*OF_THIS_RUN, "images") if settings.extend is not None else OF_THIS_RUN
    changed = [
        f.name for f in dataclasses.fields(settings) if f.name not in own and getattr(settings, f.name) != f.default
    ]
    there = peek(folder) if changed and set(changed) <= {"trace", *OF_TRACES} else None
    if there is not None and there.traced is None:
        raise UsageError(f"{folder} {WITHOUT_TRACES}")
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise UsageError(
            f"{flag} takes the settings from the store's first run; leave out {flags}, or give all flags with --out {folder}"
        )
    file = layout.runs_folder(folder) / "settings.json"
    try:
        saved = json.loads(file.read_bytes())
    except (OSError, ValueError):
        if not folder.exists():
            raise UsageError(f"there is no store at {folder}") from None
        raise UsageError(
            f"{file} is missing or damaged, so {flag} cannot know the settings: "
            f"give the flags of the first run with --out {folder}"
            + ("" if settings.extend is None else ", which writes them again; then extend")
        ) from None
    kinds = typing.get_type_hints(HarvestSettings)
    values = {name: _restored(value, kinds[name]) for name, value in saved.items() if name in kinds}
    values |= {name: getattr(settings, name) for name in own if name not in HOLDING or name in _given(settings)}
    return HarvestSettings(**{**values, "out": folder, "resume": None, "extend": None})


def held_as_begun(asked: HarvestSettings, settings: HarvestSettings) -> str:
    """Which flags of `HOLDING` the `settings` of a run have from the store's first one, where it was not `asked` for them; or nothing."""
    return " ".join(
        f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in sorted(_given(settings) - _given(asked))
    )


def _given(settings: HarvestSettings) -> set[str]:
    """The settings of `HOLDING` that are not as they are without a flag."""
    fields = (field for field in dataclasses.fields(settings) if field.name in HOLDING)
    return {field.name for field in fields if getattr(settings, field.name) != field.default}


def _restored(value: Any, kind: Any) -> Any:
    is_path = kind is Path or (isinstance(kind, types.UnionType) and Path in typing.get_args(kind))
    return Path(value) if is_path and value is not None else value


def keep_settings(settings: HarvestSettings, meta: StoreMeta, extending: bool) -> None:
    """Write the settings of a store beside it, before it is begun or extended, with what the machine decided: what `restored` reads."""
    assert settings.out is not None
    file = layout.runs_folder(settings.out) / "settings.json"
    if extending or not file.exists() or not (settings.out / layout.ROOT).exists():
        device = "cpu" if meta.device == "cpu" else settings.device
        decided = {"threads": meta.threads, "dtype": meta.dtype, "images": meta.n_images, "device": device}
        decided["batch_size"] = meta.batch_size
        decided |= {"num_inference_steps": meta.num_inference_steps, "guidance": meta.guidance}
        if settings.height is None:
            decided["resolution"] = meta.height
        decided["max_sequence_length"] = meta.max_sequence_length
        decided |= {name: getattr(settings, name) for name in HOLDING}
        if meta.traced is not None:  # the first ten of fewer are not the first ten of more
            decided["trace_images"] = spans(meta.traced.images)
        write_json(file, {**_plain(settings), **decided})


def as_begun(settings: HarvestSettings, meta: StoreMeta) -> bool:
    """Whether the store of `meta` was begun with these settings, as far as the file beside it says."""
    assert settings.out is not None
    try:
        saved = json.loads((layout.runs_folder(settings.out) / "settings.json").read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(saved, dict) or saved.get("images") != meta.n_images:
        return False
    plain = _plain(settings)
    return all(value == saved.get(name) or (value is None and name in DECIDED) for name, value in plain.items())


def _plain(settings: HarvestSettings) -> dict[str, Any]:
    """The settings as JSON carries them, files by their absolute paths."""
    saved = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in OF_THIS_RUN}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in saved.items()}
    for name in ("prompts", "model"):
        if plain[name] is not None and Path(plain[name]).exists():
            plain[name] = str(Path(plain[name]).resolve())
    return plain


def name_of_run() -> str:
    """`TIME-HOST-PID`: no two processes that begin at once have the same, not even those of containers."""
    host = re.sub(r"[^A-Za-z0-9.-]", "_", platform.node()) or "host"
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{host}-{os.getpid()}"


@contextmanager
def record(settings: HarvestSettings, images: int) -> Iterator[Callable[[int, float, bool, Mapping[str, Any]], None]]:
    """Write this run's record when it begins, and again with its figures through the function handed out."""
    assert settings.out is not None
    folder = layout.runs_folder(settings.out)
    name = name_of_run()
    begun, file = name.partition("-")[0], folder / f"{name}.json"
    facts: dict[str, Any] = {
        "command": sys.argv,
        "settings": _plain(settings),
        "host": platform.node(),
        "platform": platform.platform(),
        "begun": begun,
        "images_planned": images,
    }
    write_json(file, facts)

    def note(done: int, seconds: float, finished: bool, waiting: Mapping[str, Any]) -> None:
        drawn = seconds - waiting.get("others", 0.0)  # while others drew
        rate = done / drawn if drawn > 0 else None
        figures = {
            "images_done": done,
            "seconds": seconds,
            "images_per_second": rate,
            "store_finished": finished,
            "waiting": waiting,
        }
        try:
            write_json(file, {**facts, **figures})
        except OSError as error:  # a full disk: what ended the run says so, and a store that is whole needs no figures
            print(f"note: {file} lacks the figures of this run: {error.strerror}", flush=True)

    yield note
