"""A store, pack or dictionary on a server: anything that fsspec reaches, read and written by name, never listed.

A request that fails for a reason that may pass (no answer, a cut connection, a 5xx) is made again, `ATTEMPTS` times with
growing pauses, and then becomes an `UnreachableError` that says what the server said.  What is missing is a
`FileNotFoundError`; what is forbidden is not asked for twice.  No answer comes from a cache.
"""

import contextlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from store.answers import Verdict, verdict_of
from store.errors import DamagedError, MismatchError, UnreachableError, UsageError
from store.places import PIECE, Place

T = TypeVar("T")

ATTEMPTS = 6
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""seconds; each pause is twice the one before, less up to half of it at random, so that many clients do not return together"""
CONNECT_SECONDS, READ_SECONDS = 10, 30
CONNECTIONS = 64

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub",
            "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}  # fmt: skip
"""what fsspec needs for a protocol"""
CREDENTIALS = {
    "s3": "Credentials: AWS_PROFILE=…, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a public bucket: FSSPEC_S3_ANON=true; "
    "a server other than Amazon's: AWS_ENDPOINT_URL=https://…. (S3 also answers so for a missing object where listing is "
    "not allowed: then s3:ListBucket must be granted.)",
    "hf": "Log in with: hf auth login, or set HF_TOKEN.",
}


class UnsupportedError(UnreachableError):
    """A request that the server does not know."""


def remote_of(url: str) -> "Remote":
    """The place that a URL names.  `UsageError` for an unknown protocol or one whose package is not installed."""
    protocol = url.partition("://")[0]
    kind = {"s3": S3, "s3a": S3, "hf": Hub, "http": Web, "https": Web}.get(protocol, Remote)
    return kind(url)


class Remote(Place):
    """A prefix of anything that fsspec reaches."""

    local = None

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.protocol = self.url.partition("://")[0]
        if re.search(r"[?#]", self.url):
            raise UsageError(f"{url}: a URL with ? or # names one file; write the URL of the folder")
        try:
            import fsspec

            self.fs, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **self._options())
        except ImportError:
            package = PACKAGES.get(self.protocol, f"that fsspec wants for {self.protocol}")
            raise UsageError(f"{url} needs the package {package}: pip install {package}") from None
        except ValueError as error:
            raise UsageError(f"{url} cannot be opened: {error}") from None
        self.root = str(root).rstrip("/")
        self._stopped = threading.Event()

    def __str__(self) -> str:
        return self.url

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        return self._asked(name, "read", lambda path: self._get(path, None, None))

    def size(self, name: str) -> int | None:
        try:
            return self._asked(name, "looked up", self._size)
        except FileNotFoundError:
            return None

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        if size <= PIECE:
            yield self.read(name)
            return
        self._require_size(name, size)
        for start in range(0, size, PIECE):
            stop = min(start + PIECE, size)
            piece = self._asked(name, "read", partial(self._get, start=start, stop=stop))
            if len(piece) > stop - start:  # a server that does not know ranges sends the whole file
                if start == 0:
                    yield piece
                    return
                piece = piece[start:stop]
            yield piece

    def _require_size(self, name: str, size: int) -> None:
        """A range past the end would be an error of the server's, and one before it would hide what follows."""
        found = self.size(name)
        if found is None:
            raise FileNotFoundError(f"{self.where(name)} is missing")
        if found != size:
            raise DamagedError(f"{self.where(name)} has {found} bytes where {size} were expected")

    def write(self, name: str, data: bytes, create_only: bool = False) -> None:
        try:
            self._asked(name, "written", lambda path: self._put(path, data, create_only))
        except FileExistsError:
            self._same_or_refused(name, data)
        except FileNotFoundError:
            bucket = self.root.split("/")[0]
            raise UnreachableError(
                f"{self.where(name)} could not be written: there is no {bucket!r}; make the bucket or repository first"
            ) from None

    def write_pieces(self, name: str, size: int, pieces: Iterator[bytes]) -> None:
        self.write(name, b"".join(pieces))

    def stop(self) -> None:
        """Let what other threads are asking for fail at its next failure: nobody waits for it any more."""
        self._stopped.set()

    def _options(self) -> dict[str, Any]:
        """What fsspec is told about the connection."""
        return {"use_listings_cache": False}

    def _size(self, path: str) -> int:
        found = self.fs.info(path)["size"]
        return len(self._get(path, None, None)) if found is None else int(found)

    def _get(self, path: str, start: int | None, stop: int | None) -> bytes:
        return bytes(self.fs.cat_file(path, start=start, end=stop))

    def _put(self, path: str, data: bytes, create_only: bool) -> None:
        """`FileExistsError` with `create_only` where something is there; where the protocol has no such request, by a look before."""
        if create_only and self.fs.exists(path):
            raise FileExistsError(path)
        self.fs.pipe_file(path, data)

    def _asked(self, name: str, verb: str, ask: Callable[[str], T]) -> T:
        path, pause = f"{self.root}/{name}", FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask(path)
            except Exception as error:  # every file system raises its own
                verdict = verdict_of(error)
                if verdict == "missing":
                    raise FileNotFoundError(f"{self.where(name)} is missing") from None
                if verdict == "exists":
                    raise FileExistsError(f"{self.where(name)} exists") from None
                last = verdict != "again" or attempt == ATTEMPTS
                if last or self._stopped.wait(pause * random.uniform(0.5, 1.0)):
                    raise self._unreachable(name, verb, verdict, attempt, error) from error
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, name: str, verb: str, verdict: Verdict, attempts: int, error: Exception) -> UnreachableError:
        said = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        remedy = CREDENTIALS.get(self.protocol.replace("s3a", "s3"), "") if verdict == "denied" else ""
        if verdict == "again":
            remedy = f"Asked {attempts} times. When the server answers again, the same command goes on where it was."
            remedy += " (A server other than Amazon's: AWS_ENDPOINT_URL.)" if isinstance(self, S3) else ""
        kind = UnsupportedError if verdict == "unsupported" else UnreachableError
        return kind(f"{self.where(name)} could not be {verb}: {said}. {remedy}".rstrip())

    def _same_or_refused(self, name: str, data: bytes) -> None:
        """Nothing where an equal object is there already (our own, its answer lost on the way, or another's); else `MismatchError`."""
        if self.read(name) != data:
            raise MismatchError(f"{self.where(name)} is there already, with another content: choose another URL")


class S3(Remote):
    """Amazon's protocol, by s3fs, without its caches, listings and retries."""

    def _options(self) -> dict[str, Any]:
        config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": CONNECTIONS,
                  "connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS,
                  "response_checksum_validation": "when_required"}  # fmt: skip  # whoever reads checks, and says more
        return {"use_listings_cache": False, "max_concurrency": 1, "config_kwargs": config}

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fs.retries = 1  # `_asked` makes them

    def _size(self, path: str) -> int:
        return int(self._call("head_object", path)["ContentLength"])  # `info` would list what it does not find

    def _put(self, path: str, data: bytes, create_only: bool) -> None:
        condition = {"IfNoneMatch": "*"} if create_only else {}
        self._call("put_object", path, Body=data, **condition)

    def write(self, name: str, data: bytes, create_only: bool = False) -> None:
        try:
            super().write(name, data, create_only)
        except UnsupportedError:  # a server without conditional requests: look, then write
            if not create_only:
                raise
            if self.size(name) is not None:
                self._same_or_refused(name, data)
            else:
                super().write(name, data)

    def write_pieces(self, name: str, size: int, pieces: Iterator[bytes]) -> None:
        """Piece by piece, each made again on its own when it fails; the object appears when the last one is there."""
        if size <= PIECE:
            return super().write_pieces(name, size, pieces)
        started = self._asked(name, "written", lambda path: self._call("create_multipart_upload", path))
        upload = {"UploadId": started["UploadId"]}
        try:
            parts = []
            for number, piece in enumerate(pieces, 1):
                about = {"PartNumber": number, "Body": piece, **upload}
                put = self._asked(name, "written", partial(self._call, "upload_part", **about))
                parts.append({"PartNumber": number, "ETag": put["ETag"]})
            whole = {"MultipartUpload": {"Parts": parts}, **upload}
            try:
                self._asked(name, "written", lambda path: self._call("complete_multipart_upload", path, **whole))
            except FileNotFoundError:  # completed by an attempt whose answer was lost
                if self.size(name) != size:
                    raise
        except BaseException:
            with contextlib.suppress(UnreachableError, FileNotFoundError):
                self._asked(name, "given up", partial(self._call, "abort_multipart_upload", **upload))
            raise
        return None

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        bucket, _, key = path.partition("/")
        return self.fs.call_s3(method, Bucket=bucket, Key=key, **arguments)


class Hub(Remote):
    """The Hugging Face hub: `hf://datasets/OWNER/NAME/…`.  Every file written is a commit of its own."""

    def _options(self) -> dict[str, Any]:
        return {}

    def _size(self, path: str) -> int:
        return int(self.fs.info(path, expand_info=True)["size"])  # without it, the parent folder would be listed

    def _get(self, path: str, start: int | None, stop: int | None) -> bytes:
        """By the hub's own address of the file: its file system would list the parent folder, and answer from that list later."""
        from huggingface_hub import HfFileSystem, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        there = self.fs.resolve_path(path) if isinstance(self.fs, HfFileSystem) else None
        if there is None or not hasattr(there, "repo_id"):  # a stand-in, or one of the hub's buckets
            return super()._get(path, start, stop)
        where = {"repo_type": there.repo_type, "revision": there.revision, "endpoint": self.fs.endpoint}
        url = hf_hub_url(there.repo_id, there.path_in_repo, **where)
        span = {} if start is None or stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        headers = {**build_hf_headers(token=self.fs.token), "Accept-Encoding": "identity", **span}
        answer = get_session().get(url, headers=headers, follow_redirects=True, timeout=READ_SECONDS)
        hf_raise_for_status(answer)
        return bytes(answer.content)


class Web(Remote):
    """Plain HTTP."""

    read_only = True

    def _options(self) -> dict[str, Any]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        return {"client_kwargs": {"timeout": timeout}}

    def _size(self, path: str) -> int:
        try:
            return super()._size(path)
        except FileNotFoundError as error:  # so fsspec calls whatever went wrong
            raise error.__cause__ or error from None
