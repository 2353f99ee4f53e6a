"""The page: self-contained, served under a policy that fits it, and, where a Chromium is installed, used as a person would."""

import re
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from browser import CHROMIUM, Browser
from dspark.server.metrics import Metrics
from dspark.server.mount import mount, page, policy
from page_server import CARD, MARKUP, TEXT, Server

VOID = {"meta", "link", "input", "br", "hr", "img"}


class Elements(HTMLParser):
    """Every element with its attributes; `open_tags` is empty at the end of a well-formed page."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open_tags: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags and self.open_tags[-1] == tag, f"</{tag}> closes {self.open_tags[-1:]}"
        self.open_tags.pop()


@pytest.fixture(scope="module")
def html():
    return page()


@pytest.fixture(scope="module")
def elements(html):
    return Elements(html)


def test_the_page_is_well_formed_and_its_script_finds_what_it_names(html, elements):
    assert not elements.open_tags
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', html)) <= set(ids)
    for _, attributes in elements.found:
        for name in ("for", "aria-controls", "aria-describedby"):
            assert name not in attributes or attributes[name] in ids


def test_every_field_has_a_label_and_every_button_a_name(html, elements):
    labelled = {a["for"] for tag, a in elements.found if tag == "label" and "for" in a}
    for tag, attributes in elements.found:
        if tag in ("input", "textarea") and attributes["id"] not in labelled:
            assert re.search(rf'<label[^>]*>[^/]*id="{attributes["id"]}"|<label[^>]*>[^<]+<{tag} [^>]*id="{attributes["id"]}"', html), (
                attributes
            )
    for attributes, inside in re.findall(r"<button([^>]*)>(.*?)</button>", html):
        assert re.search(r"\w", inside) or "aria-label" in attributes


def test_nothing_comes_from_elsewhere(html, elements):
    addresses = [a[name] for _, a in elements.found for name in ("src", "href", "action") if name in a]
    assert all(address.startswith("data:") for address in addresses)
    left = set(re.findall(r"https?://[^\s\"'`)]+", html))
    assert left <= {"http://www.w3.org/2000/svg"}  # a namespace, not an address
    assert "@import" not in html and "url(" not in html


def test_text_is_never_taken_for_markup(html):
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", html)


def test_the_policy_lets_only_this_page_run(html):
    found = policy(html)
    assert "default-src 'none'" in found and "connect-src 'self'" in found and "unsafe" not in found
    assert len(re.findall("'sha256-[^']{44}'", found)) == 2
    assert policy(html.replace('"use strict"', '"use sloppy"')) != found
    assert not re.search(r"<[^>]+ (style|on\w+)=", html.split("<script>")[0].split("</style>")[1])  # the policy forbids them


def test_page_and_metrics_are_served():
    app = FastAPI()
    metrics = Metrics(CARD)
    mount(app, metrics)
    client = TestClient(app)
    answer = client.get("/")
    assert answer.status_code == 200 and answer.text == page() and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == policy(page())
    text = client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=") and "dspark_steps_total 0.0" in text.text
    assert client.get("/metrics.json").json() == metrics.snapshot()
    assert not {"/", "/metrics", "/metrics.json"} & app.openapi()["paths"].keys()


# ---- in a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
ANSWERED = "document.querySelector('.assistant:last-of-type .note')?.textContent"


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def start(browser, server) -> None:
    browser.complaints.clear()
    browser.look(1280, 800)
    browser.open(server.url)
    browser.until("document.getElementById('model').textContent === 'smollm2-135m' && !!document.querySelector('#plots path')")


def send(browser, text: str) -> None:
    browser.value("document.getElementById('prompt').focus()")
    browser.type(text)
    browser.press("Enter")


def shown(browser, element: str) -> bool:
    return browser.value(f"document.querySelector({element!r}).getClientRects().length > 0")


@needs_chromium
def test_chat_streams_escapes_and_counts(browser, server):
    start(browser, server)
    browser.value("document.getElementById('show-system').click()")
    browser.type("Be short.")
    send(browser, "<b>Hello</b>")
    note = browser.until(ANSWERED)
    assert browser.value("document.querySelector('.user .text').textContent") == "<b>Hello</b>"
    assert browser.value("document.querySelector('.assistant .text').textContent") == TEXT
    assert MARKUP in TEXT and browser.value("document.querySelectorAll('#log b, #log img').length") == 0
    sources = browser.value("[...document.querySelectorAll('.assistant span')].map(s => s.className)")
    assert set(sources) == {"accepted", "corrected", "bonus"}
    rounds = sum(source != "accepted" for source in sources)
    assert f"{len(sources)} tokens" in note and f"{len(sources) / rounds:.2f} a round" in note and "1.40× plain" in note
    assert browser.value("document.getElementById('tau').textContent") == f"{len(sources) / rounds:.2f}"
    assert browser.value("document.getElementById('ratio').textContent") == "1.40"
    asked = server.asked[0]
    assert asked["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "<b>Hello</b>"}]
    assert (asked["model"], asked["temperature"], asked["max_tokens"], asked["stream"]) == ("smollm2-135m", 0, 512, True)
    assert asked["speculation"] == "auto" and asked["dspark"] == {"sources": True} and asked["stream_options"] == {"include_usage": True}
    assert browser.complaints == []


@needs_chromium
def test_settings_reach_the_server_and_the_conversation_goes_on(browser, server):
    start(browser, server)
    browser.value("document.getElementById('speculation').focus()")
    browser.press(" ")
    browser.value("document.getElementById('max-tokens').value = 3; document.getElementById('temperature').value = 0.7")
    send(browser, "one")
    assert "cut at max tokens" in browser.until(ANSWERED)
    assert browser.value("[...document.querySelectorAll('.assistant span')].map(s => s.className)") == ["plain"] * 3
    send(browser, "two")
    browser.until("document.querySelectorAll('.assistant .note').length === 2 && " + ANSWERED)
    asked = server.asked[1]
    assert asked["speculation"] == "off" and (asked["max_tokens"], asked["temperature"]) == (3, 0.7)
    assert [m["role"] for m in asked["messages"]] == ["user", "assistant", "user"]
    assert asked["messages"][1]["content"] == browser.value("document.querySelector('.assistant .text').textContent")
    browser.value("document.getElementById('clear').click()")
    assert browser.value("document.querySelectorAll('article').length") == 0 and shown(browser, "#welcome")
    browser.value("document.getElementById('temperature').value = 5")
    send(browser, "three")
    assert len(server.asked) == 2  # the field says what is wrong with it


@needs_chromium
def test_the_text_is_what_the_server_says_whatever_the_tokens(browser, server):
    start(browser, server)
    server.stop = "reet(name)"
    send(browser, "one")
    browser.until(ANSWERED)
    assert browser.value("document.querySelector('.assistant .text').textContent") == TEXT[: TEXT.index(server.stop)]
    server.with_sources, server.stop = False, ""
    send(browser, "two")
    browser.until("document.querySelectorAll('.assistant .note').length === 2 && " + ANSWERED)
    assert browser.value("document.querySelector('.assistant:last-of-type .text').textContent") == TEXT
    assert server.asked[1]["messages"][1]["content"] == TEXT[: TEXT.index("reet(name)")]
    assert browser.complaints == []


@needs_chromium
def test_stop_keeps_what_came_and_tells_the_server(browser, server):
    server.pause = 0.2
    start(browser, server)
    send(browser, "go on")
    browser.until("document.querySelectorAll('.assistant span').length > 3")
    assert shown(browser, "#stop") and not shown(browser, "#send")
    browser.press("Escape")
    assert "stopped" in browser.until(ANSWERED)
    part = browser.value("document.querySelector('.assistant .text').textContent")
    assert part and TEXT.startswith(part) and part != TEXT
    assert shown(browser, "#send") and not shown(browser, "#error")
    for _ in range(50):
        if server.disconnected:
            break
        browser.value("new Promise(done => setTimeout(done, 50))")
    assert server.disconnected == 1


@needs_chromium
def test_errors_are_said_and_the_message_is_given_back(browser, server):
    start(browser, server)
    server.answer_with = 503, {"error": {"message": "the queue is full: 64 requests wait"}}
    send(browser, "hello")
    assert browser.until("document.getElementById('error-text').textContent") == "the queue is full: 64 requests wait"
    assert browser.value("document.getElementById('prompt').value") == "hello"
    assert browser.value("document.querySelectorAll('article').length") == 0
    server.answer_with, server.cut_after = None, 3
    browser.press("Enter")
    assert "broke off" in browser.until(ANSWERED)
    assert "closed the connection" in browser.value("document.getElementById('error-text').textContent")
    server.close()
    browser.until("document.getElementById('connection').textContent === 'no connection'")
    send(browser, "again")
    browser.until("document.getElementById('error-text').textContent.includes('cannot be reached')")
    assert browser.value("document.getElementById('prompt').value") == "again"


@needs_chromium
def test_a_key_is_asked_for_where_the_server_wants_one(browser):
    server = Server(key="sesame")
    try:
        browser.look(1280, 800)
        browser.open(server.url)
        browser.until("document.activeElement.id === 'key-value'")
        browser.type("wrong")
        browser.press("Enter")
        browser.until("document.getElementById('key-why').textContent.includes('does not know')")
        browser.value("document.getElementById('key-value').value = ''; document.getElementById('key-value').focus()")
        browser.type("sesame")
        browser.press("Enter")
        browser.until("document.getElementById('model').textContent === 'smollm2-135m'")
        assert not shown(browser, "#key")
        send(browser, "hello")
        assert browser.until(ANSWERED)
        browser.open(server.url)  # the tab remembers it
        browser.until("document.getElementById('model').textContent === 'smollm2-135m'")
        browser.value("sessionStorage.clear()")
    finally:
        server.close()


@needs_chromium
def test_numbers_are_plotted_and_the_alarm_is_said(browser):
    server = Server(acceptance=0.02)
    try:
        start(browser, server)
        assert browser.until("document.getElementById('alarm').textContent").startswith("Drafts have collapsed")
        labels = browser.value("[...document.querySelectorAll('#plots svg')].map(s => s.getAttribute('aria-label'))")
        assert len(labels) == 6 and all(label.startswith(title) for label, title in zip(
            labels, ("Tokens a round", "Tokens a second", "Seconds saved", "Acceptance", "Decoding rows", "Requests"), strict=True
        ))  # fmt: skip
        assert (
            browser.value("document.querySelectorAll('.card').length") == 5
            and browser.value("document.querySelectorAll('.bar').length") >= 1
        )
        assert not browser.value("document.getElementById('plots').innerHTML.includes('NaN')")
        browser.look(400, 800)
        assert shown(browser, "#chat") and not shown(browser, "#numbers")
        browser.value("document.getElementById('view-numbers').click()")
        assert shown(browser, "#numbers") and not shown(browser, "#chat")
        for _ in range(2):
            assert browser.value("document.documentElement.scrollWidth") == 400
            browser.value("document.getElementById('view-chat').click()")
        assert browser.complaints == []
    finally:
        server.close()
