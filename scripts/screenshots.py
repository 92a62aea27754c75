"""Pictures of README, documentation, a report and notebooks, on a phone and a desktop, light and dark.

    python scripts/screenshots.py --output shots [--report report.html] [--site site] [--notebooks FOLDER]

To look at, not to store. Needs Chromium, and markdown-it-py for the README; notebooks are those that were executed, as
HTML (`jupyter nbconvert --to html`). Of the report there is also a PDF.
"""

from __future__ import annotations

import argparse
import html
import os
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (390, 1400)
SITE_PAGES = ("index", "api", "tutorial", "results", "which-rule")
README_STYLE = """
body { max-width: 980px; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
:root { color-scheme: light dark; }
img { max-width: 100%; } pre { overflow: auto; padding: 1rem; background: #8882; } code { overflow-wrap: anywhere; }
table { display: block; overflow: auto; border-collapse: collapse; }
th, td { border: 1px solid #8886; padding: .4rem .8rem; }
"""


def readme_page(folder: Path) -> Path:
    """The README as HTML, much as a forge shows it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("gfm-like", {"linkify": False}).render((ROOT / "README.md").read_text(encoding="utf-8"))
    page = folder / "readme.html"
    base = html.escape(ROOT.as_uri() + "/")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><base href="{base}">'
    page.write_text(f"<!doctype html>{head}<style>{README_STYLE}</style>{body}", encoding="utf-8")
    return page


def shoot(browser: Any, name: str, page_file: Path, output: Path) -> list[str]:
    """Pictures of one page; returns what is wrong with it: parts that are wider than the screen."""
    wrong: list[str] = []
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto(page_file.as_uri())
            for index in range(page.locator(".chart:visible").count()):  # charts are drawn when they are seen
                page.locator(".chart:visible").nth(index).scroll_into_view_if_needed()
                page.wait_for_timeout(300)
            page.evaluate("window.scrollTo(0, 0)")
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                wrong.append(f"{name} at {width}: {wide} pixels wide")
            page.screenshot(path=output / f"{name}-{width}-{scheme}.png", full_page=True)
            page.close()
    return wrong


def chromium(driver: Any) -> Any:
    """A headless Chromium: the system's, or playwright's own."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    return driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--report", type=Path, help="a page that compressm report wrote")
    parser.add_argument("--site", type=Path, help="what mkdocs build wrote")
    parser.add_argument("--notebooks", type=Path, help="a folder of executed notebooks as HTML")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    pages = {"readme": readme_page(given.output)}
    if given.site:
        places = {name: given.site / ("" if name == "index" else name) / "index.html" for name in SITE_PAGES}
        pages |= {f"docs-{name}": place for name, place in places.items()}
    if given.report:
        pages["report"] = given.report
    if given.notebooks:
        pages |= {path.stem: path for path in sorted(given.notebooks.glob("*.html"))}
    with sync_playwright() as driver:
        browser = chromium(driver)
        wrong = [line for name, path in pages.items() for line in shoot(browser, name, path.resolve(), given.output)]
        if given.report:
            page = browser.new_page()
            page.goto(given.report.resolve().as_uri())
            page.wait_for_function("typeof Plotly !== 'undefined'")
            page.pdf(path=given.output / "report.pdf", format="A4", print_background=True)
        browser.close()
    print("\n".join(wrong) or "nothing is wider than its screen")


if __name__ == "__main__":
    main()
