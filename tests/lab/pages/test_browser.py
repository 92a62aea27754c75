"""The report in a real browser: it renders, says nothing on the console, and its controls work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compressm.lab.pages import load_runs, write_page

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, the system's or playwright's own."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(load_runs([runs / "cut", runs / "big"]), path, "compressm report <img src=x onerror=alert(1)>")
    return path


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page with all charts of the open sections drawn, and what went to the console."""
    page, said = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else said.append(request.url),
    )
    page.goto(path.as_uri())
    for index in range(page.locator(".chart:visible").count()):
        chart = page.locator(".chart:visible").nth(index)
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
    return page, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_everything_is_drawn_and_nothing_overflows(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    page, said = opened(browser, page_file, width, scheme)
    assert said == []
    assert page.locator(".chart:visible").count() == 9
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [page.locator(".chart:visible").nth(index).bounding_box() for index in range(9)]
    for i, a in enumerate(boxes):
        assert a["x"] >= 0
        assert a["x"] + a["width"] <= width
        for b in boxes[:i]:  # no two cards lie on each other
            apart = a["x"] >= b["x"] + b["width"] or b["x"] >= a["x"] + a["width"]
            assert apart or a["y"] >= b["y"] + b["height"] or b["y"] >= a["y"] + a["height"]
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(int, colour[4:-1].split(","))) > 384 for colour in (ink, paper)]
    assert bright == ([False, True] if scheme == "light" else [True, False])
    assert page.locator("#trouble").is_hidden()
    page.close()


def test_a_printer_sees_every_chart_of_the_open_sections(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 300}, color_scheme="dark")
    page.goto(page_file.as_uri())
    page.wait_for_function("typeof Plotly !== 'undefined'")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    shown = "[...document.querySelectorAll('.chart')].filter(chart => chart.offsetParent)"
    page.wait_for_function(f"{shown}.every(chart => chart.querySelector('.main-svg'))")
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.close()


def test_the_controls_work(browser: Any, page_file: Path) -> None:
    page, said = opened(browser, page_file, 1400)
    chart = page.locator(".chart", has=page.get_by_text("Hankel singular values", exact=True)).first
    label, slider = chart.locator("output"), chart.locator("input[type=range]")
    assert "→" in label.inner_text()  # the first cut, not the first look
    first = chart.locator(".plot").evaluate("plot => plot.data[0].y")
    slider.fill("0")
    assert label.inner_text() == "step 0"
    assert chart.locator(".plot").evaluate("plot => plot.data[0].y") != first
    at_start = chart.locator(".plot").evaluate("plot => plot.data[0].y")
    chart.locator("select").select_option("blocks.1.ssm")
    assert chart.locator(".plot").evaluate("plot => plot.data[0].y") != at_start
    chart.get_by_role("button", name="play").click()
    page.wait_for_function("element => element.value !== '0'", arg=slider.element_handle())
    chart.get_by_role("button", name="stop").click()

    dimension = page.locator(".chart", has=page.get_by_text("State dimension", exact=True)).first
    dimension.locator(".legend button").first.click()
    assert dimension.locator(".plot").evaluate("plot => plot.data.map(trace => trace.visible)") == [False, True]

    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.locator("details.run").nth(1).locator("summary").first.click()
    page.locator("details.run").nth(1).locator(".main-svg").first.wait_for()
    assert said == []
    page.close()
