"""Every kind of place reads and writes alike, and says what is missing, forbidden, out of reach or no place at all."""

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import _registry

from store import open_store, remote
from store.errors import DamagedError, MismatchError, UnreachableError, UsageError
from store.places import Folder, Place, place_of
from tests.object_server import S3_OPTIONS, Bucket, one_in


def test_big_files_travel_in_pieces_and_each_piece_survives_faults(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", 5 * 2**20)  # S3 takes no smaller ones
    data = np.random.default_rng(0).bytes(12 * 2**20)
    place = place_of(bucket.url("big"))
    bucket.weather.fault = one_in(3)
    place.write_pieces("file", len(data), iter([data[: 5 * 2**20], data[5 * 2**20 : 10 * 2**20], data[10 * 2**20 :]]))
    assert bucket.objects("big") == {"file": data}
    assert b"".join(place.pieces("file", len(data))) == data
    with pytest.raises(DamagedError, match="where 13000000 were expected"):
        list(place.pieces("file", 13_000_000))

    def breaking() -> Iterator[bytes]:
        yield data[: 5 * 2**20]
        raise DamagedError("the source is damaged")

    with pytest.raises(DamagedError, match="source"):
        place.write_pieces("torn", len(data), breaking())
    assert "torn" not in bucket.objects("big")


@pytest.fixture(params=["folder", "memory", "s3", "hf stand-in"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Every kind of place that can be written."""
    if request.param == "s3":
        yield place_of(request.getfixturevalue("bucket").url("a/place"))
    elif request.param == "hf stand-in":
        request.getfixturevalue("hub")
        yield place_of("hf://datasets/owner/name")
    elif request.param == "memory":
        yield place_of("memory://a/place")
        fsspec.filesystem("memory").store.clear()
    else:
        yield place_of(tmp_path / "a" / "place")


def test_every_place_gives_what_it_was_given_and_tells_what_is_missing(place: Place) -> None:
    assert (place.size("x/y"), place.exists("x/y")) == (None, False)
    with pytest.raises(FileNotFoundError):
        place.read("x/y")
    with pytest.raises(FileNotFoundError):
        list(place.pieces("x/y", 3))
    place.write("x/y", b"abc")
    assert (place.read("x/y"), place.size("x/y"), b"".join(place.pieces("x/y", 3))) == (b"abc", 3, b"abc")
    buffer = bytearray(2)
    assert place.read_into("x/y", memoryview(buffer)) == (2, b"c") and buffer == b"ab"
    place.write("x/y", b"abc", create_only=True)
    with pytest.raises(MismatchError, match="x/y is there already"):
        place.write("x/y", b"abd", create_only=True)
    place.write("x/z", b"", create_only=True)
    assert (place.read("x/z"), place.size("x/z")) == (b"", 0)
    place.write("x/y", b"abd")
    place.write_pieces("x/w", 4, iter([b"12", b"34"]))
    assert (place.read("x/y"), place.read("x/w")) == (b"abd", b"1234")
    assert place.where("x/y") == f"{place}/x/y"


def test_a_server_without_conditional_requests_is_looked_at_before_it_is_written_to(bucket: Bucket) -> None:
    place = place_of(bucket.url("old"))
    conditional = iter(["501", None, "501"])
    bucket.weather.fault = lambda number, request: next(conditional) if request[0] == "PUT" else None  # type: ignore[return-value]
    place.write("seal", b"one", create_only=True)
    with pytest.raises(MismatchError, match="seal is there already"):
        place.write("seal", b"two", create_only=True)
    assert bucket.objects("old") == {"seal": b"one"}


def test_access_denied_is_asked_once_and_says_how_to_log_in(bucket: Bucket) -> None:
    bucket.weather.fault = lambda number, request: "403"
    with pytest.raises(UnreachableError, match=r"Access Denied\. Credentials: AWS_PROFILE"):
        open_store(bucket.url("store"))
    assert len(bucket.weather.seen) == 1


def test_without_credentials_it_says_how_to_get_some(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote.S3, "_options", S3_OPTIONS)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(UnreachableError, match=r"Unable to locate credentials.*AWS_PROFILE"):
        open_store(bucket.url("store"))
    assert not bucket.weather.seen


def test_urls_that_cannot_be_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="one file"):
        place_of("https://host/store?key=1")
    with pytest.raises(UsageError, match="cannot be opened"):
        place_of("nonsense://host/store")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(UsageError, match="pip install s3fs"):
        place_of("s3://bucket/store")
    assert isinstance(place_of("file:///tmp/x"), Folder)
