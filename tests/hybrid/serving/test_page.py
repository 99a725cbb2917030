"""The page, in a real browser: with the keyboard alone, in light and dark, at the width of a phone.

Where no Chromium is found, these are skipped by name. HYBRID_SCREENSHOTS names a folder for pictures of it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hybrid.serving.conftest import Served

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        own = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if own is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: `playwright install chromium`, or the system's package")
        chromium = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page of a server, in a browser that refuses to ask any other host, and notes what goes wrong."""
    context = browser.new_context()
    yield from _opened(context, served)


def _opened(context: Any, served: Served) -> Iterator[Any]:
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(served.url)
    sync_api.expect(page.locator("#model")).to_contain_text("toy, up to 16,384 tokens")
    yield page
    context.close()
    assert all(url.startswith((served.url, "data:")) for url in asked)
    assert not [text for text in wrong if "400" not in text], wrong


def _picture(page: Any, name: str) -> None:
    if folder := os.environ.get("HYBRID_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def _generate(page: Any, tokens: int = 30) -> None:
    if not page.locator("#max_tokens").is_visible():  # on a phone the settings are closed at first
        page.click("summary")
    page.fill("#prompt", "def ")
    page.fill("#max_tokens", str(tokens))
    page.fill("#seed", "3")
    page.click("#go")
    sync_api.expect(page.locator("#speed")).to_contain_text("as many as asked for", timeout=30_000)


def test_text_comes_with_probabilities_and_speed(page: Any) -> None:
    _generate(page)
    assert page.locator("#output").text_content().startswith("def ")
    sync_api.expect(page.locator("#speed")).to_contain_text("30 tokens, ")
    sync_api.expect(page.locator("#speed")).to_contain_text("tokens/s")
    page.locator("#output .t").nth(3).hover()
    sync_api.expect(page.locator("#token .own")).to_contain_text("%")
    assert page.locator("#token .row").count() in (5, 6)  # the five likeliest, and the chosen one if it is none of them
    _picture(page, "light")


def test_the_same_seed_gives_the_same_text(page: Any) -> None:
    _generate(page)
    first = page.locator("#output").text_content()
    page.click("#clear")
    assert page.locator("#output").text_content() == ""
    _generate(page)
    assert page.locator("#output").text_content() == first


def _without_end(page: Any) -> None:
    """Let texts run on to their last token: random weights end one whenever they like."""

    def endless(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

    page.route("**/v1/completions", endless)


def test_everything_can_be_done_with_the_keyboard(page: Any, served: Served) -> None:
    _without_end(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("class ")
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "go", "clear", "output"} <= reached
    page.focus("#max_tokens")
    page.keyboard.press("Control+A")
    page.keyboard.type("16000")
    page.keyboard.press("Control+Enter")
    sync_api.expect(page.locator("#stop_button")).to_be_enabled()
    sync_api.expect(page.locator("#output .t").nth(3)).to_be_attached()
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#speed")).to_contain_text("stopped")
    assert served.idle()
    page.focus("#output")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator("#token b").first).to_contain_text("%")


def test_the_stop_button_frees_the_slot(page: Any, served: Served) -> None:
    _without_end(page)
    page.fill("#max_tokens", "16000")
    page.click("#go")
    sync_api.expect(page.locator("#output .t").nth(3)).to_be_attached()
    page.click("#stop_button")
    sync_api.expect(page.locator("#speed")).to_contain_text("stopped")
    assert served.idle()


def test_a_text_that_breaks_off_is_shown_as_failed(page: Any) -> None:
    piece = {"choices": [{"index": 0, "text": "x", "logprobs": None, "finish_reason": None}]}
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(piece)}\n\n"),
    )
    page.click("#go")
    sync_api.expect(page.locator("#speed")).to_contain_text("failed")
    sync_api.expect(page.locator("#error")).to_have_text("the server ended the text before it was finished")


def test_tokens_are_asked_for_as_a_short_model_has_positions(browser: Any, served: Served) -> None:
    context = browser.new_context()
    page = context.new_page()
    entry = {"data": [{"id": "toy", "max_length": 64}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=entry))
    page.goto(served.url)
    sync_api.expect(page.locator("#max_tokens")).to_have_value("32")
    context.close()


def test_a_refusal_is_shown(page: Any) -> None:
    page.fill("#max_tokens", "16384")
    page.fill("#prompt", "much too long for these tokens")
    page.click("#go")
    sync_api.expect(page.locator("#error")).to_contain_text("together they may be 16384")
    page.click("#clear")
    sync_api.expect(page.locator("#error")).to_be_hidden()


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("dark", 1200, "dark"), ("phone", 360, "light"), ("phone-dark", 360, "dark")]
)
def test_it_fits_a_phone_and_has_contrast_in_light_and_dark(
    browser: Any, served: Served, name: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    for page in _opened(context, served):
        _generate(page, 120)
        page.locator("#output .t").nth(5).hover()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(_CONTRAST) >= 4.5  # WCAG 2.2, level AA, for text
        heights = page.evaluate("[...document.querySelectorAll('button')].map(b => b.offsetHeight)")
        assert min(heights) >= 44  # a finger's width
        _picture(page, name)


_CONTRAST = """() => {
  const luminance = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return /, 0\\)$/.test(color) && element.parentElement ? ground(element.parentElement) : color;
  };
  const kinds = 'h1, h2, label, p:not([hidden]), button:enabled, .prompt, summary, input, textarea';
  const texts = document.querySelectorAll(kinds);
  return Math.min(...[...texts].map((element) => {
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort();
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}"""
