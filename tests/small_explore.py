"""A page of `analyze explore` over the small store of tiny-flux: what its tests begin with."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from analyze.explore.settings import ExploreSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings


def explore_settings(traced_flux: Path, folder: Path) -> ExploreSettings:
    """Of a page on any free port, with scores of two of the sites at one step, which are made in `folder`."""
    inputs = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
    scores.run(ScoresSettings(**inputs, out=folder / "analysis", sites="img_2,txt_2", steps="3"))
    return ExploreSettings(**inputs, analysis=folder / "analysis", out=folder / "saved", port=0)


@contextmanager
def served(settings: ExploreSettings) -> Iterator[Any]:
    """The page, answering from a thread; afterwards it has ended."""
    from analyze.explore.command import serving

    with serving(settings) as page:
        thread = threading.Thread(target=page.run)
        thread.start()
        try:
            yield page
        finally:
            page.stop()
            thread.join(20)
            assert not thread.is_alive()


class Outside:
    """The addresses beyond this machine that this process connected to, or looked up."""

    def __init__(self, monkeypatch: Any) -> None:
        self.found: list[Any] = []
        connect, look_up = socket.socket.connect, socket.getaddrinfo

        def connected(this: socket.socket, address: Any) -> Any:
            if this.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
                self.found.append(address)
            return connect(this, address)

        def looked_up(host: Any, *others: Any, **named: Any) -> Any:
            if host not in ("127.0.0.1", "localhost", "::1", None):
                self.found.append(host)
            return look_up(host, *others, **named)

        monkeypatch.setattr(socket.socket, "connect", connected)
        monkeypatch.setattr(socket, "getaddrinfo", looked_up)
