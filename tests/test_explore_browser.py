"""`analyze explore` in a browser: find a feature, steer by it, see the picture change, save, load; and nothing from the network."""

import base64
import re
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analyze.steering.command import run as steer
from analyze.steering.settings import SteerSettings
from tests.chromium import Page, chromium, complaints, contrast, wait
from tests.small_explore import Outside, explore_settings, served

pytest.importorskip("gradio")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of gradio's own dependencies
]
GRADIOS_OWN = ("svelte-i18n", "AbortError: signal is aborted")
"""what gradio's page says in every app: of its own words, and of the stream that ends when the reader leaves the page"""
BROKEN_OFF = "Connection errored out."
"""what it may say as it is left"""


class Explored(Page):
    """The page seen through a browser."""

    def is_there(self) -> bool:
        """Whether its head, its tabs and its pictures are drawn."""
        return bool(
            self.js(
                "return !!document.querySelector('#head h1') && !!document.querySelector('#table tr[data-feature]')"
            )
        )

    def element(self, selector: str) -> Any:
        """One element."""
        from selenium.webdriver.common.by import By

        return wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, selector))[0]

    def text(self, selector: str) -> str:
        """The text of an element; empty where there is none."""
        return str(self.js("return document.querySelector(arguments[0])?.innerText || ''", selector))

    def tab(self, name: str) -> None:
        """Go to a tab."""
        self.js("[...document.querySelectorAll('[role=tab]')].find(t => t.innerText === arguments[0]).click()", name)

    def fill(self, part: str, text: str) -> None:
        """Write into a field, in place of what is there, and leave it."""
        field = self.element(f"{part} input:not([type=range]), {part} textarea")
        wait(field.is_displayed)
        field.send_keys("\ue009a\ue000\ue003" + text + "\ue004")  # Control-A, Backspace, the text, Tab

    def value(self, part: str) -> str:
        """What a field holds."""
        return str(
            self.js(
                "return document.querySelector(arguments[0])?.value ?? ''",
                f"{part} input:not([type=range]), {part} textarea",
            )
        )

    def picture(self, name: str) -> np.ndarray | None:
        """The pixels of `plain`, `changed` or `difference`; None where there is none."""
        source = self.js("return document.querySelector(arguments[0])?.src", f'#pictures [data-of="{name}"] img')
        if not source:
            return None
        return np.asarray(Image.open(BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("RGB"))

    def psnr(self) -> str:
        """The distance that is shown; empty before anything was drawn, and beside an error."""
        return self.text("[data-distance=psnr]")

    def complaints(self) -> list[str]:
        """What the console says, gradio's own words aside."""
        said = [str(entry["message"]) for entry in complaints(self.browser)]
        return [text for text in said if not any(own in text for own in GRADIOS_OWN)]

    def reopen(self) -> None:
        """Open the page again; that a stream broke off when the page was left is no complaint."""
        assert self.complaints() == []
        self.open()
        assert not [text for text in self.complaints() if BROKEN_OFF not in text]

    def wide(self, width: int) -> None:
        """Make the view so many pixels wide."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture(scope="module")
def page(traced_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explored]:
    """One page for all tests; nobody may talk to another machine while it is there."""
    settings = explore_settings(traced_flux, tmp_path_factory.mktemp("explore"))
    with pytest.MonkeyPatch.context() as patch:
        outside, browsers = Outside(patch), chromium()
        browser = next(browsers)
        with served(settings) as served_page:
            shown = Explored(browser, served_page.address, Path(settings.out or ""))
            shown.open()
            yield shown
            next(browsers, None)  # closes it
        assert outside.found == []


def test_the_page_loads_nothing_from_elsewhere(page: Explored) -> None:
    loaded = page.js("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(loaded) > 20 and not [name for name in loaded if not name.startswith(page.address)]
    with urllib.request.urlopen(page.address) as answer:
        served_html = answer.read().decode()
    fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)\s*=\s*[\"']([^\"']+)", served_html)
    assert fetched and not [name for name in fetched if re.match(r"(https?:)?//", name)]
    with urllib.request.urlopen(page.address + "theme.css") as answer:
        assert not re.findall(
            r"@import|url\(\s*[\"']?(?:https?:)?//", answer.read().decode() + served_html.split("</head>")[0]
        )
    fonts = page.js("return [...document.fonts].filter(font => font.status !== 'unloaded').map(font => font.family)")
    assert fonts == [], "fonts are those of the reader's machine"
    assert page.complaints() == []


def test_a_feature_is_found_steered_saved_and_drawn_again_by_steer(
    page: Explored, traced_flux: Path, tmp_path: Path
) -> None:
    page.open()
    page.fill("#search", "17")
    wait(lambda: page.js("return document.querySelectorAll('#table tr[data-feature]').length") == 1)
    page.fill("#search", "")
    wait(lambda: page.js("return document.querySelectorAll('#table tr[data-feature]').length") > 3)
    row = page.js("return document.querySelectorAll('#table tr[data-feature]')[2].dataset.feature")
    page.element(f'#table tr[data-feature="{row}"] button').click()
    wait(lambda: page.text("#feature h3").startswith(f"img_2/{row}"))
    assert page.js("return document.querySelectorAll('#top-images .pair img').length") % 2 == 0
    page.element("#steer").click()
    wait(page.psnr)
    assert page.value("#features-0") == f"img_2:{row}"
    plain, before, said = page.picture("plain"), page.picture("changed"), page.psnr()
    assert plain is not None and plain.shape == (64, 64, 3) and before is not None
    page.fill("#strength-0", "10")
    wait(lambda: page.psnr() != said)
    wait(lambda: not np.array_equal(page.picture("changed"), before))
    assert np.array_equal(page.picture("plain"), plain), "the plain picture is another one now"
    page.fill("#name", "found")
    page.element("#save").click()
    wait(lambda: "python -m analyze steer --experiment" in page.text("#kept"))
    where = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
    steer(SteerSettings(experiment=page.folder / "found.yaml", **where, out=tmp_path / "steered"))
    drawn = sorted((tmp_path / "steered" / "pictures").rglob("*.png"))
    for name, path in zip(("plain", "changed"), drawn, strict=True):
        assert np.array_equal(page.picture(name), np.asarray(Image.open(path).convert("RGB"))), name


def test_what_cannot_be_is_one_message_in_the_page_and_a_file_brings_back_what_was(
    page: Explored, tmp_path: Path
) -> None:
    page.open()
    page.tab("Steer")
    page.fill("#prompt", "a small red circle at the top")
    page.fill("#features-0", "img_1:3")
    wait(lambda: page.psnr() and "∞" not in page.psnr())  # the prompt alone was drawn before, without any change
    shown = page.picture("changed")
    page.fill("#features-0", "img_1:96")
    wait(lambda: "has no feature 96; it has 96, 0 to 95" in page.text("#said [role=alert]"))
    assert np.array_equal(page.picture("changed"), shown) and "Traceback" not in page.text("body")
    file = tmp_path / "mine.yaml"
    file.write_text(
        "prompts: [a large blue square]\nseeds: [7]\nedits: ['zero img_1:3,5 @steps=2-3', 'add:2.5 txt_0:1']\n"
    )
    page.element("#load input[type=file], input[type=file]").send_keys(str(file))
    wait(lambda: page.value("#features-1") == "txt_0:1")
    assert (page.value("#prompt"), page.value("#seed")) == ("a large blue square", "7")
    assert (page.value("#features-0"), page.value("#steps-0"), page.value("#strength-1")) == ("img_1:3,5", "2-3", "2.5")
    wait(page.psnr)
    assert not np.array_equal(page.picture("changed"), shown)
    other = tmp_path / "other.yaml"
    other.write_text("prompts: [a]\nedits: ['zero img_1:3000']\n")
    page.element("#load input[type=file], input[type=file]").send_keys(str(other))
    wait(lambda: "has no feature 3000" in page.text("#kept"))
    assert page.value("#prompt") == "a large blue square"


def test_it_reads_well_in_light_and_dark_and_on_a_narrow_screen(page: Explored) -> None:
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        page.reopen()
        ground = page.js("return getComputedStyle(document.body).backgroundColor")
        for selector in ("#head h1", "#head dt", "#feature h3", ".features th", ".features small", "#head a, .brand"):
            colour = page.js("return getComputedStyle(document.querySelector(arguments[0])).color", selector)
            assert contrast(colour, ground) >= 4.5, (scheme, selector, colour, ground)
        assert page.js("return document.body.classList.contains('dark')") == (scheme == "dark")
    page.element("#head .theme").click()
    assert not page.js("return document.body.classList.contains('dark')")
    page.js("localStorage.removeItem('granary theme')")
    for width in (1400, 420):
        page.wide(width)
        for tab in ("Find a feature", "Steer"):
            page.tab(tab)
            wait(lambda: page.js("return document.documentElement.scrollWidth <= innerWidth"))
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.complaints() == []
