"""`analyze explore`: everything is checked, the port is taken, the model is loaded, the page is served until Ctrl-C."""

import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyze.circuits.finished import finished_folders
from analyze.explore import look
from analyze.explore.catalogue import open_catalogue
from analyze.explore.desk import Desk
from analyze.explore.page import build
from analyze.explore.serving import address_of, application, gradio_module, in_a_loop, listening, on_its_own, server_of
from analyze.explore.settings import ExploreSettings
from analyze.explore.studio import load, prepare
from store.errors import UsageError
from store.sizes import many

GRAPHS, REPORT = "/graphs", "/report"


@dataclass(frozen=True)
class Explored:
    """What came of it."""

    pictures: int
    forwards: int
    """passes through the transformer"""
    saved: int
    """experiments"""


@dataclass
class Served:
    """A page that is ready: `server.run(sockets=[socket])` answers until it is told to end."""

    address: str
    desk: Desk
    server: Any
    socket: Any
    folder: Path
    """temporary"""

    def run(self) -> None:
        """Answer until SIGINT, SIGTERM or `stop`."""
        try:
            with suppress(KeyboardInterrupt):  # the server hands it on when it has ended
                self.server.run(sockets=[self.socket])
        finally:
            self.desk.studio.stopping = True

    def stop(self) -> None:
        """Let `run` return; a picture that is being drawn is given up."""
        self.desk.studio.stopping = True
        self.server.should_exit = True


@contextmanager
def serving(settings: ExploreSettings) -> Iterator[Served]:
    """A page that is ready to be served; afterwards the port is free and the temporary folder is gone.

    Errors: `UsageError` for a port that is taken, gradio not installed, graphs that are none; those of `prepare` and
    `open_catalogue`; all of them before the model is loaded.
    """
    with on_its_own() as folder, listening(settings.host, settings.port) as bound:
        gradio = gradio_module()
        prepared, catalogue = prepare(settings), open_catalogue(settings)
        folders = _folders(settings)
        print(
            f"explore: loading {prepared.canvas.model_name}; every picture is drawn by it", file=sys.stderr, flush=True
        )
        studio = load(prepared, settings, () if catalogue is None else catalogue.analysis.subjects)
        desk = Desk(studio, settings, folder)
        links = {
            name: f"{path}/index.html" for name, path in (("graphs", GRAPHS), ("report", REPORT)) if path in folders
        }

        def built() -> Any:
            page = build(gradio, desk, catalogue, links)
            return application(gradio, page, look.theme(gradio), look.head(), look.SCRIPT, folders)

        app = in_a_loop(built)
        yield Served(address_of(bound), desk, server_of(app), bound, folder)


def run(settings: ExploreSettings) -> Explored:
    """Serve the page until Ctrl-C; what was drawn and saved meanwhile."""
    with serving(settings) as served:
        print(f"explore: {served.address}   (Ctrl-C ends it)", flush=True)
        if settings.browser:
            webbrowser.open(served.address)
        served.run()
        studio, desk = served.desk.studio, served.desk
        done = Explored(studio.drawn, studio.forwards, desk.saved)
    print(
        f"explore: {many(done.pictures, 'picture')} drawn in {many(done.forwards, 'run')} of the transformer, "
        f"{many(done.saved, 'experiment')} saved" + (f" in {settings.out}" if settings.out and done.saved else "")
    )
    return done


def _folders(settings: ExploreSettings) -> dict[str, Path]:
    """Address -> folder of the pages that are linked."""
    found = {}
    if settings.graphs is not None:
        finished_folders([settings.graphs])
        if not (settings.graphs / "index.html").is_file():
            raise UsageError(
                f"--graphs {settings.graphs} has no index.html: make the graphs with their page (without --no-page)"
            )
        found[GRAPHS] = settings.graphs
    if settings.analysis is not None and (settings.analysis / "report" / "index.html").is_file():
        found[REPORT] = settings.analysis / "report"
    return found
