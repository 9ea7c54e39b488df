"""The web page in a headless Chromium: pointing, keyboard, search, colours, widths, and no script at all."""

import shutil
from pathlib import Path

import pytest

from memlm.analysis.memory_page import generate_memory_report
from tests.analysis.test_page import DATA, TOKENIZER
from tests.experiments.tiny import tiny

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
pytestmark = pytest.mark.browser

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, _NAMES)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip(f"there is no Chromium here: none of {', '.join(_NAMES)} is on the path, nor playwright's own")
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    generate_memory_report(tiny(TOKENIZER, "ltm", "stm"), DATA, path=path)
    return path.as_uri()


def opened(browser, url, **options):
    """The page; what goes wrong in it, and what it asks of a server, fails the test."""
    page = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | options)).new_page()
    page.set_default_timeout(20_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("request", lambda request: wrong.append(request.url) if request.url not in (url,) and not
            request.url.startswith("data:") else None)  # fmt: skip
    page.goto(url)
    return page, wrong


def cards(page):
    return page.locator(".card:visible").all_inner_texts()


def test_pointing_at_a_token_tells_what_it_read_and_marks_where_it_comes_from(browser, url):
    page, wrong = opened(browser, url)
    tokens = page.locator(".token")
    last = tokens.nth(tokens.count() - 1)
    assert cards(page) == []
    last.hover()
    (card,) = cards(page)
    assert "(ltm/1)" in card
    assert "written by segment" in card
    places = set(last.get_attribute("data-from").split())
    assert places
    assert {token.get_attribute("data-index") for token in page.locator(".token.source").all()} == places
    page.mouse.move(1, 1)
    assert cards(page) == []
    assert page.locator(".token.source").count() == 0
    assert not wrong


def test_the_keyboard_does_the_same(browser, url):
    page, wrong = opened(browser, url)
    page.locator("#c1-3").scroll_into_view_if_needed()
    first = page.locator(".token").first
    first.focus()
    for key, index in (("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("End", None), ("Home", "0")):
        page.keyboard.press(key)
        where = page.evaluate("document.activeElement.dataset.index")
        assert where == (index or page.locator(".token").last.get_attribute("data-index"))
        (card,) = cards(page)
        assert f"Token {where}," in card
    assert page.locator(".token[tabindex='0']").count() == 1  # one stop on the way through the page
    page.keyboard.press("Escape")
    assert cards(page) == []
    assert not wrong


def test_slots_are_searched_and_sorted(browser, url):
    page, wrong = opened(browser, url)
    rows = page.locator(".sortable tbody tr")
    n, search = rows.count(), page.locator("input[type=search]")
    search.fill("ltm W33")
    shown = [row.inner_text() for row in rows.all() if row.is_visible()]
    assert 0 < len(shown) < n
    assert all("ltm" in row and "w33" in row for row in shown)
    assert page.locator("output").inner_text() == f"{len(shown)} of {n} rows"
    search.fill("")
    assert sum(row.is_visible() for row in rows.all()) == n
    for order in (True, False):  # the largest first, then the least
        page.get_by_role("button", name="slot", exact=True).click()
        slots = [int(text) for text in page.locator(".sortable tbody tr td:nth-child(2)").all_inner_texts()]
        assert slots == sorted(slots, reverse=order)
    assert not wrong


@pytest.mark.parametrize("width", [380, 1400])
def test_light_and_dark_wide_and_narrow(browser, url, width):
    grounds = {}
    for scheme in ("light", "dark"):
        page, wrong = opened(browser, url, color_scheme=scheme, viewport={"width": width, "height": 700})
        grounds[scheme], ink = page.evaluate(
            "(s => [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 3))"
            "(getComputedStyle(document.body))"
        )
        assert abs(grounds[scheme] - ink) > 150
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        token = page.locator(".token").last
        color = "getComputedStyle(document.querySelectorAll('.token')[%d]).backgroundColor"
        n = page.locator(".token").count()
        strongest = page.evaluate(color % (n - 1))
        page.get_by_text("what it changed in the prediction").click()
        assert page.evaluate(color % (n - 1)) != strongest  # the end of a context predicts nothing
        token.hover()
        box = page.locator(".card:visible").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= 701
        assert not wrong
    assert grounds["light"] > 200 > 60 > grounds["dark"]


def test_without_script_all_is_there(browser, url):
    page, _ = opened(browser, url, java_script_enabled=False)
    token = page.locator(".token").last
    token.hover()
    (card,) = cards(page)
    assert "(ltm/1)" in card
    assert not page.locator("input[type=search]").is_visible()
    assert page.locator(".sortable tbody tr").last.is_visible()
