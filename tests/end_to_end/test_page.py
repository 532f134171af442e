"""The page in a real browser, over a real server with the fake backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, ViewportSize, expect, sync_playwright

from tests.end_to_end.server_process import PATIENCE_S, ServerProcess, eventually, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHAT = "**/v1/chat/completions"
XSS = '<img src=x onerror="alert(1)"><script>alert(2)</script>&lt;b&gt;'
NARROW: ViewportSize = {"width": 360, "height": 640}

expect.set_options(timeout=PATIENCE_S * 1e3)

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, FAKE_STEP_MS=10, PAGE_TOKEN_BUDGET=8192, MODEL_ALIAS="small") as found:
        found.ready()
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(server: ServerProcess, browser: Browser) -> Iterator[Open]:
    """Opens the page in a context of its own. Nothing may be complained about, nothing may be
    asked of anybody else.
    """
    complaints: list[str] = []
    contexts = []

    def open_it(path: str = "/", **context: Any) -> Page:
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
        page.on(
            "console",
            lambda said: (
                complaints.append(said.text) if said.type in ("error", "warning") else None
            ),
        )
        page.on(
            "request",
            lambda asked: (
                None if asked.url.startswith(server.url) else complaints.append(asked.url)
            ),
        )
        page.goto(server.url + path)
        expect(page.locator("#model")).to_have_text("small")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page: Page, text: str, max_tokens: int = 30) -> None:
    page.fill("#max_tokens", str(max_tokens))
    page.fill("#message", text)
    page.press("#message", "Enter")


def running(server: ServerProcess) -> int:
    found: int = httpx.get(f"{server.url}/stats").json()["running"]
    return found


def stream_of(*deltas: dict[str, str]) -> str:
    """What a server sends whose answer is these."""
    chunks: list[Any] = [
        {"choices": [{"index": 0, "delta": each, "finish_reason": None}]} for each in deltas
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(each)}\n\n" for each in chunks) + "data: [DONE]\n\n"


def answering(body: str, status: int = 200, **headers: str) -> Callable[[Route], None]:
    kind = "text/event-stream" if status == 200 else "application/json"
    return lambda route: route.fulfill(
        status=status, body=body, content_type=kind, headers={"Content-Type": kind, **headers}
    )


def without_end(route: Route) -> None:
    """Let the server answer, to the full length."""
    route.continue_(post_data={**json.loads(route.request.post_data or ""), "ignore_eos": True})


def test_a_message_is_answered_token_by_token(open_page: Open) -> None:
    page = open_page()
    page.route(CHAT, without_end)
    page.evaluate(
        "() => { window.lengths = new Set(); new MutationObserver(() => {"
        " const said = document.querySelector('.turn.answer .text');"
        " if (said) window.lengths.add(said.textContent.length); })"
        ".observe(document.getElementById('transcript'),"
        " { subtree: true, childList: true, characterData: true }); }"
    )
    ask(page, "hello", max_tokens=40)
    expect(page.locator(".turn.user .text")).to_have_text("hello")
    expect(page.locator(".turn.answer .note")).to_contain_text("40 tokens")
    expect(page.locator(".turn.answer")).to_have_attribute("aria-busy", "false")
    assert page.evaluate("() => window.lengths.size") > 5
    ask(page, "and again")
    expect(page.locator(".turn.answer .note")).to_have_count(2)
    first = page.locator(".turn.answer .text").first.inner_text()
    assert json.dumps(first)[1:-1] in page.locator("#curl").inner_text()
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_is_stopped_here_and_on_the_server(
    open_page: Open, server: ServerProcess, how: str
) -> None:
    page = open_page()
    page.route(CHAT, without_end)
    ask(page, "a long story", max_tokens=4000)
    expect(page.locator(".turn.answer > .text")).not_to_be_empty()
    assert running(server) == 1
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".turn.answer .note")).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    eventually(lambda: running(server) == 0, "the end of the request")


def test_the_live_view_shows_what_goes_on(open_page: Open, server: ServerProcess) -> None:
    page = open_page("/#live")
    expect(page.locator("#running")).to_have_text("0")
    body = {"prompt": "x" * 400, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
        assert stream.status_code == 200
        expect(page.locator("#running")).to_have_text("1")
        expect(page.locator("#pages .used").first).to_be_visible()
        expect(page.locator("#rate")).not_to_have_text("0")
        expect(page.locator("#engines tr")).to_have_count(1)
        expect(page.locator("#latency")).not_to_contain_text("–" * 12)
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#pages .cached").first).to_be_visible()


def test_the_live_view_asks_only_while_it_is_seen(open_page: Open) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    ask(page, "hello", max_tokens=4)
    expect(page.locator(".note")).to_have_count(1)
    assert not [url for url in asked if url.endswith("/stats")]
    page.click("nav a[href='#live']")
    expect(page.locator("#facts")).to_contain_text("ready")
    assert [url for url in asked if url.endswith("/stats")]


def test_all_of_it_works_by_keyboard(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("one line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user .text")).to_have_text("one line\nand another")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".turn.answer .note")).to_have_count(1)
    order = []
    for _ in range(11):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        order.append(focused.get_attribute("id"))
        style = "each => getComputedStyle(each).outlineStyle"
        assert focused.evaluate(style) == "solid", order
    fields = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed", "key"]
    assert order == ["clear", "send", *fields, "copy", "curl"]


@pytest.mark.parametrize("system", ["light", "dark"])
def test_colours_are_the_systems_until_the_switch_says_otherwise(
    open_page: Open, system: str
) -> None:
    page = open_page(color_scheme=system)

    def brightness() -> int:
        script = "() => getComputedStyle(document.documentElement).backgroundColor"
        return int(page.evaluate(script).split("(")[1].split(",")[0])

    def is_dark() -> bool:
        return brightness() < 128

    assert is_dark() == (system == "dark")
    page.click("#theme")
    assert is_dark() == (system == "light")
    page.reload()
    expect(page.locator("#model")).to_have_text("small")
    assert is_dark() == (system == "light")


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page: Open) -> None:
    page = open_page(viewport=NARROW)
    width = "() => Math.max(...[...document.querySelectorAll('html, body, main, .transcript')]"
    width += ".filter((each) => each.clientWidth).map((each) => each.scrollWidth))"
    page.click("#side summary")
    expect(page.locator("#temperature")).to_be_visible()
    ask(page, "a_word_without_an_end_" * 20)
    expect(page.locator(".turn.answer .note")).to_have_count(1)
    assert page.evaluate(width) <= NARROW["width"]
    page.goto(page.url.split("#")[0] + "#live")
    expect(page.locator("#engines tr")).to_have_count(1)
    assert page.evaluate(width) <= NARROW["width"]


def test_text_stays_text_whoever_says_it(open_page: Open) -> None:
    page = open_page()
    page.route(CHAT, answering(stream_of({"reasoning_content": XSS}, {"content": XSS})))
    ask(page, XSS)
    expect(page.locator(".turn.answer .note")).to_have_count(1)
    expect(page.locator(".turn.user .text")).to_have_text(XSS)
    expect(page.locator(".turn.answer > .text")).to_have_text(XSS)
    expect(page.locator(".thoughts .text")).to_have_text(XSS)
    assert json.dumps(XSS)[1:-1] in page.locator("#curl").inner_text()
    assert page.locator("#playground img, #playground script").count() == 0


def test_thoughts_stand_apart_and_are_not_sent_back(open_page: Open) -> None:
    page = open_page()
    page.route(CHAT, answering(stream_of({"reasoning_content": "hm"}, {"content": "4"})))
    for count in (1, 2):
        ask(page, "2 + 2?")
        expect(page.locator(".turn.answer .note")).to_have_count(count)
    expect(page.locator(".thoughts .text").first).to_have_text("hm")
    assert '"content": "4"' in page.locator("#curl").inner_text()
    assert "hm" not in page.locator("#curl").inner_text()


def test_the_key_is_sent_and_shown_nowhere(open_page: Open) -> None:
    page = open_page()
    keys: list[str | None] = []
    page.on("request", lambda asked: keys.append(asked.headers.get("authorization")))
    page.fill("#key", "s3cret")
    ask(page, "it's", max_tokens=4)
    expect(page.locator(".turn.answer .note")).to_have_count(1)
    assert keys
    assert set(keys) == {"Bearer s3cret"}
    shown = page.locator("#curl").inner_text()
    assert 'Bearer $API_KEY"' in shown
    assert "it'\\''s" in shown
    assert "s3cret" not in page.locator("html").evaluate("each => each.outerHTML")
    assert page.evaluate("() => JSON.stringify([localStorage, document.cookie])") == '[{},""]'
    page.reload()
    expect(page.locator("#key")).to_have_value("s3cret")


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (answering("{}", 401), "needs an API key"),
        (
            answering('{"error":{"message":"2 requests wait"}}', 429, **{"Retry-After": "3"}),
            "2 requests wait (in about 3 s)",
        ),
        (answering("<html>", 502), "status 502"),
        (answering('data: {"error":{"message":"the engine died"}}\n\n'), "the engine died"),
        (lambda route: route.abort(), "connection to the server is lost"),
    ],
)
def test_what_went_wrong_is_said_in_words_and_the_message_is_kept(
    browser: Browser, server: ServerProcess, route: Callable[[Route], None], words: str
) -> None:
    page = browser.new_page()
    page.goto(server.url)
    page.route(CHAT, route)
    ask(page, "hello")
    expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()
    expect(page.locator("#message")).to_have_value("hello")
    page.unroute(CHAT)
    page.press("#message", "Enter")
    expect(page.locator(".turn.answer .note")).to_have_count(1)
    page.close()


def test_a_wrong_number_is_told_before_it_is_sent(open_page: Open) -> None:
    page = open_page()
    page.fill("#top_p", "2")
    ask(page, "hello")
    expect(page.locator("#status")).to_contain_text("Top p")
    assert page.locator(".turn").count() == 0
