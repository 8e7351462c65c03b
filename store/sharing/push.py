"""`python -m store push WHAT URL`: copies a store, a part of it, a pack, dictionaries or results to where others find them."""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import get_args

import tyro
from tqdm import tqdm

from store import layout
from store.errors import MismatchError, StoreError, UsageError
from store.files import is_temporary, parse_self_checked, sha256_bytes
from store.places import Place, place_of
from store.reader import Store
from store.sharing.goods import Goods, goods_at, refuse_other_goods
from store.sharing.selection import select
from store.sharing.subset import Subset
from store.sharing.transfer import Tally, Transfer, Verify
from store.sizes import human_size


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What push and pull have in common: what is taken, and how."""

    layers: str = "all"
    """layers of a store to take: all, 0-3,6, or double:0-3,single:5"""
    streams: str = "all"
    """streams of a store to take: all, img, or img,txt"""
    steps: str = "all"
    """denoising steps of a store to take: all, or 2-3"""
    images: str = "all"
    """images of a store to take: all, or a range such as 0-999 that consists of whole chunks"""
    prompts: bool = True
    """take the texts of the prompts and the pictures along; --no-prompts leaves them out (seeds, splits, text lengths and
    sigmas stay)"""
    verify: Verify = "full"
    """full: read everything back from the target and compare checksums, which takes as long as a download and is the
    only proof; sizes: ask for lengths alone, which finds what is missing or cut, and no flipped bit"""
    threads: int = 8
    """files under way at once; each holds up to 32 MiB, or one file where the target cannot be written piece by piece"""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UsageError(f"--threads {self.threads} must be at least 1")
        if self.verify not in get_args(Verify):
            raise UsageError(f"--verify {self.verify!r} is not one of {', '.join(get_args(Verify))}")

    @property
    def selects(self) -> bool:
        """Whether anything but everything is asked for."""
        return {self.layers, self.streams, self.steps, self.images} != {"all"} or not self.prompts


@dataclass(frozen=True)
class PushSettings(Sharing):
    """Copy a store or a part of it, a pack, a dictionary, dictionaries, score matrices or an analysis to a server."""

    store: tyro.conf.Positional[str]
    """what to push: the folder (or URL) of a finished store, pack, dictionary, …"""
    url: tyro.conf.Positional[str]
    """where to: s3://BUCKET/NAME, another URL that fsspec can write, or a folder; hf://datasets/OWNER/NAME as well, but there
    every file is a commit: for more than some hundred files push to a folder and use hf upload-large-folder"""


def run(settings: PushSettings) -> Tally:
    """Push; returns what was copied, kept and verified.  An interrupted push never looks whole, and the same command goes on.

    Errors: `UsageError`, `UnfinishedError`, `ForeignError` for what cannot be pushed, `MismatchError` when the target holds
    something else, `DamagedError` for a source that differs from its checksums, `UnreachableError`.
    """
    target = place_of(settings.url)
    if target.read_only:
        raise UsageError(f"{target}: nothing can be written there; push to s3://, hf:// or a folder")
    return send("push", place_of(settings.store), target, settings, with_list=True)


def send(verb: str, source: Place, target: Place, settings: Sharing, with_list: bool) -> Tally:
    """Copy what lies at `source` to `target`, resuming what was begun there; prints a plan before and a summary after."""
    if source.local is not None and target.local is not None:
        _refuse_nested(source.local, target.local)
    cargo = _cargo(source, settings, with_list)
    if isinstance(cargo, Subset):
        resuming = refuse_other_store(cargo, target)
    else:
        refuse_other_goods(cargo, target)
        for place in (source, target):
            cargo.read_labels(place)  # a label file that cannot be merged is refused before anything is copied
        resuming = True
    if isinstance(cargo, Subset) and cargo.traces_left is not None:
        print(
            f"{verb}: the traces ({cargo.traces_left}) stay behind: they need their images and steps, and every layer and stream "
            "whose activations they share",
            flush=True,
        )
    transfer = Transfer(cargo, target, settings.threads, resuming)
    size, files, left = transfer.plan()
    _announce(verb, cargo.name, target, size, files, left)
    started = time.monotonic()
    with tqdm(total=left, unit="B", unit_scale=True, desc=verb, mininterval=0.5) as bar:
        transfer.copy(bar)
    took = time.monotonic() - started
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify", mininterval=0.5) as bar:
        transfer.verify(settings.verify, bar)
    if isinstance(cargo, Goods):
        transfer.tally.labels = cargo.merge_labels(target)
    transfer.finish()
    _conclude(verb, cargo.name, target, transfer.tally, took, settings.verify)
    return transfer.tally


def _cargo(source: Place, settings: Sharing, with_list: bool) -> Subset | Goods:
    """What lies at the source, or the part of it that is asked for."""
    if is_store(source):
        store = Store.open(source)
        chosen = select(store, settings.layers, settings.streams, settings.steps, settings.images, settings.prompts)
        return Subset(store, chosen)
    goods = goods_at(source, with_list)
    if settings.selects:
        raise UsageError(
            f"{source} is a {goods.kind}, which travels whole: --layers, --streams, --steps, --images and --no-prompts "
            "choose a part of a store"
        )
    return goods


def is_store(place: Place) -> bool:
    """Whether a store lies at a place, whole or not."""
    try:
        root = place.read(layout.ROOT)
    except (FileNotFoundError, NotADirectoryError):
        return place.exists(layout.SEAL) or place.exists(layout.STORE_COMMIT)
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        if "granary" in json.loads(root).get("attributes", {}):
            return True
    return place.exists(layout.STORE_COMMIT)


def refuse_other_store(cargo: Subset, target: Place) -> bool:
    """Whether a part of the same store is at the target; `MismatchError`, `UsageError` when something else is."""
    try:
        root = target.read(layout.ROOT)
    except (FileNotFoundError, NotADirectoryError):
        if target.local is not None and target.local.exists() and not _is_empty(target.local):
            raise UsageError(f"{target} exists and is no store: choose another target") from None
        return False
    if sha256_bytes(root) == cargo.first().sha256:
        return True
    raise MismatchError(f"{target} holds {_identity(target)}, and this is {cargo.name}: choose another target")


def _identity(target: Place) -> str:
    """The id of the store at a place, as far as it can be told."""
    try:
        return f"store sha256-{parse_self_checked(target.read(layout.SEAL), target.where(layout.SEAL))['sha256']}"
    except (FileNotFoundError, StoreError):
        pass
    try:
        record = parse_self_checked(target.read(layout.STORE_COMMIT), target.where(layout.STORE_COMMIT))
        return f"an unfinished store of origin {record['origin']}"
    except (FileNotFoundError, StoreError):
        return "another store, unfinished,"


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and all(is_temporary(file) for file in folder.iterdir())


def _refuse_nested(source: Path, target: Path) -> None:
    inner, outer = target.absolute().resolve(), source.absolute().resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UsageError(f"{target} and {source} lie in one another: choose another target")


def _announce(verb: str, name: str, target: Place, size: int, files: int, left: int) -> None:
    """Print the plan; `StoreError` when the disk is too small."""
    free = None
    if target.local is not None:
        parents = (target.local.absolute(), *target.local.absolute().parents)
        free = disk_usage(next(parent for parent in parents if parent.exists())).free
    room = "" if free is None else f"; {human_size(free)} are free there"
    print(
        f"{verb}: {name} to {target}: {human_size(size)} in {files} files, {human_size(left)} of it still to come{room}",
        flush=True,
    )
    if free is not None and free < left:
        raise StoreError(
            f"{target}: {human_size(left)} are to be written and {human_size(free)} are free on that disk: "
            "make room, choose another folder, or take less (--layers, --streams, --steps, --images)"
        )


def _conclude(verb: str, name: str, target: Place, tally: Tally, seconds: float, verify: Verify) -> None:
    rate = human_size(tally.copied_bytes / max(seconds, 1e-3))
    read = "read back and equal" if verify == "full" else "of the right length (not read back: --verify sizes)"
    again = f"; {len(tally.again)} had arrived damaged and were copied again" if tally.again else ""
    kept = f", {tally.kept} were there already" if tally.kept else ""
    again += f"; new labels of features there: {tally.labels}" if tally.labels else ""
    print(
        f"{verb} done: {name} is at {target}: {tally.copied} files ({human_size(tally.copied_bytes)}) copied in "
        f"{seconds:.1f} s, {rate}/s{kept}; {tally.verified} files {read}{again}",
        flush=True,
    )
