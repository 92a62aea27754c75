"""How fast a report opens in Chromium: ``python scripts/report_page.py results/ablation-loss --runs 50``.

Seconds from the call to the first paint, to the load event, and until the first chart is drawn, to which the page is
scrolled at once; and the seconds of computing of the page's main thread up to the load event and up to the chart, which
do not count the work of other programs. The best of some openings, each in a new page. Needs playwright and a Chromium
of the system's, or playwright's own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from screenshots import chromium

from compressm.lab.pages import load_runs, write_page

MOMENTS = "first paint", "loaded", "first chart", "computing to load", "computing to chart"
PAINT_AND_LOAD = """() => [
  performance.getEntriesByName("first-contentful-paint")[0].startTime,
  performance.getEntriesByType("navigation")[0].loadEventEnd,
]"""


def opening(browser: Any, page_file: Path) -> list[float]:
    """Seconds to the `MOMENTS` of one opening."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    protocol = page.context.new_cdp_session(page)
    protocol.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(page_file.as_uri())
    computing = [_computing(protocol)]
    page.evaluate("document.querySelector('.chart').scrollIntoView()")
    drawn = page.wait_for_function("document.querySelector('.main-svg') && performance.now()").json_value()
    computing.append(_computing(protocol))
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
    times = [*page.evaluate(PAINT_AND_LOAD), drawn]
    page.close()
    return [*(time / 1000 for time in times), *computing]


def _computing(protocol: Any) -> float:
    metrics = protocol.send("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in metrics if one["name"] == "TaskDuration")


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="what compressm report takes")
    parser.add_argument("--runs", type=int, help="take this many, the first ones again where there are fewer")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    found = load_runs(given.paths)
    runs = [found[number % len(found)] for number in range(given.runs or len(found))]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page_file = Path(folder) / "report.html"
        write_page(runs, page_file)
        browser = chromium(driver)
        best = [min(times) for times in zip(*(opening(browser, page_file) for _ in range(given.repeats)), strict=True)]
        size = page_file.stat().st_size / 1e6
        browser.close()
    told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in zip(MOMENTS, best, strict=True))
    print(f"{len(runs)} runs, {size:.1f} MB: {told}")


if __name__ == "__main__":
    main()
