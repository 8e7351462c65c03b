"""Where things lie in a store, and a first look at what a folder holds."""

import json
from pathlib import Path

from store.errors import DamagedError, ForeignError
from store.format import StoreMeta, part_name


def root(path: Path) -> Path:
    """The group's metadata: the attribute `granary` in it is the StoreMeta."""
    return path / "zarr.json"


def store_commit(path: Path) -> Path:
    return path / "commits" / "store.json"


def part_commit(path: Path, part: int) -> Path:
    return path / "commits" / f"{part_name(part)}.json"


def seal(path: Path) -> Path:
    return path / "seal.json"


def runs_folder(path: Path) -> Path:
    """Beside the store, never in it: command lines, rates and hosts, on which no byte of the store depends."""
    return path.with_name(f"{path.name}.runs")


def read_meta(path: Path) -> StoreMeta:
    """What a store says about itself; `ForeignError` when the folder is no store of ours."""
    try:
        content = json.loads(root(path).read_bytes())
    except FileNotFoundError:
        if not path.exists():
            raise ForeignError(f"there is no store at {path}") from None
        raise ForeignError(f"{path} is no Granary store: it has no zarr.json") from None
    except NotADirectoryError:
        raise ForeignError(f"{path} is a file; a store is a folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedError(
            f"{root(path)} is not JSON any more ({error}): restore it from a copy of the store"
        ) from None
    attributes = content.get("attributes") if isinstance(content, dict) else None
    return StoreMeta.from_attributes(attributes.get("granary") if isinstance(attributes, dict) else None, str(path))


def peek(path: Path) -> StoreMeta | None:
    """The meta of the store at `path`, or None when there is no store there."""
    return read_meta(path) if root(path).exists() else None
