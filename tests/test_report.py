"""The report opens from disk in a browser without a console error, and its bytes depend on nothing but its results."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

import tests.analyze_planted as planted
from analyze.report import building as report
from analyze.report.building import Report
from analyze.report.settings import ReportSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.truth import judging as truth
from analyze.truth.settings import TruthSettings
from tests.analyze_planted import Plan, planted_dictionaries, planted_store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
METRICS: dict[str, Any] = {
    "fvu": 0.08, "l0": 3.1, "density": 0.065, "dead": 0.02, "cosine": 0.97, "rows": 900,
    "steps": {"0": {"fvu": 0.08}}, "pack": "sha256-x", "split": "val",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A report and the settings that made it."""

    report: Report
    settings: ReportSettings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    plan = Plan(n_images=120, noise=0.8, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "METRICS", METRICS)
        planted_store(folder / "store", plan)
        planted_dictionaries(folder / "dictionaries", plan)
    inputs = {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / "out"}
    scores.run(ScoresSettings(**inputs))
    truth.run(TruthSettings(**inputs, images="all"))
    settings = ReportSettings(**inputs, best=3, top=3, title="What <b>planted</b> features see")
    return Made(report.run(settings), settings)


def test_the_report_says_what_was_run_and_escapes_what_it_is_given(made: Made) -> None:
    page = made.report.index.read_text()
    assert "What &lt;b&gt;planted&lt;/b&gt; features see" in page
    assert "120 of 72 × 48 pixels, 6 × 9 image tokens" in page
    assert "0.080" in page  # FVU of the dictionaries
    assert re.search(r"img: \d+ of \d+ attributes have a feature", page)


def test_every_link_and_picture_of_the_report_is_there(made: Made) -> None:
    page = made.report.index.read_text()
    anchors = set(re.findall(r'id="([^"]+)"', page))
    targets = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(targets) > 40
    for target in targets:
        assert not re.match(r"(https?:)?//", target), target
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("data:"):
            assert (made.report.index.parent / target).is_file(), target


def test_pictures_have_words_for_those_who_do_not_see_them(made: Made) -> None:
    for tag in re.findall(r"<img [^>]+>", made.report.index.read_text()):
        assert re.search(r'alt="The \d+ images on which feature', tag)
        assert 'loading="lazy"' in tag


def test_the_report_is_the_same_bytes_again(made: Made) -> None:
    folder = made.report.index.parent
    first = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    report.run(made.settings)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == first


def test_a_report_of_fewer_features_leaves_no_pictures_of_the_other_behind(made: Made) -> None:
    folder = made.report.index.parent
    first = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    other = folder / "pictures" / "img_0" / "step0-feature1-for-my-talk.webp"
    other.write_bytes(b"not the report's")
    table = folder.parent / "truth.json"  # every feature that it names is shown; without it --best alone decides
    table.rename(folder.parent / "aside")
    report.run(replace(made.settings, best=2))
    report.run(replace(made.settings, best=1))
    (folder.parent / "aside").rename(table)
    shown = set(re.findall(r'src="(pictures/[^"]+)"', made.report.index.read_text()))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.webp") if path != other} == shown
    assert len(shown) == 1
    other.unlink()
    report.run(made.settings)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == first


def test_the_five_findings_are_sentences_with_their_numbers(made: Made) -> None:
    assert len(made.report.findings) == 5
    for finding in made.report.findings:
        assert re.match(r"(img|txt)_0 feature \d+ at step \d+ fires on .+: AUROC [01]\.\d\d over images", finding), (
            finding
        )
    assert any("object tokens" in finding for finding in made.report.findings)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by selenium, that loads nothing from the network."""
    if not (CHROMIUM and DRIVER) and "CI" not in os.environ:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or "chromium"
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1400,1800", "disable-dev-shm-usage",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def shown(browser: Any) -> list[str]:
    """The cards that can be seen."""
    cards = "[...document.querySelectorAll('article.card')]"
    return list(browser.execute_script(f"return {cards}.filter(c => c.checkVisibility()).map(c => c.id)"))


@pytest.mark.browser
def test_the_report_works_from_disk_without_a_console_error(made: Made, browser: Any) -> None:
    browser.get(made.report.index.as_uri())
    everything = shown(browser)
    assert len(everything) >= 6
    browser.execute_script("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    broken = "return Promise.all([...document.images].map(i => i.decode().then(() => 0, () => 1))).then(a => a.reduce((x, y) => x + y, 0))"
    assert browser.execute_script(broken) == 0

    find = browser.find_element("css selector", "input[name=find]")
    browser.find_element("tag name", "body").send_keys("/")
    assert browser.switch_to.active_element == find
    find.send_keys("red")
    assert 0 < len(shown(browser)) < len(everything)
    find.send_keys(" nothing of the kind")
    assert shown(browser) == []
    assert browser.find_element("id", "nothing").is_displayed()

    link = next(a for a in browser.find_elements("css selector", ".findings a"))
    browser.execute_script("arguments[0].click()", link)  # leads to a card that the filter hides
    target = browser.execute_script("return location.hash.slice(1)")
    assert target in shown(browser)

    browser.execute_script("document.querySelector('input[name=stream][value=txt]').click()")
    assert shown(browser)
    assert all(card.startswith("txt_0") for card in shown(browser))
    browser.execute_script(
        "const o = document.querySelector('select[name=order]'); o.value = 'share';"
        "o.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    cards = "[...document.querySelectorAll('article.card.txt')]"
    shares = browser.execute_script(f"return {cards}.map(c => Number(c.dataset.share))")
    assert shares == sorted(shares, reverse=True)

    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) <= 0
    messages = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert messages == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them_in_light_and_dark(made: Made, browser: Any, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(made.report.index.as_uri())
    paper, card, wash, *inks = browser.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return ['paper', 'card', 'wash', 'ink', 'soft', 'accent', 'good', 'weak']"
        ".map(n => s.getPropertyValue('--' + n).trim())"
    )
    for ink in inks:
        for ground in (paper, card, wash):
            assert contrast(ink, ground) >= (3.0 if ink == inks[-1] else 4.5), (scheme, ink, ground)


def contrast(a: str, b: str) -> float:
    """The contrast of two #rrggbb colours by WCAG."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
