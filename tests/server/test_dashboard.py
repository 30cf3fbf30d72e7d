"""The dashboard in a real browser, against a real server with three workers."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowspec.cli.demo import DEMO_PROMPT
from server_process import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("FLOWSPEC_SCREENSHOTS")  # a directory; docs/dashboard.png was made with it
PROMPT = DEMO_PROMPT
TIMEOUT_MS = 30_000

if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("no chromium here; `make test` installs it where it may", allow_module_level=True)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--stages", "3") as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "continuous integration needs chromium; see the Makefile"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def problems() -> list[str]:
    return []


def open_page(browser: Browser, server: ServerProcess, problems: list[str], **options: Any) -> Page:
    page = browser.new_page(**options)
    page.set_default_timeout(TIMEOUT_MS)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url) if server.url not in request.url else None)
    page.goto(server.url)
    page.wait_for_selector('[data-testid="lane-3"]')
    return page


def number_of(page: Page, test_id: str, attribute: str) -> int:
    return int(page.get_by_test_id(test_id).get_attribute(attribute) or 0)


def wait_until(page: Page, what: str, is_true: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not is_true():
        assert time.monotonic() < deadline, f"it never came to be that {what}"
        page.wait_for_timeout(50)


def test_a_prompt_streams_while_every_lane_and_the_tree_move(
    browser: Browser, server: ServerProcess, problems: list[str]
) -> None:
    page = open_page(browser, server, problems, viewport={"width": 1280, "height": 1000})
    page.get_by_test_id("prompt").fill(PROMPT)
    # Sampled text may end at once; for a picture it looks better.
    page.get_by_label("Temperature").fill("0.8" if SCREENSHOTS else "0")
    page.get_by_label("Max").fill("400")
    page.get_by_test_id("send").click()
    lengths: list[int] = []

    def text() -> str:
        return page.get_by_test_id("conversation").inner_text()

    most_nodes, most_bars = 0, [0] * 4

    def has_all() -> bool:
        nonlocal most_nodes
        lengths.append(len(text()))
        most_nodes = max(most_nodes, number_of(page, "tree", "data-nodes"))
        for lane in range(4):
            most_bars[lane] = max(most_bars[lane], number_of(page, f"lane-{lane}", "data-bars"))
        return most_nodes > 5 and min(most_bars) > 5 and len(set(lengths)) > 4

    wait_until(page, "text streams, and bars are in every lane and nodes in the tree", has_all)
    if SCREENSHOTS:
        page.get_by_text("2 s", exact=True).click()
        page.wait_for_timeout(2000)
        page.screenshot(path=str(Path(SCREENSHOTS) / "dashboard.png"))
    wait_until(page, "the answer ends", lambda: re.search(r"tokens/s", text()) is not None)
    assert float(re.findall(r"[\d.]+", page.get_by_test_id("tokens-per-s").inner_text())[0]) >= 0
    assert len(text()) > len(PROMPT) + 400
    assert page.get_by_test_id("requests").inner_text().count("cmpl-") >= 1
    assert not problems
    page.close()


def test_stop_ends_a_request_at_the_server(browser: Browser, server: ServerProcess, problems: list[str]) -> None:
    page = open_page(browser, server, problems)
    page.get_by_test_id("prompt").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    wait_until(page, "text comes", lambda: len(page.get_by_test_id("conversation").inner_text()) > len(PROMPT) + 20)
    page.keyboard.press("Escape")
    wait_until(page, "it is cancelled", lambda: "cancelled" in page.get_by_test_id("requests").inner_text())
    assert not problems
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Browser, server: ServerProcess, problems: list[str], scheme: Any
) -> None:
    page = open_page(browser, server, problems, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", background)[:3])
    assert (brightness > 380) == (scheme == "light")
    page.close()
    assert not problems


def test_the_page_can_be_used_by_keyboard_alone(browser: Browser, server: ServerProcess, problems: list[str]) -> None:
    page = open_page(browser, server, problems)
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement?.dataset?.testid || document.activeElement?.id || ''"))
        if seen[-1] == "prompt":
            break
    assert seen[-1] == "prompt", seen
    page.keyboard.type("x = 1\n")
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "focus is not visible"
    page.close()
    assert not problems
