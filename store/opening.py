"""What lies at a path before anything is written there: nothing, this run, the same run begun elsewhere, or something else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from store import layout
from store.errors import DamagedError, ForeignError, MismatchError, UsageError
from store.files import is_temporary, json_bytes
from store.format import StoreMeta, part_name
from store.leases import Leases
from store.places import Place, place_of

OURS = {layout.CARD, "activations", "tokens", "prompts", "images", "statistics", "traces", "weights", "commits"}
OF_LENGTH = {"n_images", "prompts.sha256", "prompts.count"}
MAY_BE_MIXED = ("batch_size", "threads", "device", "versions")
"""what may differ between the runs that fill one store, with `--allow-mixed`: it changes roundings, and no meaning"""
WITHOUT_TRACES = (
    "was begun without traces and cannot get them: harvest the images to be traced into a store of their own with --out"
)


def read_meta(location: str | Path | Place) -> StoreMeta:
    """What a store says about itself; `ForeignError` when the folder is no store of ours, `DamagedError` when it cannot be read."""
    place = place_of(location)
    try:
        content = json.loads(place.read(layout.ROOT))
    except FileNotFoundError:
        if place.local is not None and any(
            (place.local / name).exists() for name in (layout.STORE_COMMIT, layout.SEAL)
        ):
            raise DamagedError(
                f"{place.where(layout.ROOT)} is missing from a store that was committed: it was lost. Mend it: "
                f"python -m store repair {place} [--from COPY]"
            ) from None
        if place.local is not None and place.local.exists():
            raise ForeignError(f"{place} is no Granary store: it has no zarr.json") from None
        raise ForeignError(f"there is no store at {place}") from None
    except NotADirectoryError:
        raise ForeignError(f"{place} is a file; a store is a folder") from None
    except IsADirectoryError:
        raise ForeignError(f"{place} is no Granary store: its zarr.json is a folder") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DamagedError(
            f"{place.where(layout.ROOT)} is not JSON any more ({error}): python -m store repair {place}"
        ) from None
    attributes = content.get("attributes") if isinstance(content, dict) else None
    return StoreMeta.from_attributes(attributes.get("granary") if isinstance(attributes, dict) else None, str(place))


def peek(path: Path) -> StoreMeta | None:
    """The meta of the store at `path`, or None when there is no store there."""
    return read_meta(path) if (path / layout.ROOT).exists() else None


def uncommitted(path: Path, meta: StoreMeta) -> list[int]:
    """The parts that have no commit yet, all of them where there is no store; `DamagedError` where a finished one lost a commit."""
    missing = [part for part in range(meta.n_parts) if not (path / layout.part_commit(part)).exists()]
    if missing and (path / layout.SEAL).exists():
        missing = [part for part in missing if not (path / layout.part_commit(part)).exists()]
    if missing and (path / layout.SEAL).exists():  # looked at twice: others may have finished the store meanwhile
        raise DamagedError(
            f"{path / layout.part_commit(missing[0])} is missing from a finished store: it was lost, not left to be "
            f"harvested. Take it from a copy, or have it made again: python -m store repair {path} [--from COPY]"
        )
    return missing


def refuse_other(path: Path, meta: StoreMeta, allow_mixed: bool = False) -> tuple[StoreMeta, dict[str, Any] | None]:
    """The meta to write under, and what is mixed: `UsageError` when `path` holds anything but nothing, or this run."""
    found = peek(path)
    if found is not None:
        if not (path / layout.STORE_COMMIT).exists() and found.origin == meta.origin:
            return meta, None  # its creation, or its extension, did not end
        return found, refuse_difference(path, found, meta, allow_mixed)
    for name in (layout.STORE_COMMIT, layout.SEAL):
        if (path / name).exists():
            raise DamagedError(
                f"{path / layout.ROOT} is missing from a store that has a {name}: it was lost. "
                f"Mend it first: python -m store repair {path} [--from COPY]"
            )
    if path.exists() and not _is_ours(path):
        raise UsageError(f"{path} exists and is not a Granary store: choose another --out, or remove it")
    return meta, None


def refuse_difference(path: Path, found: StoreMeta, meta: StoreMeta, allow_mixed: bool) -> dict[str, Any] | None:
    """What is mixed, None for nothing; `UsageError` naming every difference between the run at `path` and the one asked for."""
    there, here = (leaves(json.loads(json_bytes(each.attributes()))) for each in (found, meta))
    odd = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    mixed = {key: here.get(key) for key in odd if key.split(".")[0] in MAY_BE_MIXED}
    if odd and not (allow_mixed and len(mixed) == len(odd)):
        raise UsageError(_other_run(path, there, here, odd))
    return mixed or None


def refuse_extension(path: Path, meta: StoreMeta, allow_mixed: bool = False) -> tuple[StoreMeta, dict[str, Any] | None]:
    """The meta to write under, and what is mixed; `UsageError` unless the store at `path` can grow into what `meta` describes."""
    found = peek(path)
    if found is None:
        raise UsageError(f"there is no store at {path} to extend")
    grown = replace(found, n_images=meta.n_images, prompts=meta.prompts)
    mixed = refuse_difference(path, grown, meta, allow_mixed)
    last = found.n_parts - 1
    if is_short(found, meta) and (path / layout.part_commit(last)).exists():
        raise UsageError(
            f"{path} has {found.n_images} images, {found.chunk_images} a chunk: its last chunk is not full, and committed "
            f"chunks are never changed. Take the last part out first (python -m store rm {path} --parts {last}), "
            "then extend: it is made again"
        )
    if meta.n_images < found.n_images:
        raise UsageError(f"{path} has {found.n_images} images already; --images {meta.n_images} would be fewer")
    return grown, mixed


def is_short(found: StoreMeta, meta: StoreMeta) -> bool:
    """Whether the last part of a store becomes longer when the store does."""
    return bool(found.n_images % found.chunk_images) and meta.n_images != found.n_images


@contextmanager
def holding_short_part(path: Path, meta: StoreMeta, leases: Leases) -> Iterator[None]:
    """Keep others from writing a last part that is short while the store becomes longer."""
    found = peek(path)
    if found is None or not is_short(found, meta):
        yield
        return
    name = part_name(found.n_parts - 1)
    with leases.held(name, wait=False) as lease:
        if lease is None:
            raise MismatchError(f"{name} of {path} is being written by {leases.holder(name)}: extend when it has ended")
        yield


def _is_ours(path: Path) -> bool:
    """Whether a folder without zarr.json is empty, or a store whose zarr.json `repair` removed or a killed creation never wrote."""
    if not path.is_dir():
        return False
    names = {file.name for file in path.iterdir() if not is_temporary(file)}
    return not names or ("commits" in names and names <= OURS)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """`{"model": {"id": "x"}}` as `{"model.id": "x"}`."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, each in value.items() for k, v in leaves(each, f"{name}.{key}".lstrip(".")).items()}


def worth_naming(odd: list[str]) -> list[str]:
    """Of the keys that differ those to show: the matrices of traces follow from the model and the blocks."""
    return [key for key in odd if key != "traces.weights"] or odd


def _other_run(path: Path, there: dict[str, Any], here: dict[str, Any], odd: list[str]) -> str:
    of_traces = [key for key in odd if key.split(".")[0] == "traces"]
    if of_traces and not there.keys() & set(of_traces) and set(odd) <= {*of_traces, *OF_LENGTH}:
        return f"{path} {WITHOUT_TRACES}"
    may_be_mixed = all(key.split(".")[0] in MAY_BE_MIXED for key in odd)
    if set(odd) <= OF_LENGTH and here["n_images"] > there["n_images"]:
        return (
            f"{path} has {there['n_images']} images, and {here['n_images']} are asked for: to add images to it, "
            f"python -m harvest --extend {path} --images {here['n_images']}"
        )
    lines = [f"  {key}: there {there.get(key)!r}, asked for {here.get(key)!r}" for key in worth_naming(odd)]
    advice = " or say --allow-mixed (its later parts will then not be byte-equal to an undisturbed run's, and say so)"
    return (
        f"{path} holds another run; it differs in\n"
        + "\n".join(lines)
        + "\nRun with the settings that it was made with to go on, or choose another --out"
        + (advice if may_be_mixed else "")
        + "."
    )
