"""A graph of ours in circuit-tracer's own frontend, served by its own server: `make test-exchange` gets both and runs this.

Its page loads its libraries from the network; a copy of the page loads the same ones from npm's packages instead.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analyze.circuits.exchange import circuit_tracer
from tests.chromium import chromium, complaints, wait
from tests.circuit_graphs import book, golden

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PEER = Path(__file__).parent.parent / ".bench-peers" / "circuit-tracer"
LIBRARIES = {
    "d3.js": ("d3-collection/dist/d3-collection.js", "d3/dist/d3.js"),
    "jetpack_2024-07-20.js": ("d3-jetpack/build/d3-jetpack.cjs",),
    "dagre.min.js": ("dagre/dist/dagre.min.js",),
    "pako.min.js": ("pako/dist/pako.min.js",),
}
JETPACK = """
const conventions = d3.conventions;
d3.conventions = (asked) => {
  const made = conventions(asked);
  made.drawAxis = (svg = made.svg) => {
    svg.append('g').at({class: 'x axis'}).translate([0, made.height]).call(made.xAxis);
    svg.append('g').at({class: 'y axis'}).call(made.yAxis);
  };
  return made;
};
"""
"""what the page's own fork of d3-jetpack has beyond npm's package"""
UNUSED = ("hotserver-client-ws.js", "npy_v0.js")
"""a reloader for its developers, and a reader of arrays that its pages of graphs do not need"""
SCRIPT = re.compile(r"<script src='https://[^']*/([^'/]+)'></script>")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a graph of ours, as `--export circuit-tracer` writes it."""
    folder = tmp_path_factory.mktemp("exported") / "circuit-tracer"
    circuit_tracer.write(golden()[0], folder, labels={"img_0": book(84, "warm edges")})
    return folder


@pytest.fixture(scope="module")
def address(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where its own server shows that folder."""
    if not (PEER / "installed").is_file():
        pytest.skip("circuit-tracer is not here: make test-exchange gets it")
    sys.path.insert(0, str(PEER))
    try:
        from circuit_tracer.frontend.local_server import serve  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(PEER))
    page = tmp_path_factory.mktemp("frontend") / "assets"
    shutil.copytree(PEER / "circuit_tracer" / "frontend" / "assets", page)
    for name, paths in LIBRARIES.items():
        parts = [(PEER / "node_modules" / path).read_text() for path in paths]
        (page / name).write_text("\n".join([*parts, JETPACK] if name.startswith("jetpack") else parts))
    (page / "favicon.ico").touch()  # browsers ask every server for one, and tell of it when there is none
    text = (page / "index.html").read_text()
    assert set(SCRIPT.findall(text)) == {*LIBRARIES, *UNUSED}, "its page loads other libraries now"
    (page / "index.html").write_text(
        SCRIPT.sub(lambda found: f"<script src='./{found[1]}'></script>" if found[1] not in UNUSED else "", text)
    )
    server = serve(str(data), str(page), port=0)
    yield f"http://localhost:{server.httpd.server_address[1]}/index.html"
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.fixture
def page(address: str, browser: Any) -> Any:
    browser.get(address)
    wait(lambda: browser.execute_script("return document.querySelectorAll('.link-graph text.node').length"))
    return browser


def shown(page: Any) -> list[dict[str, Any]]:
    """The nodes that are drawn: what each is, and where."""
    script = """return [...document.querySelectorAll('.link-graph text.node')].map(e => {
        const box = e.getBoundingClientRect(), d = e.__data__;
        return {id: d.nodeId, type: d.feature_type, layer: d.layer, x: box.x + box.width / 2, y: box.y + box.height / 2};
    });"""
    return list(page.execute_script(script))


def test_its_frontend_draws_every_node_and_says_nothing_on_the_console(page: Any, data: Path) -> None:
    graph, _ = golden()
    nodes = shown(page)
    written = json.loads((data / f"{circuit_tracer.slug_of(graph)}.json").read_text())
    assert {node["id"] for node in nodes} == {node["node_id"] for node in written["nodes"]}
    assert all(node["x"] > 0 and node["y"] > 0 for node in nodes), "a node has no place"
    heights = {str(node["layer"]): node["y"] for node in nodes}
    assert heights["4"] < heights["3"] < heights["2"] < heights["1"] < heights["0"] < heights["E"]
    assert complaints(page) == []


def test_a_click_on_a_node_shows_what_leads_to_it_and_its_page(page: Any) -> None:
    chosen = next(node for node in shown(page) if node["id"].startswith("0_84_"))
    page.execute_script(
        "document.querySelector('.link-graph').querySelector('svg, canvas').parentNode.dispatchEvent("
        "new MouseEvent('click', {clientX: arguments[0], clientY: arguments[1], bubbles: true}))",
        chosen["x"], chosen["y"],
    )  # fmt: skip
    detail = "return document.querySelector('.feature-detail').innerText"
    wait(lambda: "warm edges · img_0/84 at img 4,1" in page.execute_script(detail))
    assert "Feature L0/84" in page.execute_script(detail).replace("\xa0", " ")
    graph, _ = golden()
    feeding = sum(graph.names[target] == "feature_L0_img_p12_f84" for target in graph.targets)
    rows = "return document.querySelectorAll('.node-connections .input .feature-row').length"
    assert wait(lambda: page.execute_script(rows)) == feeding > 20
    examples = "return document.querySelector('.feature-example-list')?.innerText || ''"
    assert "img 4,1: 1" in wait(lambda: page.execute_script(examples)), "the page of the feature names its tokens"
    assert complaints(page) == []


def test_pseudo_tokens_name_stream_place_and_step(page: Any) -> None:
    words = page.execute_script("return [...document.querySelectorAll('.prompt-token text')].map(e => e.textContent)")
    assert words[0] == "const @1"
    assert "txt 3 @1" in words
    assert "img 4,1 @1" in words
    assert len(words) == 1 + 16 + 16
