"""Debian's Chromium, driven by selenium, for the tests of pages: it loads nothing from the network."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "window-size=1400,1000", "disable-dev-shm-usage",
)  # fmt: skip


def chromium(downloads: Path | None = None) -> Iterator[Any]:
    """A browser, closed at the end; the test is skipped where there is none, except in CI."""
    if not (CHROMIUM and DRIVER) and "CI" not in os.environ:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or "chromium"
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    if downloads is not None:
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    yield driver
    driver.quit()


def wait(what: Callable[[], Any], seconds: float = 15.0) -> Any:
    """What `what` returns as soon as it is true; fails when it never is.

    A script may fail meanwhile, at an element that the page has not made yet; one that still does at the end is raised.
    """
    from selenium.common.exceptions import JavascriptException

    until = time.monotonic() + seconds
    while True:
        try:
            found = what()
        except JavascriptException:
            if time.monotonic() >= until:
                raise
            found = None
        if found:
            return found
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


class Page:
    """A page of ours seen through a browser, at an address below which its files lie."""

    def __init__(self, browser: Any, address: str, folder: Path) -> None:
        self.browser, self.address, self.folder = browser, address, folder

    def open(self, place: str = "") -> float:
        """Open a view afresh, as somebody does who was sent the link; seconds until it is there."""
        self.browser.get("about:blank")
        started = time.monotonic()
        self.browser.get(self.address + place)
        wait(self.is_there)
        return time.monotonic() - started

    def is_there(self) -> bool:
        """Whether everything is shown."""
        return bool(self.js("return document.documentElement.dataset.ready") == "yes")

    def js(self, script: str, *values: Any) -> Any:
        """What a script returns."""
        return self.browser.execute_script(script, *values)

    def press(self, keys: str) -> None:
        """Type, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(keys).perform()


READING_PIXELS = "Multiple readback operations using getImageData"
"""said of canvases whose pixels these tests read (no page does), whichever page is open by then"""


def complaints(browser: Any) -> list[dict[str, Any]]:
    """What the console says that is not mere information, since it was last asked."""
    entries = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    return [entry for entry in entries if READING_PIXELS not in entry["message"]]


def contrast(a: str, b: str) -> float:
    """The contrast of two colours `rgb(r, g, b)` by WCAG."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
