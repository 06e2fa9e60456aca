"""The report in a real browser: no network, no overflow, readable plots, keyboard, contrast.

Screenshots of every size and scheme are written to build/screenshots/.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import reporting
from conftest import ROOT

from exporter.bundle.bundle import Bundle
from exporter.report.page import report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
SCREENSHOTS = ROOT / "build" / "screenshots"
SIZES = {"phone": (360, 780), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
PAGES = ("bundle", "empty")

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="playwright is not installed"
    ),
    pytest.mark.skipif(not CHROMIUM.exists(), reason="chromium is missing: make tools"),
]

#: Everything that reaches beyond the window, but not inside a box that scrolls.
OVERFLOW = """() => [...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll') && !e.closest('.skip, .unseen'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))
  .concat(document.documentElement.scrollWidth > innerWidth ? ['the page'] : [])"""
#: Plots that are too small, and texts of plots that are too small or cut off by the edge.
PLOTS = """() => [...document.querySelectorAll('svg.plot')].flatMap(svg => {
  const box = svg.getBoundingClientRect(), name = svg.querySelector('title').textContent;
  const scale = box.width / svg.viewBox.baseVal.width;
  const bad = box.width < 240 || box.height < 75 ? [name + ': its size'] : [];
  for (const text of svg.querySelectorAll('text')) {
    const place = text.getBoundingClientRect();
    if (parseFloat(getComputedStyle(text).fontSize) * scale < 10)
      bad.push(name + ': small: ' + text.textContent);
    if (place.left < box.left - 2 || place.right > box.right + 2
        || place.top < box.top - 2 || place.bottom > box.bottom + 2)
      bad.push(name + ': cut off: ' + text.textContent);
  }
  return bad;
})"""
#: The element with the focus: its place among all elements, its outline, and what it says.
FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
  return {
    place: [...document.querySelectorAll('*')].indexOf(e), body: e === document.body,
    outline: style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth),
    seen: box.right > 0 && box.bottom > 0 && box.width > 0,
    text: (e.textContent || e.getAttribute('aria-label') || '').trim().slice(0, 60),
  };
}"""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=root)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def written(finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two reports: one with every kind of measurement, one without any."""
    folder = tmp_path_factory.mktemp("reports")
    results = reporting.measurements(finished_bundle.path, folder / "results")
    (folder / "bundle.html").write_text(report([finished_bundle.path], results))
    (folder / "empty.html").write_text(report([finished_bundle.path]))
    return folder


def opened(browser: "Browser", path: Path, size: str, scheme: Any) -> "tuple[Page, list[str]]":
    """A page, and the list of what it must not do: requests, messages, errors."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    problems = list[str]()
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("request", lambda request: problems.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    problems.remove(f"request: {path.as_uri()}")
    return page, problems


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_stays_silent(
    name: str, size: str, scheme: str, browser: "Browser", written: Path
) -> None:
    page, problems = opened(browser, written / f"{name}.html", size, scheme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}-{size}-{scheme}.png", full_page=True)
    assert page.evaluate(OVERFLOW) == []
    assert page.evaluate(PLOTS) == []
    assert page.locator("svg.plot").count() == {"bundle": 32, "empty": 1}[name]
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(OVERFLOW) == []
    assert problems == []
    page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_page_follows_the_scheme_of_the_reader(
    scheme: str, browser: "Browser", written: Path
) -> None:
    page, _ = opened(browser, written / "bundle.html", "phone", scheme)
    colours = page.evaluate(
        "() => [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('svg.plot text')).fill]"
    )
    light, dark = "rgb(255, 255, 255)", "rgb(22, 32, 43)"
    assert (colours == [light, dark]) == (scheme == "light")
    page.close()


@pytest.mark.parametrize(
    ("name", "scheme"), [("bundle", "light"), ("bundle", "dark"), ("empty", "dark")]
)
def test_axe_finds_no_barrier(name: str, scheme: str, browser: "Browser", written: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, _ = opened(browser, written / f"{name}.html", "desktop", scheme)
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    found = axe.Axe().run(page).response["violations"]
    nodes = [(one["id"], node["html"][:120]) for one in found for node in one["nodes"]]
    assert nodes == []
    page.close()


def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(
    browser: "Browser", written: Path
) -> None:
    page, _ = opened(browser, written / "bundle.html", "phone", "light")
    places = list[int]()
    page.keyboard.press("Tab")
    while not (focus := page.evaluate(FOCUSED))["body"]:
        assert focus["seen"] and focus["outline"] >= 2, focus
        places.append(focus["place"])
        page.keyboard.press("Tab")
    assert places == sorted(set(places))
    reachable = "a[href]:visible, summary:visible, [tabindex='0']:visible"
    assert len(places) == page.locator(reachable).count() > 40
    page.close()


def test_the_first_step_of_the_keyboard_skips_to_the_content(
    browser: "Browser", written: Path
) -> None:
    page, _ = opened(browser, written / "bundle.html", "desktop", "light")
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED)["text"] == "Skip to the report"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.closest('main') !== null")
    page.close()


def test_a_printed_page_has_no_navigation(browser: "Browser", written: Path) -> None:
    page, _ = opened(browser, written / "empty.html", "desktop", "light")
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.locator("h1").is_visible()
    page.close()


def test_a_broken_page_is_reported(browser: "Browser", tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text(
        "<!doctype html><img src='http://127.0.0.1:9/x.png'><script>console.log('here')</script>"
        "<div style='width:2000px'>wide</div><svg class='plot' width='100' height='50' "
        "viewBox='0 0 400 200'><title>small</title><text x='390' y='50'>beyond</text></svg>"
    )
    page, problems = opened(browser, path, "phone", "light")
    assert any(one.startswith("request: http://127.0.0.1:9") for one in problems)
    assert "console: here" in problems
    assert "the page" in page.evaluate(OVERFLOW)
    assert {one.split(": ")[1] for one in page.evaluate(PLOTS)} == {"its size", "small", "cut off"}
    page.close()
