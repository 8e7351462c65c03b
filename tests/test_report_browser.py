"""The report in a browser, from disk and over http: search, sort, open, go back, share a link, label, dark mode."""

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze.labels.command import books_of, parse_transported
from analyze.pictures.heat import Heat
from analyze.report import building as report
from analyze.report.building import Report
from analyze.report.heat_pass import spooled
from analyze.report.settings import ReportSettings
from tests.analyze_planted import Plan
from tests.chromium import Page, complaints, contrast, wait
from tests.synthetic_analysis import synthetic_analysis

pytestmark = pytest.mark.browser
FIRST_VIEW_S = 2.0
BROKEN_PICTURES = """
    const broken = (image) => { image.loading = 'eager'; return image.decode().then(() => 0, () => 1); };
    return Promise.all([...document.images].map(broken)).then(all => all.reduce((a, b) => a + b, 0));
"""
PAINTED = """
    const canvas = document.querySelector('#examples canvas');
    return canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(v => v > 0);
"""
COLOUR = """
    const probe = document.createElement('i');
    document.body.append(probe);
    probe.style.color = `var(--${arguments[0]})`;
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return colour;
"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Pages(Page):
    """A report seen through a browser."""

    def rows(self) -> list[list[str]]:
        """The texts of the table's rows that are drawn."""
        script = "return [...document.querySelectorAll('#table tr[data-number]')].map(r => [...r.cells].map(c => c.innerText))"
        return list(self.js(script))

    def current(self) -> str:
        """The row that the keyboard is at."""
        return str(self.js("return document.querySelector('#table tr.current .name a')?.textContent || ''"))

    def count(self) -> str:
        """What the table says of how many rows there are."""
        return str(self.js("return document.getElementById('count').textContent"))

    def search(self, text: str) -> None:
        """Type into the search field, which `/` leads to."""
        self.press("/")
        wait(lambda: self.js("return document.activeElement.name") == "q")
        self.press(text)

    def hash(self) -> str:
        """Where the page says that the reader is."""
        return str(self.js("return location.hash"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small report."""
    work = tmp_path_factory.mktemp("pages")
    plan = Plan(n_images=60, steps=2, truth=False)
    inputs = synthetic_analysis(work, plan, 100, coherent=True)
    made = report.run(ReportSettings(**inputs))
    assert isinstance(made, Report)
    return made.index.parent


@pytest.fixture(scope="module")
def pages(folder: Path, browser: Any) -> Pages:
    """The report from disk."""
    return Pages(browser, (folder / "index.html").as_uri(), folder)


@pytest.fixture(scope="module")
def served(folder: Path, browser: Any) -> Iterator[Pages]:
    """The report from a web server, below a path of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Pages(browser, f"http://127.0.0.1:{server.server_port}/{folder.name}/", folder)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("where", ["pages", "served"])
def test_every_view_opens_at_once_with_its_pictures_and_without_a_complaint(
    request: pytest.FixtureRequest, where: str
) -> None:
    pages = request.getfixturevalue(where)
    complaints(pages.browser)
    assert any(pages.open() < FIRST_VIEW_S for _ in range(3))  # a busy machine gets three tries
    wait(lambda: pages.js("return document.querySelectorAll('.findings canvas').length") >= 6)
    wait(lambda: pages.js("return document.querySelectorAll('.plot > div').length") >= 1)
    for place in ("", "#/features", "#/feature/img_0/1/7?alive=all", "#/labels"):
        if place:
            pages.open(place)
        assert pages.js(BROKEN_PICTURES) == 0, place
        assert pages.js("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, (
            place
        )
        assert pages.js("return [...document.images].every(i => i.hasAttribute('alt'))"), place
        assert pages.js("return document.getElementById('failed').hidden"), place
    assert complaints(pages.browser) == []


def test_search_finds_prompts_labels_words_and_numbers(pages: Pages) -> None:
    pages.open("#/features?alive=all")
    assert pages.count().startswith("400 of 400")
    pages.search("triangle")
    wait(lambda: "q=triangle" in pages.hash())
    found = int(pages.count().split()[0])
    assert 0 < found < 400
    prompts = json.loads((pages.folder / "data/prompts/0.js").read_text().split(",", 1)[1][:-3])["prompt"]
    picked = pages.js(
        "return granary.features.chosen(granary.features.complete(granary.place.now().filters)).then(result =>"
        " [...result.order].map((_, i) => granary.features.row(result, i)).map(({block, feature}) =>"
        " [granary.features.topImages(block, feature), granary.features.topWords(block, feature)]))"
    )
    assert len(picked) == found
    for images, words in picked:
        assert any("triangle" in prompts[image] for image in images) or any("triangle" in word for word in words)
    pages.open("#/features?alive=all&q=img_0/42")
    assert [row[0] for row in pages.rows()] == ["img_0/42", "img_0/42"]
    pages.open("#/features?alive=all&q=nothing-of-the-kind")
    assert pages.rows() == []
    assert "No feature matches" in pages.js("return document.getElementById('table').innerText")


def test_a_click_on_a_column_sorts_by_it_and_the_link_says_so(pages: Pages) -> None:
    pages.open("#/features?dictionary=img_0&step=1")
    for said, falling in (("-density", True), ("density", False)):
        pages.js("document.querySelector('.dt-scroll-head th.c-density').click()")
        wait(lambda said=said: f"sort={said}" in pages.hash())
        wait(
            lambda falling=falling: (
                shares(pages) == sorted(shares(pages), reverse=falling) and len(set(shares(pages))) > 3
            )
        )
        order = pages.js("return document.querySelector('.dt-scroll-head th.c-density').getAttribute('aria-sort')")
        assert order == ("descending" if falling else "ascending")
    before = pages.rows()
    pages.open(pages.hash())  # the link, opened afresh by somebody else
    assert pages.rows() == before
    assert all(row[1] == "1" for row in before)


def shares(pages: Pages) -> list[float]:
    column = "[...document.querySelectorAll('#table tr[data-number] td.c-density')]"
    return [float(text.strip("<% ")) for text in pages.js(f"return {column}.map(c => c.innerText)")]


def test_the_keyboard_walks_opens_and_goes_back_to_the_same_row(pages: Pages) -> None:
    pages.open("#/features?dictionary=img_0&step=0&sort=-max")
    names = [row[0] for row in pages.rows()]
    pages.press("jjk")
    wait(lambda: pages.current() == names[1])
    assert pages.js("return document.activeElement.tagName") == "TR"
    pages.press("\ue007")  # Enter
    wait(lambda: pages.hash().startswith(f"#/feature/img_0/0/{names[1].split('/')[1]}"))
    wait(lambda: pages.js("return document.getElementById('position').textContent").startswith("2 of"))
    pages.press("j")
    wait(lambda: pages.js("return document.getElementById('position').textContent").startswith("3 of"))
    shown = pages.hash()
    assert f"/{names[2].split('/')[1]}?" in shown
    pages.press("\ue014")  # right: the next step
    wait(lambda: pages.hash().startswith("#/feature/img_0/1/"))
    pages.press("\ue012")
    wait(lambda: pages.hash() == shown)
    pages.press("\ue00c")  # Escape
    wait(lambda: pages.hash().startswith("#/features") and pages.current() == names[2])
    pages.browser.back()
    wait(lambda: pages.hash() == shown)
    pages.press("?")
    assert wait(lambda: pages.js("return document.getElementById('help').open"))
    pages.press("\ue00c")
    wait(lambda: not pages.js("return document.getElementById('help').open"))


@pytest.mark.parametrize("where", ["pages", "served"])
def test_a_link_to_a_feature_shows_the_same_afresh(request: pytest.FixtureRequest, where: str) -> None:
    pages = request.getfixturevalue(where)
    pages.open("#/features?q=circle&dictionary=img_0&step=1&sort=-max")
    pages.press("jj\ue007")
    text = wait(lambda: "in the table" in body(pages) and body(pages))
    assert "3 of" in text
    pages.open(pages.hash())
    wait(lambda: "in the table" in body(pages))
    assert body(pages) == text
    pages.open("#/feature/img_0/1/100000")
    assert "No such feature" in body(pages)


def body(pages: Pages) -> str:
    return str(pages.js("return document.querySelector('main > .view:not([hidden])').innerText"))


def test_heat_is_drawn_smooth_in_patches_or_not_at_all(pages: Pages) -> None:
    pages.open("#/features?dictionary=img_0&step=0&sort=-image_share")
    pages.press("j\ue007")
    sizes = "return [...document.querySelectorAll('#examples canvas')].map(c => c.width)"
    smooth = wait(lambda: pages.js(sizes))
    assert set(smooth) == {256}
    assert pages.js(PAINTED)
    pages.press("h")
    assert set(pages.js(sizes)) == {9}  # one pixel a token, enlarged by the style
    pages.press("h")
    assert pages.js(sizes) == []


ONE = """
    const { one, unpacked } = granary.examples;
    const example = {image: 0, maxValue: 2, maxValueTokenIndex: 4, prompt: 'a red', pieces: ['a', ' red'], seed: 0};
    example.values = unpacked(arguments[0], 57, 3);
    const report = granary.features.report();
    const made = one(example, {stream: 'joint', report, first: 3, hottest: {picture: 2, words: 20}}, 'smooth', 0);
    const data = (c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    const strong = [...made.querySelectorAll('canvas')].some(c => data(c).some((v, i) => i % 4 === 3 && v > 200));
    return [made.querySelector('b').textContent, strong, made.querySelectorAll('.heated').length, made.querySelectorAll('mark').length];
"""


def test_a_joint_feature_has_heat_of_its_own_on_pictures_and_on_words(pages: Pages) -> None:
    pages.open("#/features?dictionary=img_0&step=0")
    heat = Heat(0, np.asarray([1, 4, 9]), np.asarray([20, 2, 1], np.float32))
    assert pages.js(ONE, spooled(heat, 57, 3)) == ["2 on image tokens, 20 on text tokens", True, 1, 1]
    words = Heat(0, heat.positions[:1], heat.values[:1])  # nothing over the picture, which stays as it is
    assert pages.js(ONE, spooled(words, 57, 3)) == ["0 on image tokens, 20 on text tokens", False, 0, 1]


def test_a_label_is_kept_shown_in_the_table_and_exported_for_the_command(
    pages: Pages, downloads: Path, folder: Path
) -> None:
    for path in downloads.iterdir():
        path.unlink()
    pages.open("#/feature/img_0/0/5")
    pages.press("l")
    wait(lambda: pages.js("return document.activeElement.id") == "label-text")
    pages.press("blue things")
    pages.js(
        "document.querySelector('#labelling [name=author]').value = ''; document.querySelector('#labelling button').click()"
    )
    assert "say who you are" in pages.js("return document.querySelector('.problem').textContent")
    pages.js(
        "document.querySelector('#labelling [name=author]').value = 'Ada'; document.querySelector('#labelling button').click()"
    )
    assert pages.js("return document.getElementById('shown-label').textContent") == "blue things"
    pages.open("#/features?alive=all&labelled=yes&q=things")
    assert [row[0] for row in pages.rows()] == ["img_0/5\nblue things"] * 2
    pages.open("#/labels")
    pages.js("document.getElementById('export-labels').click()")
    path = downloads / "labels.json"
    wait(path.exists)
    time.sleep(0.1)
    books = books_of(folder.parent.parent / "dictionaries")
    merged = parse_transported(path.read_bytes(), str(path), books)
    assert [(label.feature, label.text, label.author) for label in merged["transcoder_img_0"]] == [
        (5, "blue things", "Ada")
    ]
    pages.js("granary.labels.forget()")
    assert pages.js("return document.getElementById('export-labels').disabled")


def test_a_feature_is_exported_in_the_names_that_others_use(pages: Pages, downloads: Path) -> None:
    for path in downloads.iterdir():
        path.unlink()
    pages.open("#/features?dictionary=txt_0&step=1")
    number = int(pages.rows()[0][0].split("/")[1])
    pages.open(f"#/feature/txt_0/1/{number}")
    pages.js("[...document.querySelectorAll('button')].find(b => b.textContent === 'Export as JSON').click()")
    path = downloads / f"txt_0-{number}-step-1.json"
    wait(path.exists)
    time.sleep(0.1)
    feature = json.loads(path.read_text())
    assert feature["feature_index"] == feature["index"] == number
    assert (feature["layer"], feature["hookName"], feature["modelId"]) == ("txt_0", "mlp_in", "planted")
    assert 0 < feature["frac_nonzero"] <= 1
    assert len(feature["freq_hist_data_bar_heights"]) == len(feature["freq_hist_data_bar_values"])
    assert len(feature["topkCosSimIndices"]) == len(feature["topkCosSimValues"]) == 8
    for activation in feature["activations"]:
        assert len(activation["tokens"]) == len(activation["values"])
        assert " ".join(activation["tokens"]).replace(" ⟨end⟩", "") == activation["prompt"]
        assert activation["maxValue"] >= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them_in_light_and_dark(pages: Pages, scheme: str) -> None:
    emulate(pages, "light" if scheme == "dark" else "dark")
    pages.open()
    for _ in range(2):  # as the system, then the other
        if pages.js("return getComputedStyle(document.documentElement).colorScheme") != scheme:
            pages.press("t")
    assert pages.js("return getComputedStyle(document.documentElement).colorScheme") == scheme
    grounds = [pages.js(COLOUR, name) for name in ("paper", "card", "wash", "chosen")]
    for ink in ("ink", "soft", "accent", "good", "bad", "weak"):
        for ground in grounds:
            assert contrast(pages.js(COLOUR, ink), ground) >= 4.5, (ink, ground)
    for line in ("series-1", "series-2", "series-3"):
        assert contrast(pages.js(COLOUR, line), grounds[1]) >= 3, line
    assert pages.js("return getComputedStyle(document.body).backgroundColor") == grounds[0]
    pages.open("#/features")  # the choice lasts
    assert pages.js("return getComputedStyle(document.documentElement).colorScheme") == scheme
    pages.js("localStorage.removeItem('granary theme')")
    emulate(pages, "light")
    assert complaints(pages.browser) == []


def emulate(pages: Pages, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    pages.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.mark.slow
def test_a_report_of_49152_features_and_10000_images_is_quick(tmp_path: Path, browser: Any) -> None:
    plan = Plan(n_images=10_000, steps=4, grid=(8, 8), d_model=8, sites=("img_0",), chunk_images=256, truth=False)
    inputs = synthetic_analysis(tmp_path, plan, 49_152, coherent=True)
    made = report.run(ReportSettings(**inputs, similar=0, heat_features=200))
    assert isinstance(made, Report)
    pages = Pages(browser, made.index.as_uri(), made.index.parent)
    for place in ("", "#/features", "#/feature/img_0/2/40000"):
        assert any(pages.open(place) < FIRST_VIEW_S for _ in range(3)), place
    pages.open("#/features?alive=all")
    assert pages.count().startswith("196,608 of 196,608")
    pages.press("\ue010")  # End
    wait(lambda: pages.js("return document.querySelector('#table tr.current')?.dataset.number") == "196607")
    started = time.monotonic()
    pages.search("circle")
    wait(lambda: not pages.count().startswith("196,608"))
    assert time.monotonic() - started < FIRST_VIEW_S
    assert complaints(browser) == []
