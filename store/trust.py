"""Whether what a reader was handed is what was committed; and if not, the error that names the file and the remedy."""

from typing import Any

from store.errors import DamagedError
from store.files import parse_self_checked, sha256_bytes
from store.places import Place
from store.traces import says_replay


def found(place: Place, name: str) -> bytes | None:
    """The content of a file, None when it is not there."""
    try:
        return place.read(name)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def checked(place: Place, name: str, data: bytes) -> dict[str, Any]:
    """A record with a checksum of its own, which must hold; `DamagedError` with the remedy otherwise."""
    return parse_self_checked(data, place.where(name), remedy(place))


def check_form(place: Place, name: str, content: dict[str, Any]) -> None:
    """A record's `files` must be what every record's are."""
    files = content.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and type(entry.get("bytes")) is int and type(entry.get("sha256")) is str
        for entry in files.values()
    ):
        raise damaged(place, name, "does not say length and SHA-256 of each file")
    odd = next((each for each, entry in files.items() if not says_replay(each, entry)), None)
    if odd is not None:
        raise damaged(place, name, f"does not say what such a file says: the replay errors of {odd}")


def check_entry(place: Place, name: str, data: bytes, entry: dict[str, Any] | None) -> None:
    """Length and SHA-256 of a committed file."""
    if entry is None:
        raise damaged(place, name, "is not listed by the commit that should cover it")
    if len(data) != entry["bytes"]:
        raise damaged(place, name, f"has {len(data)} bytes where {entry['bytes']} were committed")
    if sha256_bytes(data) != entry["sha256"]:
        raise damaged(place, name, "differs from its committed checksum")


def damaged(place: Place, name: str, what: str) -> DamagedError:
    """The error that says what a file is, and what to do."""
    return DamagedError(f"{place.where(name)} {what}. {remedy(place)}")


def remedy(place: Place) -> str:
    """What to do about damage."""
    if place.local is None:
        return (
            f"Say what else is damaged: python -m store verify {place}; then push it again, or pull from another copy"
        )
    return f"Say what else is damaged: python -m store verify {place}; mend it: python -m store repair {place} [--from COPY]"
