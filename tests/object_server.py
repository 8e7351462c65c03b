"""Servers on this machine: moto's S3, a web server, and before them a proxy of ours that fails as servers and networks do.

The proxy counts every request and, on demand, answers 500 or 503, cuts the connection in the middle of an answer (after
the request was carried out, so that its answer is lost), refuses, or flips a bit of what passes through.
"""

import http.client
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.registry import _registry

from store import remote
from store.files import sha256_bytes
from store.sharing.pull import PullSettings
from store.sharing.pull import run as pull
from store.sharing.push import PushSettings
from store.sharing.push import run as push

S3_OPTIONS = remote.S3._options
Fault = Literal["500", "501", "503", "cut", "403", "flip answer", "flip request"]
Request = tuple[str, str]
"""method, and path with its query"""
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
NOT_IMPLEMENTED = (
    b"<Error><Code>NotImplemented</Code><Message>A header implies what is not implemented.</Message></Error>"
)
ANSWERS = {"500": (500, INTERNAL), "501": (501, NOT_IMPLEMENTED), "503": (503, SLOW_DOWN), "403": (403, DENIED)}


@dataclass
class Weather:
    """What the proxy does to requests, and which it saw."""

    fault: Callable[[int, Request], Fault | None] = lambda number, request: None
    """number of the request, from 1, and the request -> what happens to it"""
    seen: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def count(self, method: str, part: str = "") -> int:
        """How many requests of a method had `part` in their path."""
        return sum(each == method and part in path for each, path in self.seen)


def one_in(n: int) -> Callable[[int, Request], Fault | None]:
    """Every n-th request fails, in turn with 500, 503 and a cut connection."""
    kinds: tuple[Fault, ...] = ("500", "503", "cut")
    return lambda number, request: kinds[number // n % len(kinds)] if number % n == 0 else None


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """A server with this handler on 127.0.0.1; yields `http://127.0.0.1:PORT`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def proxy(host: str, port: int) -> Iterator[tuple[str, Weather]]:
    """A proxy before the server at `host:port`; yields its URL and its weather."""
    weather, lock = Weather(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def forward(self) -> None:
            request = (self.command, self.path)
            with lock:
                weather.seen.append(request)
                fault = weather.fault(len(weather.seen), request)
                if fault is not None:
                    weather.faults.append(fault)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault in ANSWERS:
                status, content = ANSWERS[fault]
                self.answer(status, [("Content-Type", "application/xml")], content)
                return
            if fault == "flip request":
                body = flipped(body)
            connection = http.client.HTTPConnection(host, port)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if fault == "cut":
                self.answer(response.status, response.getheaders(), content, cut=True)
            else:
                content = flipped(content) if fault == "flip answer" else content
                self.answer(response.status, response.getheaders(), content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward  # noqa: N815

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
            if cut and not content:  # nothing to cut in the middle: the whole answer is lost
                self.hang_up()
                return
            length = {name.lower(): value for name, value in headers}.get("content-length", "0")
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as url:
        yield url, weather


def flipped(data: bytes) -> bytes:
    """The data with one bit of its middle byte flipped."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


@contextmanager
def web(folder: Path) -> Iterator[tuple[str, Weather]]:
    """A plain web server of a folder, behind a proxy; yields its URL and its weather."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    with serving(Quiet) as url, proxy("127.0.0.1", int(url.rsplit(":", 1)[1])) as behind:
        yield behind


@contextmanager
def hub_server(folder: Path, repository: str) -> Iterator[tuple[str, list[str]]]:
    """What of the Hugging Face hub a reader of a dataset repository asks for; yields its URL and the paths that it saw."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            path = self.path.split("?")[0]
            seen.append(path)
            if path == f"/api/datasets/{repository}":
                return self.say({"id": repository, "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
            if path == f"/api/datasets/{repository}/paths-info/main":
                names = parse_qs(body)["paths"]
                files = [(name, folder / name) for name in names if (folder / name).is_file()]
                about = {"type": "file", "oid": "0" * 40}
                return self.say([{**about, "path": name, "size": file.stat().st_size} for name, file in files])
            file = folder / path.removeprefix(f"/datasets/{repository}/resolve/main/")
            if file.is_file() and self.command == "GET":
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                content = file.read_bytes()
                part = content[int(span[1]) : int(span[2]) + 1] if span else content
                return self.send(206 if span else 200, part)
            return self.send(404, b'{"error": "not found"}', ("X-Error-Code", "EntryNotFound"))

        do_GET = do_POST = do_HEAD = answer  # noqa: N815

        def say(self, value: object) -> None:
            self.send(200, json.dumps(value).encode())

        def send(self, status: int, content: bytes, *headers: tuple[str, str]) -> None:
            self.send_response(status)
            for name, value in (("Content-Length", str(len(content))), *headers):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as url:
        yield url, seen


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@dataclass
class Bucket:
    """A bucket of the S3 server, as seen through the proxy (`weather`) and from behind it (`objects`)."""

    name: str
    weather: Weather

    def url(self, name: str) -> str:
        return f"s3://{self.name}/{name}"

    def objects(self, prefix: str) -> dict[str, bytes]:
        """What the server itself holds, past every fault of the way to it."""
        keys = moto_buckets()[self.name].keys
        return {
            key.removeprefix(f"{prefix}/"): found.value for key, found in keys.items() if key.startswith(f"{prefix}/")
        }

    def put(self, prefix: str, folder: Path) -> None:
        """Put a folder there as it is, past every fault, and unseen by the proxy."""
        from moto.backends import get_backend

        for name, data in tree(folder).items():
            get_backend("s3")["123456789012"]["aws"].put_object(self.name, f"{prefix}/{name}", data)

    def damage(self, key: str) -> None:
        """Replace an object by one with a flipped bit."""
        found = moto_buckets()[self.name].keys[key]
        found.value = found.value[:-1] + bytes([found.value[-1] ^ 1])


def moto_buckets() -> Any:
    """The buckets as moto holds them."""
    from moto.backends import get_backend

    return get_backend("s3")["123456789012"]["aws"].buckets


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="session")
def session() -> Any:
    """What takes S3's client long to load, loaded once."""
    from aiobotocore.session import AioSession

    return AioSession()


@pytest.fixture
def bucket(
    s3_server: tuple[str, int], session: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Bucket]:
    """A new bucket, reached by the environment variables that people set."""
    monkeypatch.setattr(remote.S3, "_options", lambda place: {**S3_OPTIONS(place), "session": session})
    name = f"b-{sha256_bytes(request.node.name.encode())[:20]}"
    connection = http.client.HTTPConnection(*s3_server)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    with proxy(*s3_server) as (url, weather):
        environment = {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        yield Bucket(name, weather)


class LocalHub(DirFileSystem):
    """A stand-in for the Hugging Face hub: `hf://` paths below a folder of this machine."""

    protocol = "hf"
    folder = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            path=self.folder, fs=fsspec.filesystem("file", auto_mkdir=True, skip_instance_cache=True), **options
        )

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("hf://").rstrip("/")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(LocalHub, "folder", str(tmp_path / "hub"))
    monkeypatch.setitem(_registry, "hf", LocalHub)
    return tmp_path / "hub"


def sent(source: object, url: str, **settings: Any) -> Any:
    return push(PushSettings(store=str(source), url=url, **settings))


def fetched(url: str, folder: Path, **settings: Any) -> Any:
    return pull(PullSettings(url=url, folder=folder, **settings))
