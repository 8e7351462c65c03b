"""`python -m store verify PACK`: every file that the manifest lists, read and compared with its length and CRC-32C."""

import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from store.care.checking import Verdict, in_parallel, refused
from store.care.findings import Finding, Report
from store.files import is_temporary
from store.shards import MANIFEST, UNFINISHED, Pack, crc32c_of, open_pack
from store.sharing.goods import LIST

Listed = tuple[str, dict[str, Any], bool]
"""name, entry, and whether it is to be read"""


def verify_pack(folder: Path, threads: int, choose: Callable[[str], bool]) -> Report:
    """What is wrong with a pack; of a sample the files that are not chosen are only looked up.

    Errors: those of `open_pack`, for a pack that was not finished or whose manifest is damaged: nothing vouches for its shards.
    """
    begun, pack = time.monotonic(), open_pack(folder)
    listed = [(name, entry, choose(name)) for name, entry in sorted(pack.files.items())]
    findings: list[Finding] = []
    read = files = 0
    with tqdm(
        total=sum(e["bytes"] for _, e, whole in listed if whole), unit="B", unit_scale=True, desc="verify"
    ) as bar:
        check = in_parallel(lambda each: (each, _check(folder, each)), listed, threads)
        for (name, entry, whole), verdict in check:
            files += whole
            read += verdict.read if isinstance(verdict, Verdict) else verdict
            bar.update(entry["bytes"] if whole else 0)
            if isinstance(verdict, Verdict):
                findings.append(Finding(verdict.kind, name, None, verdict.detail))
    every = (*findings, *_strangers(pack))
    looked = f"files that {MANIFEST} does not list were looked for"
    return Report(
        str(folder), pack.id, every, files, read, time.monotonic() - begun, len(listed) - files, looked,
        _remedy(pack, every),
    )  # fmt: skip


def _check(folder: Path, listed: Listed) -> Verdict | int:
    """The bytes read of a file that is as the manifest says, or what is wrong with it."""
    name, entry, whole = listed
    try:
        length = (folder / name).stat().st_size
        if length != entry["bytes"]:
            return Verdict("damaged", f"has {length:,} bytes where {entry['bytes']:,} were written")
        if not whole:
            return 0
        found = crc32c_of(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return Verdict("missing", "is missing")
    except OSError as error:
        return Verdict(*refused(error))
    return length if found == entry["crc32c"] else Verdict("damaged", f"differs from its CRC-32C in {MANIFEST}", length)


def _strangers(pack: Pack) -> Iterator[Finding]:
    """Files that the manifest does not list, and what killed processes left; in the order of names."""
    ours = {MANIFEST, LIST, *pack.files}
    for folder, folders, names in os.walk(pack.path):
        folders.sort()
        for name in sorted(names):
            place = (Path(folder) / name).relative_to(pack.path).as_posix()
            if is_temporary(Path(name)) or place.startswith(f"{UNFINISHED}/"):
                yield Finding("leftover", place, None, "was left by a process that was killed while it made the pack")
            elif place not in ours:
                yield Finding("unlisted", place, None, f"is not listed by {MANIFEST}")


def _remedy(pack: Pack, findings: tuple[Finding, ...]) -> str:
    kinds = {each.kind for each in findings}
    if not kinds:
        return ""
    if kinds == {"unreadable"}:
        return "see to it that these files can be read (permissions, the disk), then verify again"
    if kinds <= {"unlisted", "leftover"}:
        return "the pack is whole beside them: remove them, if nobody wants them"
    plan, out = pack.manifest["plan"], shlex.quote(str(pack.path))
    return (
        f"take these files from a copy of the pack, or remove it and make it again: python -m store pack STORE --split {pack.split} "
        f"--sites {','.join(map(str, pack.sites))} --points {','.join(pack.points)} --seed {pack.seed} "
        f"--shard-mb {plan['shard_mb']} --out {out} (STORE: that of id {pack.store_id})"
    )
