"""A session of votes in a real browser: by keyboard on a desktop, by touch on a phone."""

import json

import pytest

from browser import BROWSER
from conftest import jsonl

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")

HOSTILE = "<script>document.title = 'ran'</script><img src=x onerror=alert(1)>"
LONG = "A long answer in several sentences, as models write them. " * 12
ANSWERS = [
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Question {n}? {HOSTILE if n == 3 else ''}"},
        ],
        "a": f"good {n}. {LONG if n % 3 else ''}{HOSTILE}",
        "b": f"bad {n}. {'' if n % 2 else LONG}",
        "model_a": "mine",
        "model_b": "base",
    }
    for n in range(30)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("votes")
    (folder / "answers.jsonl").write_text(jsonl(ANSWERS))
    return folder


@pytest.fixture(scope="module")
def server(start_web, folder):
    return start_web(folder, "answers.jsonl")


@pytest.fixture
def opened(browser, server):
    """`opened(**options)`: the first page, and whatever went wrong on it."""
    contexts = []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page, trouble = context.new_page(), []
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda said: trouble.append(said.text))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.on(
            "request", lambda r: trouble.append(r.url) if f":{server.port}/" not in r.url else None
        )
        page.goto(server.url)
        assert server.token not in page.url
        page.get_by_role("link", name="Vote on them, blind").click()
        return page, trouble

    yield open_page
    for context in contexts:
        context.close()


def votes(folder):
    path = folder / "votes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def begin(page, name):
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_selector(".choices")


def good_is_left(page):
    return page.locator(".answer .said").first.inner_text().startswith("good")


def press(page, key):
    with page.expect_navigation():
        page.keyboard.press(key)


def test_thirty_votes_by_keyboard(opened, folder):
    page, trouble = opened(viewport={"width": 1280, "height": 800})
    begin(page, "Ann <b>")
    assert page.title() == "Vote 1 of 30"
    for number in range(30):
        text = page.locator("main").inner_text()
        assert "mine" not in text and "base" not in text, "blind"
        if number == 4:
            press(page, "u")
            assert len(votes(folder)) == 3
        if number == 6:
            press(page, "s")
        press(page, "ArrowLeft" if good_is_left(page) else "ArrowRight")
    assert "You can stop: one of the two is preferred." in page.locator("main").inner_text()
    press(page, "ArrowDown")
    assert page.url.endswith("/result"), page.url
    said = page.locator("main").inner_text()
    assert "mine is preferred" in said and "of 30 votes" in said
    rows = votes(folder)
    assert len(rows) == 30 == len({row["id"] for row in rows})
    assert [row["winner"] for row in rows] == ["a"] * 29 + ["tie"]
    assert {row["voter"] for row in rows} == {"Ann <b>"} and trouble == []


def test_on_a_phone_by_thumb(opened, folder):
    before = len(votes(folder))
    page, trouble = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    begin(page, "Bob")
    for name in ("1 is better", "Tie", "2 is better"):
        button = page.get_by_role("button", name=name)
        box = button.bounding_box()
        assert box["height"] >= 44 and box["y"] + box["height"] <= 740, (
            "under the thumb, unscrolled"
        )
        with page.expect_navigation():
            button.tap()
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360 and len(votes(folder)) == before + 3
    page.reload()
    assert page.title() == "Vote 4 of 30" and len(votes(folder)) == before + 3
    with page.expect_navigation():
        page.get_by_role("button", name="End and show names").tap()
    assert "Cohen's κ" in page.locator("main").inner_text() and trouble == []


def test_two_tabs_and_a_killed_server(browser, start_web, folder, tmp_path):
    (tmp_path / "answers.jsonl").write_text(jsonl(ANSWERS[:3]))
    server = start_web(tmp_path, "answers.jsonl")
    context = browser.new_context()
    one, other = context.new_page(), context.new_page()
    one.goto(server.url)
    one.goto(f"http://127.0.0.1:{server.port}/vote/file")
    begin(one, "Cy")
    other.goto(f"http://127.0.0.1:{server.port}/vote/file")
    press(one, "ArrowLeft")
    press(other, "ArrowRight")
    assert len(votes(tmp_path)) == 1, "the second tab showed what was voted on"
    server.process.kill()
    server.process.wait()
    again = start_web(tmp_path, "answers.jsonl", "--port", server.port)
    one.goto(again.url)
    one.goto(f"http://127.0.0.1:{server.port}/vote/file")
    assert one.title() == "Vote 2 of 3"
    context.close()


CONTRAST = """() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => {
      v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
      return .2126 * r + .7152 * g + .0722 * b };
  const ground = e => { for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(', 0)')) return c }
      return 'rgb(255, 255, 255)' };
  return [...document.querySelectorAll('main *, nav *')].filter(e => !e.disabled
      && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) && e.offsetParent)
    .map(e => { const both = [light(getComputedStyle(e).color), light(ground(e))];
      const [a, b] = both.sort((x, y) => y - x);
      return [(a + .05) / (b + .05), e.outerHTML.slice(0, 80)] }).filter(x => x[0] < 4.5) }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(opened, scheme):
    page, _ = opened(color_scheme=scheme, viewport={"width": 800, "height": 700})
    assert page.evaluate(CONTRAST) == []
    begin(page, "Dee")
    assert page.evaluate(CONTRAST) == []
    assert page.locator("h1").count() == page.locator("main").count() == 1
    named = "e => e.innerText || e.labels?.length"
    unnamed = page.evaluate(
        f"[...document.querySelectorAll('button, a, input:not([type=hidden])')]"
        f".filter(e => !({named})(e)).length"
    )
    assert unnamed == 0
