"""The page of graphs in a browser, from disk and over http: find, follow, thresholds, links, what stays when the view changes."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chromium import complaints, wait
from tests.graph_pages import FIRST_VIEW_S, Fixture, Pages, served


@pytest.fixture(scope="module")
def made(graph_pages: Fixture) -> Fixture:
    return graph_pages


@pytest.fixture(scope="module")
def pages(made: Fixture, browser: Any) -> Pages:
    """The page beside the graphs, from disk."""
    return Pages(browser, (made.graphs / "index.html").as_uri(), made.graphs)


@pytest.fixture(scope="module")
def beside(made: Fixture, browser: Any) -> Iterator[Pages]:
    """The page beside a report, from a web server."""
    yield from served(made, browser)


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
def test_pins_and_supernodes_that_no_view_has_are_named_and_let_go(pages: Pages) -> None:
    pages.open(
        "#/?view=positional&pin=feature_L9_img_f9,feature_L5_img_f66&group=none:feature_L9_img_f1,feature_L9_img_f2"
    )
    said = pages.js("return document.getElementById('failed').textContent")
    assert "not pinned: feature_L9_img_f9." in said and "supernode none" in said
    assert pages.js("return document.getElementById('elsewhere').textContent") == "1 more over tokens"
    pages.press("v")
    wait(lambda: pages.js("return granary.graphs.state().view") == "aggregated")
    assert "feature_L9" not in pages.hash()
    assert pages.js("return document.getElementById('elsewhere')") is None


@pytest.mark.browser
def test_the_new_supernode_has_the_focus(pages: Pages) -> None:
    pages.open("#/?nodes=1&edges=1")
    pages.js("for (const i of [1, 2]) granary.graphs.choose([...granary.graphs.network().nodeOrder][i], true)")
    pages.press("g")
    wait(lambda: pages.js("return document.activeElement.id") == "group-name")
    pages.press("two\ue007")
    wait(lambda: pages.js("return document.activeElement.textContent").startswith("two"))


@pytest.mark.browser
def test_a_graph_whose_file_is_missing_leaves_list_and_address_at_the_one_that_is_drawn(
    pages: Pages, made: Fixture
) -> None:
    first, second = (path.name for path in made.folders)
    pages.open(f"#/{first}")
    file = made.graphs / "page" / "data" / "graphs" / f"{second}.js"
    away = file.rename(file.with_suffix(".away"))
    try:
        pages.js(f"location.hash = '#/{second}'")
        wait(lambda: not pages.js("return document.getElementById('failed').hidden"))
        assert pages.js("return [document.getElementById('graph').value, granary.graphs.state().graph]") == [
            first,
            first,
        ]
        assert first in pages.hash() and second not in pages.hash()
    finally:
        away.rename(file)
    complaints(pages.browser)


@pytest.mark.browser
def test_a_window_of_another_shape_is_laid_out_anew_until_the_reader_has_moved_it(pages: Pages) -> None:
    pages.open("#/?nodes=1&edges=1&view=positional")
    width = "return granary.drawing.scene().place.width / granary.drawing.scene().place.height"
    before, size = pages.js(width), pages.browser.get_window_size()
    try:
        pages.browser.set_window_size(700, 1200)
        wait(lambda: pages.js(width) < 0.9 * before)
        assert pages.away() == 0
        pages.js("granary.drawing.zoomBy(1.5)")
        moved = pages.js(width)
        pages.browser.set_window_size(size["width"], size["height"])
        time.sleep(0.3)
        assert pages.js(width) == moved
    finally:
        pages.browser.set_window_size(size["width"], size["height"])
