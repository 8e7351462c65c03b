"""`python -m store verify PACK`: every file that the manifest lists, read and compared with its length and CRC-32C.

The list that a push left there is compared with the manifest, because a pull goes by it.
"""

import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from store.care.checking import Verdict, in_parallel, refused
from store.care.findings import Finding, Report
from store.errors import StoreError, UsageError
from store.files import is_temporary, parse_self_checked, sha256_file
from store.places import Place
from store.shards import LIST, MANIFEST, UNFINISHED, Pack, crc32c_of, is_pack, open_pack

Listed = tuple[str, dict[str, Any], bool]
"""name, entry, and whether it is to be read"""


def verify_pack(folder: Path, threads: int, choose: Callable[[str], bool]) -> Report:
    """What is wrong with a pack; of a sample the files that are not chosen are only looked up.

    Errors: those of `open_pack`, for a pack that was not finished or whose manifest is damaged: nothing vouches for its shards.
    """
    begun, pack = time.monotonic(), open_pack(folder)
    listed = [(name, entry, choose(name)) for name, entry in sorted(pack.files.items())]
    findings: list[Finding] = []
    read = files = unread = 0
    with tqdm(
        total=sum(e["bytes"] for _, e, whole in listed if whole), unit="B", unit_scale=True, desc="verify"
    ) as bar:
        check = in_parallel(lambda each: (each, _check(folder, each)), listed, threads)
        for (name, entry, whole), verdict in check:
            done = verdict.read if isinstance(verdict, Verdict) else verdict
            files += whole and done == entry["bytes"]
            unread += not whole
            read += done
            bar.update(entry["bytes"] if whole else 0)
            if isinstance(verdict, Verdict):
                findings.append(Finding(verdict.kind, name, None, verdict.detail))
    every = (*findings, *_list_of_push(pack), *_strangers(pack))
    looked = f"files that {MANIFEST} does not list were looked for"
    return Report(
        str(folder), pack.id, every, files, read, time.monotonic() - begun, unread, looked,
        _remedy(pack, every),
    )  # fmt: skip


def _check(folder: Path, listed: Listed) -> Verdict | int:
    """The bytes read of a file that is as the manifest says, or what is wrong with it."""
    name, entry, whole = listed
    try:
        if (folder / name).is_dir():
            return Verdict("damaged", "is a folder")
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


def _list_of_push(pack: Pack) -> Iterator[Finding]:
    """What is wrong with the list that a push left beside the manifest; nothing where there is none."""
    path = pack.path / LIST
    try:
        about = parse_self_checked(path.read_bytes(), LIST)
        entries = about.get("files")
        if about.get("kind") != "pack" or not isinstance(entries, dict):
            detail = "is not the list of a pushed pack"
        elif set(entries) != {MANIFEST, *pack.files}:
            detail = f"does not list the files that {MANIFEST} lists"
        else:
            detail = _differing(pack, entries)
    except FileNotFoundError:
        return
    except StoreError:
        detail = "differs from the checksum that it carries, or carries none"
    except OSError as error:
        kind, detail = refused(error)
        yield Finding(kind, LIST, None, detail)
        return
    if detail:
        yield Finding("damaged", LIST, None, detail)


def _differing(pack: Pack, entries: dict[str, Any]) -> str:
    """How the list of a push differs from the manifest, in words; empty where it does not."""
    if not all(isinstance(entry, dict) for entry in entries.values()):
        return "does not say length and SHA-256 of each file"
    if entries[MANIFEST].get("sha256") != sha256_file(pack.path / MANIFEST):
        return f"is that of another {MANIFEST}"
    odd = [name for name in sorted(pack.files) if entries[name].get("bytes") != pack.files[name]["bytes"]]
    return f"has another length of {odd[0]} than {MANIFEST}" if odd else ""


def refuse_pack(place: Place, command: str) -> None:
    """`UsageError` where a pack lies, for a command that is about stores alone."""
    if place.local is not None and is_pack(place.local):
        raise UsageError(
            f"{place} is a pack, and {command} is for stores: python -m store verify {shlex.quote(str(place))} says what is "
            "damaged; take that from a copy, or make the pack again"
        )


def _strangers(pack: Pack) -> Iterator[Finding]:
    """Files that the manifest does not list, and what killed processes left; in the order of names.

    A link to a folder is followed where it stands for a folder of the pack.
    """
    ours = {MANIFEST, LIST, *pack.files}
    rooms = {parent.as_posix() for name in pack.files for parent in Path(name).parents}
    for folder, folders, names in os.walk(pack.path, followlinks=True):
        folders.sort()
        for link in [each for each in folders if (Path(folder) / each).is_symlink()]:
            place = (Path(folder) / link).relative_to(pack.path).as_posix()
            if place not in rooms:
                folders.remove(link)
                yield Finding("unlisted", place, None, f"is a link to a folder, of which {MANIFEST} lists nothing")
        for name in sorted(names):
            place = (Path(folder) / name).relative_to(pack.path).as_posix()
            if is_temporary(Path(name)) or place.startswith(f"{UNFINISHED}/"):
                yield Finding("leftover", place, None, "was left by a process that was killed while it made the pack")
            elif place not in ours:
                yield Finding("unlisted", place, None, f"is not listed by {MANIFEST}")


def _remedy(pack: Pack, findings: tuple[Finding, ...]) -> str:
    if any(each.name == LIST for each in findings):
        others = _remedy(pack, tuple(each for each in findings if each.name != LIST))
        again = f"remove {shlex.quote(str(pack.path / LIST))}, by which a pull goes, and push the pack again"
        return f"{others}; then {again}" if others else again
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
