"""Arrays as others save them, the command that imports them, and what a folder holds."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from store import Store, open_store
from store.command import Command
from store.foreign.importing import ImportSettings, run

COMMAND = {"import": Command(ImportSettings, run, "Make a store of activations that somebody already has.")}


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def saved(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        safetensors.numpy.save_file({"activations": values}, path)
    return path


def imported(folder: Path, *activations: object, **changes: Any) -> Store:
    """A finished store made from the arrays; of `img_5` at step 0 unless they say otherwise."""
    words = tuple(map(str, activations))
    plain = {} if any("=" in word for word in words) else {"site": "img_5", "step": "0"}
    summary = run(ImportSettings(**{"activations": words, "out": folder / "store", **plain, **changes}))
    assert summary.finished
    return open_store(folder / "store")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
