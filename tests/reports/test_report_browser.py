"""The report in a real browser: it fits, its figures are right, it runs nothing and asks for
nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_report import plant

from browser import BROWSER, Watched
from runfiles import write_run
from smoldpo.reports.html import write_report
from smoldpo.reports.run_files import read_run

pytestmark = [
    pytest.mark.pictures,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A plain report, one full of hostile texts, and one of several runs."""
    folder = tmp_path_factory.mktemp("reports")
    plain = write_run(folder / "plain")
    hostile = write_run(folder / "hostile <img src=x onerror=alert(5)>", 1)
    plant(hostile)
    found = {}
    for name, runs in {"plain": [plain], "hostile": [hostile], "several": [plain, hostile]}.items():
        found[name] = folder / f"{name}.html"
        write_report([read_run(run) for run in runs], found[name])
    return found


@pytest.mark.parametrize("name", ["plain", "hostile", "several"])
def test_it_runs_nothing_and_asks_for_nothing(browser, pages, name):
    watched = Watched(browser, pages[name])
    page = watched.page
    page.wait_for_timeout(100)
    assert watched.requests == [pages[name].as_uri()]
    assert watched.trouble == []
    assert page.locator("script, img, iframe, object, embed, link, form").count() == 0
    handlers = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert not [name for name in page.evaluate(handlers) if name.startswith("on")]
    page.close()


def test_its_policy_would_stop_a_script(browser, pages, tmp_path):
    """The canary: a script put into the page does not run, so the policy is in force."""
    planted = tmp_path / "planted.html"
    script = "<script>document.title = 'ran'</script></body>"
    planted.write_text(pages["plain"].read_text().replace("</body>", script))
    watched = Watched(browser, planted)
    assert watched.page.title() == "plain: report"
    assert any("Content Security Policy" in line for line in watched.trouble)
    watched.page.close()


def test_figures_equal_the_evaluation(browser, pages):
    found = json.loads((pages["plain"].parent / "plain" / "evaluation.json").read_text())
    page = Watched(browser, pages["plain"]).page
    assert page.locator("#answer").inner_text() == found["headline"]
    for name, row in found["accuracy"].items():
        cells = page.locator(f"tr[data-metric={name}] data")
        exact = [float(value) for value in cells.evaluate_all("all => all.map(d => d.value)")]
        assert exact == [row["before"]["value"], row["after"]["value"], row["change"]["value"]]
        words = cells.all_inner_texts()
        assert words[:2] == [f"{value:.1%}" for value in exact[:2]]
    for name, value in found["baselines"].items():
        cell = page.locator(f"tr[data-baseline={name}] data")
        assert float(cell.get_attribute("value")) == value
    for side in ("chosen", "rejected"):
        cell = page.locator(f"tr[data-drift={side}] data").first
        assert float(cell.get_attribute("value")) == found["drift"][side]["change"]["value"]
    page.close()


OUTSIDE = """() => [...document.querySelectorAll('body *')]
  .filter(e => !e.closest('svg') || e.tagName === 'svg')
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
            && e.getBoundingClientRect().width > 0)
  .map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40))"""
CONTRASTS = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const over = (top, under) => top.slice(0, 3).map((v, i) => {
    const a = top.length > 3 ? top[3] : 1; return v * a + under[i] * (1 - a); });
  const light = rgb => rgb.map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    if (!e) return [255, 255, 255];
    return over(parse(getComputedStyle(e).backgroundColor), ground(e.parentElement)); };
  const found = [];
  for (const e of document.querySelectorAll('body, body *')) {
    if (e.closest('svg') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
      continue;
    const [a, b] = [light(parse(getComputedStyle(e).color).slice(0, 3)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5)
      found.push([ratio.toFixed(2), e.tagName, e.className, e.textContent.slice(0, 30)]);
  }
  return found; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["plain", "hostile", "several"])
def test_it_fits_and_can_be_read(browser, pages, name, width, scheme):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    page = Watched(browser, pages[name], **options).page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(CONTRASTS) == []
    sizes = page.locator("figure svg text").evaluate_all(
        "all => all.map(t => parseFloat(getComputedStyle(t).fontSize)"
        " * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"
    )
    assert min(sizes) >= 9.5, "labels of plots keep their size on a phone"
    page.close()


@pytest.mark.parametrize("name", ["plain", "several"])
def test_it_prints(browser, pages, name):
    page = Watched(browser, pages[name]).page
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and len(printed) > 30_000
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 690, "height": 900})  # A4 between its margins
    assert page.evaluate(OUTSIDE) == []
    assert page.locator("nav").is_hidden() and page.locator("#answer, h1").first.is_visible()
    page.close()
