"""`python -m bench.report`: the report of 49,152 features and 10,000 images, built and opened; figures, no comparison.

Random feature tables over a planted store of 64 tokens an image (`tests.synthetic_analysis`).  Printed: what `--plan` foretold,
seconds, bytes, files and peak memory of the build; then, in headless Chromium from `file://`, the time from the address to each view,
and of a search and a sort in all 196,608 rows.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analyze.report import building as report
from analyze.report.building import Report
from analyze.report.planning import Plan as ReportPlan
from analyze.report.settings import ReportSettings
from tests.analyze_planted import Plan
from tests.chromium import chromium, wait
from tests.synthetic_analysis import synthetic_analysis

READY = "return document.documentElement.dataset.ready"
COUNT = "return document.getElementById('count').textContent"
VIEWS = {"overview": "", "table": "#/features?alive=all", "feature": "#/feature/img_0/2/40000"}

FIRST_ROW = "return document.querySelector('#table tr[data-number]')?.innerText"
SORT = "document.querySelector('.dt-scroll-head th.c-max').click()"
SEARCH = """
    const field = document.querySelector('#filters [name=q]');
    field.value = 'circle';
    field.dispatchEvent(new Event('input', {bubbles: true}));
"""


def main() -> None:
    """Build it below a temporary folder, or below `--folder`, where it stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=49_152)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--similar", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        plan = Plan(
            n_images=asked.images,
            steps=asked.steps,
            grid=(8, 8),
            d_model=16,
            sites=("img_0",),
            chunk_images=256,
            truth=False,
        )
        inputs = synthetic_analysis(folder, plan, asked.features, coherent=True)
        measure(ReportSettings(**inputs, similar=asked.similar))


def measure(settings: ReportSettings) -> None:
    """Build, open, search, sort, and print how long each takes."""
    foretold = report.run(ReportSettings(**{**vars(settings), "plan": True}))
    assert isinstance(foretold, ReportPlan)
    started = time.monotonic()
    made = report.run(settings)
    seconds = time.monotonic() - started
    assert isinstance(made, Report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"built in {seconds:.1f} s (plan: {foretold.seconds:.0f} s), peak {peak:,.0f} MiB")
    print(
        f"{made.files:,} files, {made.bytes / 1e6:.1f} MB (plan: {foretold.files:,} files, {foretold.total / 1e6:.1f} MB)"
    )
    for browser in chromium():
        look_at(browser, made.index.as_uri())


def look_at(browser: Any, index: str) -> None:
    """Open the views, search and sort, and print the times."""
    for name, place in VIEWS.items():
        times = sorted(opened(browser, index + place) for _ in range(3))
        print(f"{name}: {times[0]:.2f} s at best, {times[-1]:.2f} s at worst of 3")
    opened(browser, index + VIEWS["table"])
    rows = browser.execute_script(COUNT)
    seconds = took(browser, SEARCH, lambda: browser.execute_script(COUNT) != rows)
    print(f"search in {rows.split(' of ')[0]} rows: {seconds:.2f} s")
    opened(browser, index + VIEWS["table"])
    top = browser.execute_script(FIRST_ROW)
    seconds = took(browser, SORT, lambda: browser.execute_script(FIRST_ROW) not in (None, top))
    print(f"sort: {seconds:.2f} s")


def opened(browser: Any, address: str) -> float:
    """Seconds from an address to its view."""
    browser.get("about:blank")
    started = time.monotonic()
    browser.get(address)
    wait(lambda: browser.execute_script(READY) == "yes", 60)
    return time.monotonic() - started


def took(browser: Any, script: str, done: Callable[[], bool]) -> float:
    """Seconds until what a script asks for is there."""
    started = time.monotonic()
    browser.execute_script(script)
    wait(done, 60)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
