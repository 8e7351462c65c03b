"""`python -m store rm STORE --parts 3-7`: un-commits parts, so that their room is free and they can be made again.

The order makes a kill at any moment harmless: first the seal goes, so the store is unfinished; then the commit of a part,
so the part was never written; then its files, which nothing lists any more.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from store import layout
from store.care.findings import spans
from store.care.packs import refuse_pack
from store.care.survey import Survey, remaking
from store.care.verify import threads_for
from store.errors import DamagedError, MismatchError, UsageError
from store.files import fsync_folder
from store.format import StoreMeta, part_name
from store.leases import Leases
from store.places import Place, place_of
from store.sites import parse_numbers
from store.sizes import human_size


@dataclass(frozen=True)
class RemoveSettings:
    """Un-commit parts of a store and remove their files."""

    store: Annotated[str, tyro.conf.Positional]
    """the store, a folder of this machine"""
    parts: str
    """which parts (0-based): 3-7,9"""


def run(settings: RemoveSettings) -> int:
    """Un-commit the parts; how many bytes that freed.

    Errors: `UsageError` for a store whose parts cannot be made again, `DamagedError` where the metadata are not whole,
    `MismatchError` for parts that a living process is writing.
    """
    place = place_of(settings.store)
    path = local_folder(place, "rm")
    seen = Survey(place, threads_for(place))
    if seen.meta is None:
        raise DamagedError(f"{path}: {seen.findings[0].text()}. First: python -m store repair {path} [--from COPY]")
    refuse_subset(path, seen.meta)
    parts = parse_numbers(settings.parts, seen.meta.n_parts, "part")
    freed = uncommit(path, {part: seen.names_of(part) for part in parts})
    words = spans([(part, part) for part in parts], "part")
    images = spans(images for part in parts if (images := seen.images_of(part)))
    print(
        f"{path}: {words} ({images}) taken out, {human_size(freed)} freed. To make again: {remaking(seen.meta, place)}"
    )
    return freed


def local_folder(place: Place, command: str) -> Path:
    """The folder of a store on this machine; `UsageError` for any other, and for a pack."""
    if place.local is None:
        raise UsageError(
            f"{place} is not on this machine: {command} changes folders only. Pull it, {command} that, and push it again"
        )
    refuse_pack(place, command)
    return place.local


def refuse_subset(path: Path, meta: StoreMeta) -> None:
    """`UsageError` for a store that was taken from another one: no harvest makes its parts again."""
    if meta.parent is not None and "imported" not in meta.parent:
        raise UsageError(
            f"{path} is a part of another store ({meta.parent.get('store')}), so no harvest can make its parts again: "
            "pull fewer images into another folder instead (python -m store pull SOURCE FOLDER --images 0-999)"
        )


def uncommit(path: Path, parts: Mapping[int, Sequence[str]]) -> int:
    """Make parts uncommitted and remove their files, which `parts` names; the bytes that freed."""
    with ExitStack() as held:
        held.enter_context(alone(path, "create"))  # or it might be sealed, or extended, meanwhile
        for part in parts:
            held.enter_context(alone(path, part_name(part)))
        freed = unseal(path)
        for part in parts:
            freed += remove(path, [layout.part_commit(part)])
        for names in parts.values():
            freed += remove(path, names)
    return freed


@contextmanager
def alone(path: Path, name: str) -> Iterator[None]:
    """Hold the lease of a part or of the creation; `MismatchError` while another process is writing it."""
    leases = Leases(layout.runs_folder(path) / "leases")
    with leases.held(name, wait=False) as lease:
        if lease is None:
            holder = leases.holder(name) or "another process"
            raise MismatchError(f"{name} of {path} is being written by {holder}: wait until it ends")
        yield


def unseal(path: Path) -> int:
    """Make a store unfinished, on the disk, before anything that its seal vouches for changes; the bytes that freed."""
    return remove(path, [layout.SEAL])


def remove(path: Path, names: Iterable[str]) -> int:
    """Remove those of the files that are there, and have the disk know; the bytes that freed."""
    freed, folders = 0, set()
    for name in names:
        file = path / name
        if file.is_dir() and not file.is_symlink():
            raise DamagedError(f"{file} is a folder, where a file should be: move it away, then run this again")
        if file.is_symlink() or file.exists():
            freed += file.lstat().st_size
            file.unlink()
            folders.add(file.parent)
    for folder in sorted(folders):
        fsync_folder(folder)
    return freed
