"""The server of the page: one socket, taken before the model is loaded; one temporary folder, gone at the end; nothing for the network."""

import asyncio
import errno
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from store.errors import UsageError

SECONDS_TO_CLOSE = 1
"""how long an open page may keep the server from ending"""
INSTALL = "python -m analyze explore needs gradio, which is not installed here: pip install gradio"


def gradio_module() -> Any:
    """The library, imported now; `UsageError` where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies
            import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UsageError(INSTALL) from None
    return gradio


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound, so that nobody else takes the port; `UsageError` where it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise UsageError(f"--host {host!r} is no address of this machine: leave it out for 127.0.0.1") from None
    with socket.socket(family, kind, proto) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen(64)
        except OSError as error:
            raise UsageError(_cannot_listen(host, port, error)) from None
        yield bound


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken, perhaps by another explore: give --port {port + 1 if port < 65535 else 0}, or --port 0"
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by you: give --port 7860, or --port 0 for any that is free"
    return f"nothing can listen on {host}, port {port}: {error.strerror}"


def address_of(bound: socket.socket) -> str:
    """`http://127.0.0.1:7860/`"""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}/"


@contextmanager
def on_its_own() -> Iterator[Path]:
    """A temporary folder, gone at the end, where gradio puts whatever it writes; inside, it asks and tells no server anything."""
    with tempfile.TemporaryDirectory(prefix="granary-explore-") as folder:
        said = {
            "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": str(Path(folder) / "examples"),
            "GRADIO_SSR_MODE": "False", "GRADIO_MCP_SERVER": "False", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        before = {name: os.environ.get(name) for name in said}
        os.environ.update(said)
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def application(gradio: Any, page: Any, theme: Any, head: str, script: str, folders: dict[str, Path]) -> Any:
    """What answers requests: the page at `/`, and each of `folders` with its pages at its own path."""
    from fastapi import FastAPI
    from starlette.staticfiles import StaticFiles

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for path, folder in folders.items():
        app.mount(path, StaticFiles(directory=folder, html=True))
    page.queue(default_concurrency_limit=4)
    return gradio.mount_gradio_app(
        app, page, "/", footer_links=[], run_history=False, max_file_size="8mb", ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, theme=theme, head=head, js=script,
    )  # fmt: skip


def in_a_loop(build: Callable[[], Any]) -> Any:
    """What `build` gives, called inside an event loop: outside one, gradio makes loops of its own and never closes them."""

    async def built() -> Any:
        return build()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(built())
    return build()


def server_of(app: Any) -> Any:
    """A server of the application that says nothing, and ends at once when it is told to (`should_exit`, SIGINT, SIGTERM)."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="critical", access_log=False, ws="none", timeout_graceful_shutdown=SECONDS_TO_CLOSE
        )
    )
