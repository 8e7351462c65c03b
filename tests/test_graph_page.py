"""The page of graphs in a browser, from disk and over http: find, follow, thresholds, link, label, supernode, export, dark mode."""

import base64
import json
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analyze.circuits.graph import Graph
from analyze.circuits.viewer.columns import edge_scores, view_columns
from analyze.circuits.viewer.pages import graph_name, write_pages
from analyze.inputs import open_analysis
from analyze.labels.book import LabelBook
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.settings import Inputs
from store import Store
from store.errors import MismatchError, UsageError
from store.labels import Label
from tests.analyze_planted import Plan
from tests.chromium import Page, chromium, complaints, contrast, wait
from tests.synthetic_analysis import synthetic_analysis
from tests.synthetic_graphs import graph_of, random_graph, write_graphs
from tests.test_report_browser import COLOUR, Quiet, emulate

SIZES = {"small": (110, 420), "large": (2000, 20000)}
FIRST_VIEW_S = 2.0
INTERACTION_MS = 100.0
TIMED = """
    const done = arguments[arguments.length - 1], frame = () => new Promise(requestAnimationFrame);
    (async () => {
      await frame();
      const start = performance.now();
      (new Function(arguments[0]))();
      await frame();
      done(performance.now() - start);
    })();
"""


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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Any]:
    yield from chromium(downloads)


@pytest.fixture(scope="module")
def pages(made: Fixture, browser: Any) -> Pages:
    """The page beside the graphs, from disk."""
    return Pages(browser, (made.graphs / "index.html").as_uri(), made.graphs)


@pytest.fixture(scope="module")
def beside(made: Fixture, browser: Any) -> Iterator[Pages]:
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


@pytest.mark.browser
@pytest.mark.parametrize("where", ["pages", "beside"])
def test_a_graph_opens_from_disk_and_over_http_without_a_complaint(request: pytest.FixtureRequest, where: str) -> None:
    pages = request.getfixturevalue(where)
    complaints(pages.browser)
    assert any(pages.open() < FIRST_VIEW_S for _ in range(3))  # a busy machine gets three tries
    for place in ("#/?view=positional", "#/image-00005.step-2.img_5.p22.f66"):
        pages.open(place)
        assert pages.js("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert pages.js(
            "return [...document.images].every(i => i.alt.startsWith('Traced image') && i.naturalWidth > 0)"
        )
        assert pages.js("return document.images.length") == 1
        assert pages.js("return document.getElementById('canvas').getAttribute('aria-label')").startswith(
            "Attribution graph of img_5/66"
        )
        assert pages.js("return document.getElementById('failed').hidden")
    assert "image-00005" in pages.js("return document.title")
    assert complaints(pages.browser) == []


@pytest.mark.browser
def test_layers_lie_upwards_and_streams_apart(pages: Pages) -> None:
    for view in ("aggregated", "positional"):
        pages.open(f"#/?view={view}&nodes=1&edges=1")
        rows = pages.js(
            "const {net, vis, place} = granary.drawing.scene(); return net.nodes.map((n, i) => [n.kind, n.layer, n.stream,"
            " place.x[i], place.y[i], vis.mask[i], n.token]).filter(r => r[5])"
        )
        level = {r[4]: -1 if r[0] in ("input", "dropped") else r[1] for r in rows}
        heights: dict[int, list[float]] = {}
        for y, layer in level.items():
            heights.setdefault(layer, []).append(y)
        for layer in sorted(heights)[:-1]:
            assert min(heights[layer]) > max(heights[layer + 1])  # y grows downwards
        assert max(r[3] for r in rows if r[2] == "txt") < min(r[3] for r in rows if r[2] == "img")
        assert len({(r[3], r[4]) for r in rows}) == len(rows)  # no two nodes in one place


@pytest.mark.browser
def test_search_finds_by_number_site_kind_and_label(pages: Pages, made: Fixture) -> None:
    pages.open("#/?nodes=1&edges=1")
    pages.press("/")
    wait(lambda: pages.js("return document.activeElement.id") == "search")
    pages.press("66")
    listed = "return [...document.querySelectorAll('#found button')].map(b => b.dataset.node)"
    wait(lambda: pages.js(listed))
    expected = {name for name in made.over_tokens.names if name.endswith("_f66")}
    assert set(pages.js(listed)) == expected
    assert set(pages.shown()["out"]) == expected
    pages.press("\ue007")  # Enter: the strongest
    wait(lambda: "node=feature_L5_img_f66" in pages.hash())
    pages.press("\ue00c")
    pages.js("granary.controls.clearSearch()")
    for text, part in (
        ("bias", "bias_L"),
        ("txt_2", "_L2_txt"),
        ("block 3", "_L3_"),
        ("img_5/66 at row 3, column 5", "feature_L5_img_f66"),  # where it was traced from
        ("nothing-of-the-kind", None),
    ):
        pages.search(text)
        found = pages.js(listed)
        assert bool(found) == (part is not None), text
        assert all(str(part) in name for name in found), (text, found)
    pages.search("suppresses")
    signs = (
        "const net = granary.graphs.network(), listed = [...document.querySelectorAll('#found button')];"
        "return listed.map(b => net.nodes[granary.graphs.row(b.dataset.node)].effect < 0)"
    )
    assert pages.js(signs) and all(pages.js(signs))
    width = "return document.getElementById('search').getBoundingClientRect().width"
    searching = pages.js(width)
    pages.js("granary.controls.clearSearch()")
    assert pages.js(width) == searching  # the count takes no room away


@pytest.mark.browser
def test_a_node_is_found_by_its_own_heading_and_its_row_and_column(pages: Pages) -> None:
    pages.open("#/?view=positional&nodes=1&edges=1&node=feature_L5_img_p22_f66")
    heading = pages.js("return document.getElementById('node-name').textContent")
    for text, all_there in ((heading, True), ("row 3, column 5", False)):
        pages.search(text)
        found = pages.js("return [...document.querySelectorAll('#found button')].map(b => b.dataset.node)")
        assert "feature_L5_img_p22_f66" in found and all("_img_p22" in name for name in found)
        assert (len(found) == 1) == all_there


@pytest.mark.browser
def test_pointing_shows_neighbours_and_heat_and_clicking_follows_paths_both_ways(pages: Pages) -> None:
    pages.open("#/?nodes=1&edges=1")
    edges = [tuple(edge) for edge in pages.shown()["edges"]]
    below, above = {target for _, target in edges}, {source for source, _ in edges}
    middle = next(name for name in sorted(below & above) if "_img_f" in name)
    pages.point(middle)
    wait(lambda: not pages.js("return document.getElementById('tip').hidden"))
    assert middle.rsplit("_f", 1)[1] in pages.js("return document.querySelector('#tip b').textContent")
    touching = {edge for edge in edges if middle in edge}
    assert {tuple(edge) for edge in pages.shown()["paths"]} == touching
    assert pages.js("return document.querySelectorAll('#traced .heat-room canvas').length") == 1
    assert pages.js("return document.querySelector('#canvas .base').style.opacity") == "0.2"
    pages.point(middle, click=True)
    wait(lambda: f"node={middle}" in pages.hash())
    assert pages.js("return document.activeElement.tagName") != "CANVAS"
    for key, ways in (("d", [(1, 0)]), ("u", [(0, 1)]), ("b", [(1, 0), (0, 1)])):
        pages.press(key)
        wait(lambda key=key: f"follow={ {'d': 'down', 'u': 'up', 'b': 'both'}[key] }" in pages.hash())
        expected = set().union(*(reached(edges, middle, *way) for way in ways))
        assert {tuple(edge) for edge in pages.shown()["paths"]} == expected, key
    pages.browser.back()
    wait(lambda: "node=" not in pages.hash())


def reached(edges: list[tuple[str, str]], start: str, near: int, far: int) -> set[tuple[str, str]]:
    """The edges on all paths that begin at a node and go from an edge's end `near` to its end `far`."""
    found: set[tuple[str, str]] = set()
    frontier = {start}
    while frontier:
        new = {edge for edge in edges if edge[near] in frontier} - found
        found |= new
        frontier = {edge[far] for edge in new}
    return found


@pytest.mark.browser
def test_the_panel_lists_the_strongest_edges_by_sign_as_the_tables_have_them(pages: Pages, made: Fixture) -> None:
    pages.open("#/?node=feature_L5_img_f66")
    graph = made.over_tokens
    into = [
        (graph.names[source], value)
        for source, target, value in zip(graph.sources, graph.targets, graph.attributions, strict=True)
        if graph.names[target] == "feature_L5_img_f66"
    ]
    for sign, selector in ((1, "#incoming .excites"), (-1, "#incoming .suppresses")):
        strongest = sorted((edge for edge in into if edge[1] * sign > 0), key=lambda edge: -abs(edge[1]))
        named = pages.js(f"return [...document.querySelectorAll('{selector} .edge')].map(b => b.dataset.node)")
        assert named == [name for name, _ in strongest[:8]]
        said = pages.js(f"return document.querySelector('{selector} h4 small').textContent")
        assert said.startswith(f" {len(strongest)}, together {'+' if sign > 0 else '−'}")
    sums = pages.js("return [...document.querySelectorAll('#incoming .shares .num')].map(c => c.textContent)")
    total = sum(float(text.replace("−", "-")) for text in sums)
    assert total == pytest.approx(sum(value for _, value in into), abs=0.02)
    pages.js("document.querySelector('#incoming .edge').click()")
    wait(lambda: "node=feature_L5_img_f66" not in pages.hash())


@pytest.mark.browser
def test_sliders_thin_the_graph_and_a_link_shows_the_same_afresh(pages: Pages) -> None:
    pages.open("#/?view=positional&nodes=1&edges=1")
    whole = pages.shown()
    pages.slide("edges", 0.6)
    fewer = pages.shown()
    assert 0 < len(fewer["edges"]) < len(whole["edges"])
    assert set(map(tuple, fewer["edges"])) < set(map(tuple, whole["edges"]))
    pages.slide("nodes", 0.7)
    pages.js("document.querySelector('#kinds input[value=error]').click()")
    pages.choose("feature_L5_img_p22_f66")
    pages.press("p")
    fewest = pages.shown()
    assert len(fewest["nodes"]) < len(fewer["nodes"])
    assert not any(name.startswith("error") for name in fewest["nodes"])
    link = pages.hash()
    assert pages.js("return document.getElementById('nodes-count').textContent").endswith("70 % of the influence")
    assert "nodes=0.7" in link and "edges=0.6" in link and "pin=feature_L5_img_p22_f66" in link and "hide=error" in link
    pages.open(link)
    assert pages.shown() == fewest
    assert pages.js("return document.getElementById('node-name').textContent") == "img_5/66 at row 3, column 5"
    pages.js("document.getElementById('reset').click()")
    assert "nodes=" not in pages.hash() and "pin=" not in pages.hash()
    pages.browser.back()
    wait(lambda: pages.hash() == link and pages.shown() == fewest)
    pages.open("#/?view=positional")
    pages.slide("nodes", 0.8)  # the other share stays what it was, and is said too
    fewer, link = pages.shown(), pages.hash()
    assert "nodes=0.8" in link and "edges=" in link
    pages.open(link)
    assert pages.shown() == fewer


LAST = """
    const net = granary.graphs.network(), vis = granary.graphs.visible();
    return net.nodes.filter((n, i) => vis.mask[i] && n.kind === 'feature').at(-1).name;
"""


@pytest.mark.browser
def test_view_graph_and_supernodes_change_while_a_node_of_the_end_of_the_table_is_chosen(pages: Pages) -> None:
    complaints(pages.browser)
    for change, heading in (
        ("document.querySelector('[name=view][value=aggregated]').click()", "same"),
        ("for (const n of ['feature_L5_img_p22_f66', arguments[0]]) granary.graphs.choose(granary.graphs.row(n), true);"
         "document.getElementById('group-name').value = 'two'; document.querySelector('#grouping > button').click()", "two"),
        ("const s = document.getElementById('graph'); s.value = s.options[1].value; s.dispatchEvent(new Event('change'))", "Target"),
    ):  # fmt: skip
        pages.open("#/?view=positional&nodes=1&edges=1")
        last = pages.js(LAST)
        pages.choose(last)
        pages.js("granary.graphs.hover(granary.graphs.row(arguments[0]))", last)
        title = pages.heading().split(" at ")[0]
        pages.js(change, last)
        wait(lambda heading=heading, title=title: pages.heading() == (title if heading == "same" else heading))
        names = pages.js("return granary.graphs.network().names || granary.graphs.network().nodes.map(n => n.name)")
        assert set(pages.shown()["out"] or []) <= set(names)
    pages.js("for (const k of [0, 1, 0]) location.hash = '#/' + document.getElementById('graph').options[k].value")
    wait(lambda: "image-00003" in pages.js("return document.title") and pages.heading() == "Target")
    assert pages.js("return granary.graphs.state().graph") in pages.hash()
    assert complaints(pages.browser) == []


@pytest.mark.browser
def test_what_was_chosen_pinned_and_put_together_stays_when_the_view_changes(pages: Pages) -> None:
    group = "group=two:feature_L5_img_f66,input_img"
    pages.open(f"#/?view=aggregated&nodes=1&edges=1&{group}&node=feature_L5_txt_f999")
    assert "no node feature_L5_txt_f999 in this graph over tokens" in pages.js(
        "return document.getElementById('failed').textContent"
    )
    pages.open(f"#/?view=positional&nodes=1&edges=1&pin=feature_L5_img_p22_f66&node=feature_L5_img_p22_f66&{group}")
    assert pages.js("return document.getElementById('elsewhere').textContent") == "1 more over tokens"
    pages.press("v")
    assert pages.js("return granary.graphs.row('group_two')") is not None
    assert pages.js("return document.getElementById('elsewhere').textContent") == "1 more per token"
    pages.browser.back()
    wait(lambda: pages.heading() == "img_5/66 at row 3, column 5")
    pages.js("granary.graphs.choose(null)")
    pages.open("#/?view=aggregated&node=feature_L5_img_f66")
    assert pages.js("return document.querySelectorAll('#traced .cells .cell').length") == 1  # where it was traced
    assert "traced at row 3, column 5" in pages.js("return document.getElementById('traced-caption').textContent")
    pages.press("v")
    assert pages.heading() == "img_5/66 at row 3, column 5"
    pages.open("#/?view=positional&group=below:input_L0_img_p0,input_L0_img_p3,dropped&nodes=1&edges=1")
    script = (
        "const {place} = granary.drawing.scene(), y = place.y[granary.graphs.row('group_below')];"
        "return place.bands.find(b => y >= b.top && y <= b.bottom).title"
    )
    assert pages.js(script) == "input"


@pytest.mark.browser
def test_the_drawing_is_fitted_until_the_reader_moves_it_and_then_stays(pages: Pages) -> None:
    pages.open("#/?view=positional&nodes=0.3&edges=1")
    for share in (1, 0.2):
        pages.slide("nodes", share)
        assert pages.away() == 0
    pages.choose("feature_L5_img_p22_f66")
    pages.js("granary.drawing.zoomBy(2)")
    where = "return granary.drawing.screen(granary.graphs.row('feature_L5_img_p22_f66'))"
    wait(lambda: pages.js("return granary.graphs.row('feature_L5_img_p22_f66')") is not None)
    before = pages.js(where)
    pages.slide("nodes", 1)
    assert pages.js(where) == pytest.approx(before, abs=0.5)
    pages.js("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', shiftKey: true}))")
    assert pages.js(where)[0] == pytest.approx(before[0] - 60, abs=0.5)
    pages.js("document.getElementById('reset').click()")
    assert pages.away() == 0
    left = "return parseFloat(document.getElementById('tip').style.left)"
    pages.js("granary.graphs.hover(granary.graphs.row('feature_L5_img_p22_f66'))")
    pages.js("granary.drawing.panBy(-200, 0)")  # away from the edge, where it would have to turn aside
    before = pages.js(left)
    pages.js("granary.drawing.panBy(-40, 0)")
    assert pages.js(left) == pytest.approx(before - 40, abs=0.5)  # what is said of a node goes along with it


@pytest.mark.browser
def test_nodes_that_are_put_together_have_the_sums_of_their_edges(pages: Pages, made: Fixture) -> None:
    pages.open("#/?nodes=1&edges=1")
    names = [name for name in pages.shown()["nodes"] if name.startswith("feature_L2_img")][:2]
    for count, name in enumerate(names, 1):
        pages.point(name, click=True, shift=True)
        wait(lambda count=count: pages.js("return granary.graphs.chosen.size") == count)
    pages.press("g")
    wait(lambda: pages.js("return document.activeElement.id") == "group-name")
    pages.press("round things\ue007")
    wait(lambda: "node=group_round+things" in pages.hash() or "node=group_round%20things" in pages.hash())
    graph = made.over_tokens
    triples = list(zip(graph.sources, graph.targets, graph.attributions, strict=True))
    expected: dict[str, float] = {}
    for source, target, value in triples:
        if graph.names[target] in names and graph.names[source] not in names:
            expected[graph.names[source]] = expected.get(graph.names[source], 0) + value
    script = (
        "const net = granary.graphs.network(), i = granary.graphs.row('group_round things');"
        "return [...granary.network.edgesOf(net.into, i)].map(e => [net.nodes[net.edges.source[e]].name, net.edges.value[e]])"
    )
    assert dict(pages.js(script)) == pytest.approx(expected, abs=1e-5)
    assert not set(names) & set(pages.shown()["nodes"])
    pages.open(pages.hash())
    assert dict(pages.js(script)) == pytest.approx(expected, abs=1e-5)
    pages.js("document.getElementById('ungroup').click()")
    assert set(names) <= set(pages.shown()["nodes"])


@pytest.mark.browser
def test_a_label_stands_at_its_node_is_found_and_leaves_as_the_commands_file(pages: Pages, downloads: Path) -> None:
    pages.open("#/?nodes=1&node=" + label_target(pages))
    number = int(label_target(pages).rsplit("_f", 1)[1])
    pages.press("l")
    wait(lambda: pages.js("return document.activeElement.id") == "label-text")
    pages.press("red edges")
    pages.js(
        "document.querySelector('#labelling [name=author]').value = 'Ada'; document.querySelector('#labelling button').click()"
    )
    assert pages.js("return document.getElementById('shown-label').textContent") == "red edges"
    pages.js("const s = document.getElementById('search'); s.value = 'edges'; s.dispatchEvent(new Event('input'))")
    assert pages.js("return document.querySelector('#found button').dataset.node").endswith(f"_f{number}")
    pages.js("document.getElementById('json').click()")
    path = downloads / "labels.json"
    wait(path.exists)
    time.sleep(0.1)
    label = json.loads(path.read_text())["labels"][0]
    assert (label["dictionary"], label["feature"], label["text"]) == ("transcoder_img_0", number, "red edges")
    pages.js("granary.labels.forget()")


def label_target(pages: Pages) -> str:
    """A feature of the one image site whose dictionary is known."""
    if not pages.js("return document.documentElement.dataset.ready"):
        pages.open()
    return str(pages.js("return granary.graphs.network().nodes.find(n => /^feature_L0_img_f/.test(n.name)).name"))


@pytest.mark.browser
def test_the_picture_says_which_nodes_stand_where(pages: Pages) -> None:
    pages.open("#/?view=positional&nodes=1&edges=1")
    pages.js("granary.graphs.state()")
    cell = 22
    pages.js(
        "const f = document.getElementById('traced-frame'), b = f.getBoundingClientRect();"
        "f.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + b.width * 4.5 / 9, clientY: b.top + b.height * 2.5 / 6}))"
    )
    out = pages.shown()["out"]
    assert out and all(f"_img_p{cell}" in name for name in out)
    words = pages.js("return [...document.querySelectorAll('#traced-words > *')].map(w => w.textContent)")
    assert "circle" in " ".join(words) or "square" in " ".join(words) or len(words) > 3


@pytest.mark.browser
def test_the_graph_leaves_as_png_and_svg(pages: Pages, downloads: Path) -> None:
    pages.open("#/?nodes=1&edges=1")
    nodes = len(pages.shown()["nodes"])
    name = pages.js("return granary.graphs.state().graph")
    for form in ("png", "svg"):
        pages.js(f"document.getElementById('{form}').click()")
        wait((downloads / f"{name}.{form}").exists)
    time.sleep(0.2)
    picture = np.asarray(Image.open(downloads / f"{name}.png").convert("RGB"))
    assert picture.shape[1] == 2 * round(pages.js("return granary.drawing.size.width"))
    assert len(np.unique(picture[::9, ::9].reshape(-1, 3), axis=0)) > 50
    assert picture.shape[0] > 2 * round(pages.js("return granary.drawing.size.height"))  # what it is of stands above
    root = ET.parse(downloads / f"{name}.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{space}g/{space}title")) == nodes
    assert root.findtext(f"{space}title", "").startswith("Attribution graph of img_5/66")
    said = " ".join(text.text or "" for text in root.findall(f"{space}text"))
    assert "Target img_5/66 at row 3, column 5 image 3, step 2: “a small red circle” excites suppresses" in said
    script = """
        granary.graphs.choose(granary.graphs.row('feature_L5_img_f66'));
        const scene = granary.drawing.scene();
        return granary.svg.text(scene, granary.drawing.marked(), 'a\\u0001b', granary.graphs.facts(), ['c\\u0008d', 'e']);
    """
    root = ET.fromstring(pages.js(script))
    everything, out = (root.find(f"{space}g[@class='{name}']") for name in ("all", "out"))
    assert everything is not None and out is not None and everything.get("opacity") == "0.2"
    ends = "".join(path.get("d", "") for path in everything.findall(f"{space}g[@class='edges']/{space}path"))
    assert ends.count("M") == len(pages.shown()["edges"])
    assert len(out.findall(f"{space}g/{space}title")) == len(pages.shown()["out"])
    assert len(root.findall(f"{space}circle[@class='ring']")) == 1
    assert root.findtext(f"{space}title") == "ab"


@pytest.mark.browser
def test_the_keyboard_walks_along_edges_and_layers(pages: Pages) -> None:
    pages.open("#/?nodes=1&edges=1")
    pages.js("document.getElementById('canvas').focus()")
    wait(lambda: "img_5/66" in pages.js("return document.querySelector('#tip b')?.textContent || ''"))
    pages.press("\ue015")  # down: along the strongest edge
    first = pages.js("return document.getElementById('said').textContent")
    assert first and not first.startswith("img_5/66 ")
    pages.press("\ue007")
    wait(lambda: "node=" in pages.hash())
    pages.press("\ue00c")
    wait(lambda: "node=" not in pages.hash())
    pages.press("?")
    assert wait(lambda: pages.js("return document.getElementById('help').open"))
    pages.press("\ue00c")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
def test_edges_and_words_stand_out_in_light_and_dark(pages: Pages, scheme: str) -> None:
    emulate(pages, scheme)  # type: ignore[arg-type]
    pages.open()
    assert pages.js("return getComputedStyle(document.documentElement).colorScheme") == "light dark"
    card = pages.js(COLOUR, "card")
    for colour in ("excite", "suppress"):
        assert contrast(pages.js(COLOUR, colour), card) >= 4.5, colour  # they are words too
    background = "return [...document.querySelector('#canvas .base').getContext('2d').getImageData(2, 60, 1, 1).data]"
    light = sum(pages.js(background)[:3]) > 384
    assert light == (scheme == "light")
    pages.press("t")
    wait(lambda: (sum(pages.js(background)[:3]) > 384) != light)
    pages.js("localStorage.removeItem('granary theme')")
    emulate(pages, "light")  # type: ignore[arg-type]


@pytest.mark.browser
def test_beside_a_report_features_have_examples_and_their_pages_name_the_graphs(beside: Pages) -> None:
    complaints(beside.browser)
    beside.open("#/?nodes=1&node=" + label_target(beside))
    wait(lambda: beside.js("return document.querySelectorAll('#examples-box figure').length") == 4)
    link = beside.js("return document.querySelector('#examples-box a').getAttribute('href')")
    address = beside.address.replace("graphs.html", link)
    beside.browser.get(address)
    wait(lambda: beside.js("return document.querySelectorAll('#in-graphs a').length") >= 1)
    said = beside.js("return document.querySelector('#in-graphs a b').textContent")
    assert said == "img_5/66 at row 3, column 5 in image 3, step 2"
    beside.js("document.querySelector('#in-graphs a').click()")
    wait(lambda: beside.js("return document.getElementById('node-name')?.textContent || ''").startswith("img_0/"))
    assert complaints(beside.browser) == []


@pytest.mark.slow
@pytest.mark.browser
def test_a_graph_of_2000_nodes_and_20000_edges_is_quick(tmp_path: Path, browser: Any) -> None:
    write_graphs(tmp_path, random_graph(*SIZES["large"]))
    pages = Pages(browser, write_pages([tmp_path], tmp_path).as_uri(), tmp_path)
    browser.set_script_timeout(30)
    for place in ("", "#/?view=positional&nodes=1&edges=1"):
        assert any(pages.open(place) < FIRST_VIEW_S for _ in range(3)), place
    assert len(pages.shown()["edges"]) == 20_000
    middle = "granary.graphs.network().nodeOrder[{0}]"
    for action in (
        f"granary.graphs.hover({middle})",
        "const s = document.getElementById('edges-slider'); s.value = 800 - {0}; s.dispatchEvent(new Event('input'))",
        f"granary.graphs.choose({middle})",
        "granary.drawing.panBy(9, 9)",
    ):
        tries = [browser.execute_async_script(TIMED, action.replace("{0}", str(each))) for each in range(5)]
        assert min(tries) < INTERACTION_MS, (action, tries)
    assert complaints(browser) == []


def test_the_page_gets_the_strongest_edges_and_says_what_it_lacks() -> None:
    graph, _ = random_graph(60, 200)
    view = view_columns(graph, most=50)
    assert view["left_out"]["edges"] == 150
    score = edge_scores(graph)
    strongest = np.sort(np.abs(graph.attributions[np.argsort(-score, kind="stable")[:50]]))
    values = np.frombuffer(base64.b64decode(view["edges"]["attribution"]), "<f4")
    np.testing.assert_allclose(np.sort(np.abs(values)), strongest, rtol=1e-6)
    assert view["count"] == len(graph.nodes) - view["left_out"]["nodes"]
    assert np.frombuffer(base64.b64decode(view["target"]), "u1").sum() == 1


def test_equal_graphs_give_equal_pages_wherever_they_lie(tmp_path: Path) -> None:
    def pages_in(place: Path) -> dict[str, bytes]:
        write_graphs(place, random_graph(60, 200))
        write_pages([place], place)
        return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}

    assert pages_in(tmp_path / "a") == pages_in(tmp_path / "b")
    assert pages_in(tmp_path / "a") == pages_in(tmp_path / "b")  # written again over itself


def test_every_graph_has_a_name_and_every_dictionary_too(tmp_path: Path) -> None:
    book = LabelBook(None, labels=[Label(7, "2026-01-01T00:00:00Z", "Ada", "red edges")])
    folders = []
    for number, name in enumerate(("red", "red-2", "red", "red")):
        identity = f"{number % 2}" * 64
        target = {"name": f"supernode_{name}", "site": None, "token": None, "feature": None}
        facts = {
            "image": 0, "step": 0, "grid": [1, 1], "targets": [target],
            "transcoders": {"img_0": {"name": "transcoder", "identity": identity}},
        }  # fmt: skip
        graph_of([("feature_L0_img_p0_f7", "feature_L1_img_p0_f3", 1.0)], facts, {}).write(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    write_pages(folders, tmp_path / "out", None, {"1" * 64: book})
    contents = script_value(tmp_path / "out" / "page" / "data" / "graphs.js")
    assert contents["pictures"]["without"] == "the page was made without the store"
    names = [entry["name"] for entry in contents["graphs"]]
    assert names == [f"image-00000.step-0.{name}" for name in ("red", "red-2", "red-3", "red-4")]
    assert all((tmp_path / "out" / "page" / "data" / "graphs" / f"{name}.js").is_file() for name in names)
    called = [entry["dictionaries"]["img_0"]["name"] for entry in contents["graphs"]]
    assert called == ["transcoder-00000000", "transcoder-11111111"] * 2
    labels = script_value(tmp_path / "out" / "page" / "data" / "labels.js")
    assert [label["text"] for label in labels[called[1]]] == ["red edges"]


def script_value(path: Path) -> Any:
    """What a script of data hands over."""
    text = path.read_text()
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def test_graphs_that_do_not_fit_leave_a_report_as_it_is(made: Fixture, tmp_path: Path) -> None:
    other = {"store": "sha256-0", "image": 0, "step": 0, "grid": [1, 1]}
    graph_of([("input_L0_img_p0", "feature_L1_img_p0_f3", 1.0)], other, {}).write(tmp_path / "g")
    before = {path: path.stat().st_mtime_ns for path in made.report.rglob("*")}
    for plan in (False, True):
        for place, error in ((tmp_path / "g", MismatchError), (tmp_path / "nothing", UsageError)):
            with pytest.raises(
                error, match="make the graphs from this one" if error is MismatchError else "holds no graph"
            ):
                report.run(ReportSettings(**made.inputs, graphs=(place,), plan=plan))
    assert {path: path.stat().st_mtime_ns for path in made.report.rglob("*")} == before


def test_graphs_of_another_store_are_refused(made: Fixture, tmp_path: Path) -> None:
    other = graph_of(
        [("input_L0_img_p0", "feature_L1_img_p0_f3", 1.0)],
        {"store": "sha256-0", "image": 0, "step": 0, "grid": [1, 1]},
        {},
    )
    other.write(tmp_path / "g")
    with pytest.raises(MismatchError, match="is of store sha256-0"):
        write_pages([tmp_path / "g"], tmp_path / "out", made.store)
