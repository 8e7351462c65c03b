"""Graphs on a page to look at in a browser, and a report that has them too."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from analyze.circuits.graph import Graph
from analyze.circuits.viewer.pages import graph_name, write_pages
from analyze.inputs import open_analysis
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.settings import Inputs
from store import Store
from tests.analyze_planted import Plan
from tests.chromium import Page
from tests.synthetic_analysis import synthetic_analysis
from tests.synthetic_graphs import random_graph, write_graphs
from tests.test_report_browser import Quiet

SIZES = {"small": (110, 420), "large": (2000, 20000)}
FIRST_VIEW_S = 2.0


class Pages(Page):
    """A page of graphs seen through a browser."""

    def is_there(self) -> bool:
        """Whether everything is drawn, too."""
        return super().is_there() and bool(
            self.js("return Number(document.getElementById('canvas').dataset.painted) > 0")
        )

    def point(self, name: str, click: bool = False, shift: bool = False) -> None:
        """Move the mouse onto a node, and click it."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        x, y = self.js("return granary.drawing.screen(granary.graphs.row(arguments[0]))", name)
        canvas = self.browser.find_element("css selector", "#canvas .over")
        size = self.js("return [granary.drawing.size.width, granary.drawing.size.height]")
        chain = ActionChains(self.browser).move_to_element_with_offset(
            canvas, round(x - size[0] / 2), round(y - size[1] / 2)
        )
        if shift:
            chain = chain.key_down(Keys.SHIFT)
        if click:
            chain = chain.click()
        if shift:
            chain = chain.key_up(Keys.SHIFT)
        chain.perform()

    def shown(self) -> dict[str, Any]:
        """Names of nodes and edges that are drawn, and of those that stand out."""
        return dict(
            self.js(
                "const net = granary.graphs.network(), vis = granary.graphs.visible(), marked = granary.drawing.marked();"
                "const name = (i) => net.nodes[i].name, edge = (e) => [name(net.edges.source[e]), name(net.edges.target[e])];"
                "return {nodes: net.nodes.map((n, i) => i).filter(i => vis.mask[i]).map(name), edges: [...vis.edges].map(edge),"
                " out: marked.nodes && [...marked.nodes].map(name), paths: marked.nodes && [...marked.edges].map(edge)}"
            )
        )

    def slide(self, which: str, share: float) -> None:
        """Move a slider."""
        self.js(
            "const s = document.getElementById(arguments[0] + '-slider'); s.value = arguments[1] * 1000;"
            "s.dispatchEvent(new Event('input'))",
            which,
            share,
        )

    def search(self, text: str) -> None:
        """Put words into the search."""
        self.js(
            "const s = document.getElementById('search'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
            text,
        )

    def heading(self) -> str:
        """What the panel is of: the chosen node, or the targets."""
        return str(self.js("return document.querySelector('#panel h2').textContent"))

    def away(self) -> int:
        """How many nodes that are shown lie off the canvas."""
        return int(
            self.js(
                "const {net, vis} = granary.drawing.scene(), {width, height} = granary.drawing.size;"
                "return net.nodes.map((n, i) => i).filter(i => vis.mask[i]).map(i => granary.drawing.screen(i))"
                ".filter(([x, y]) => x < 0 || y < 0 || x > width || y > height).length"
            )
        )

    def hash(self) -> str:
        """Where the page says that the reader is."""
        return str(self.js("return location.hash"))

    def choose(self, name: str) -> None:
        """Choose a node without the mouse."""
        self.js("granary.graphs.choose(granary.graphs.row(arguments[0]))", name)


class Fixture:
    """A report with two graphs, and the same graphs as `analyze graph` leaves them."""

    def __init__(self, work: Path) -> None:
        plan = Plan(n_images=8, steps=3, truth=False)
        self.inputs = synthetic_analysis(work, plan, 300, coherent=True)
        analysis = open_analysis(Inputs(**self.inputs))
        transcoders = {
            str(subject.site): {"name": subject.outline.name, "identity": subject.identity}
            for subject in analysis.subjects
        }
        self.graphs = work / "graphs"
        for image in (3, 5):
            facts = {"store": analysis.store.id, "image": image, "transcoders": transcoders}
            made = random_graph(*SIZES["small"], seed=image, **facts)
            write_graphs(self.graphs / "graphs" / graph_name(made[0].facts), made)
        self.store: Store = analysis.store
        self.folders = sorted((self.graphs / "graphs").iterdir())
        write_pages(self.folders, self.graphs, analysis.store)
        found = report.run(ReportSettings(**self.inputs, graphs=(self.graphs,), heat_features=20, similar=2))
        assert isinstance(found, report.Report)
        self.report = found.index.parent
        self.over_tokens = Graph.read(self.folders[0] / "aggregated")


def served(made: Fixture, browser: Any) -> Iterator[Pages]:
    """The page beside a report, from a web server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(made.report)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Pages(browser, f"http://127.0.0.1:{server.server_port}/graphs.html", made.report)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def label_target(pages: Pages) -> str:
    """A feature of the one image site whose dictionary is known."""
    if not pages.js("return document.documentElement.dataset.ready"):
        pages.open()
    return str(pages.js("return granary.graphs.network().nodes.find(n => /^feature_L0_img_f/.test(n.name)).name"))


def script_value(path: Path) -> Any:
    """What a script of data hands over."""
    text = path.read_text()
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])
