"""The report: its figures are those of the run folder, it is whole without files, and nothing in it
runs.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import runfiles
from runfiles import change, write_lines, write_run
from smoldpo.reports.html import html_report, write_report
from smoldpo.reports.plots import smoothed, window
from smoldpo.reports.run_files import read_run
from smoldpo.reports.samples import MAX_CHARACTERS, MAX_TOKENS, Colouring
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.text import duration, p_value, percent, points

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)></style></title>"
    "<a href='javascript:alert(3)'>x</a>\"'--><svg onload=alert(4)>{{ 7*7 }} $x^2$ \ud800"
)


class Page(HTMLParser):
    """Tags, what in them could run or be fetched, exact figures, and all text."""

    VOID = frozenset({"meta", "br", "col", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.bad: list[tuple] = []
        self.figures: list[tuple[str, float]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            local = (value or "").startswith("#")
            if name.startswith("on") or (name in ("src", "href", "xlink:href") and not local):
                self.bad.append((tag, name, value))
            if tag == "data":
                self.figures.append(("", float(value)))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "data":
            self.figures[-1] = (data, self.figures[-1][1])
        self.text += data


def page_of(*folders: Path) -> tuple[str, Page]:
    text = html_report([read_run(folder) for folder in folders])
    page = Page(text)
    assert page.open == [], "every element is closed"
    return text, page


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "my-run")


def judged(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_figures_are_those_of_the_evaluation(run):
    found = judged(run)
    text, page = page_of(run)
    assert found["headline"] in text and found["explanations"][0] in text
    shown = {value for _, value in page.figures}
    for row in found["accuracy"].values():
        assert {row["before"]["value"], row["after"]["value"], row["change"]["value"]} <= shown
        for part in ("before", "after"):
            if row[part]["low"] is not None:
                assert f"{row[part]['low']:.1%} to {row[part]['high']:.1%}" in page.text
    assert set(found["baselines"].values()) <= shown
    for groups in found["slices"].values():
        assert {group["after"]["value"] for group in groups} <= shown
    assert {bin["observed"] for bin in found["calibration"]["bins"]} <= shown
    assert found["by_length"]["balanced"]["after"] in shown
    assert {judge["win_rate"]["value"] for judge in found["judges"]} <= shown
    for side in ("chosen", "rejected"):
        assert found["drift"][side]["change"]["value"] in shown
    for words, value in page.figures:  # what people read is what the exact figure says
        assert words in (percent(value), points(value)) or words[0] in "+−", (words, value)


@pytest.mark.pictures
def test_a_whole_run_is_one_small_page_in_order(run):
    text, page = page_of(run)
    assert len(text.encode()) < 2_000_000
    order = ["accuracy", "drift", "curves", "margins", "calibration", "data", "samples", "pairs"]
    places = [text.index(f'<section id="{name}">') for name in [*order, "cost", "again"]]
    assert places == sorted(places)
    assert text.count("<svg") == 11
    assert "3 comparisons were made" in text and "Holm" in text
    assert "smoldpo train --data &#39;my pairs.jsonl&#39;" in text
    assert "35" in page.text and "both answers are the same" in text
    assert "learning_rate: 5.0e-05" in text and runfiles.ENVIRONMENT["sha256"]["reference"] in text


@pytest.mark.pictures
def test_a_long_run_with_long_texts_stays_small(run):
    rng = runfiles.np.random.default_rng(1)
    write_lines(run / "metrics.jsonl", runfiles.metrics(rng, steps=20_000))
    long = "word " * 20_000
    sample = runfiles.samples(rng, 1)[0]
    sample |= {"policy": long, "policy_tokens": runfiles.tokens_of(long, rng), "prompt": long}
    write_lines(run / "samples.jsonl", [sample] * 15)
    text, page = page_of(run)
    assert len(text.encode()) < 2_000_000
    assert f"{len(long) - MAX_CHARACTERS:,} more characters" in page.text
    assert f"{20_001 - MAX_TOKENS:,} tokens more" in page.text
    assert "the first 12 of 15" in page.text


def test_the_alarm_is_a_box_with_advice(run):
    assert 'class="alarm"' not in page_of(run)[0]
    drift = judged(run)["drift"] | {"alarm": "the chosen side fell", "advice": ["an NLL term"]}
    change(run, "evaluation.json", drift=drift)
    text, _ = page_of(run)
    box = text[text.index('class="alarm"') :]
    assert "the chosen side fell" in box[:300] and "an NLL term" in box[:400]


def test_alarms_about_the_answers_are_boxes_with_advice(run):
    assert "Alarm about the answers" not in page_of(run)[0]
    generation = judged(run)["generation"]
    generation["alarms"] = [{"text": "no answer ends", "advice": ["a smaller rate"]}]
    found = {"change": {"value": -0.375, "low": -0.5, "high": -0.25}, "test": "exact", "p": 0.002}
    generation["ended_change"] = found
    change(run, "evaluation.json", generation=generation)
    text, page = page_of(run)
    box = text[text.index('class="alarm"') :]
    assert "no answer ends" in box[:300] and "a smaller rate" in box[:400]
    assert "Alarm about the answers" in page.text
    assert "change −37.5 (−50.0 to −25.0) points, p 0.002" in page.text
    assert "no answer ends" in page_of(run, run)[0]


@pytest.mark.pictures
def test_hostile_texts_are_inert(tmp_path):
    folder = write_run(tmp_path / "<script>alert(1)<")
    plant(folder)
    for folders in ([folder], [folder, write_run(tmp_path / "a" / "<img src=x onerror=1>")]):
        text, page = page_of(*folders)
        assert not page.bad
        assert not page.tags & {"script", "img", "iframe", "object", "link", "base", "form"}
        assert "url(http" not in text and "@import" not in text
        assert text.count("<style>") == 1 and text.count("</style>") == 1 + text.count(
            "<style type"
        )
        text.encode()
    assert "&lt;script&gt;alert(1)" in text


def plant(folder: Path) -> None:
    """Hostile text in every place that people or files can fill."""
    found = judged(folder)
    found["headline"] = found["correction"] = HOSTILE
    found["explanations"] = [HOSTILE]
    found["drift"] |= {"alarm": HOSTILE, "advice": [HOSTILE]}
    found["slices"]["category"][0]["name"] = HOSTILE
    found["generation"]["alarms"] = [{"text": HOSTILE, "advice": [HOSTILE]}]
    found["judges"][0]["judge"] = found["accuracy"]["logp"]["words"] = HOSTILE
    found["baselines"][HOSTILE] = 0.5
    pair = found["notable"]["changed"][0]
    pair |= {"id": HOSTILE, "prompt": HOSTILE, "chosen": HOSTILE, "rejected": HOSTILE}
    pair |= {"chosen_tokens": [[HOSTILE, 9.0]], "rejected_tokens": [[HOSTILE, None]]}
    change(folder, "evaluation.json", **found)
    sample = {"prompt": [{"role": HOSTILE, "content": HOSTILE}], "reference": HOSTILE, "policy": ""}
    write_lines(folder / "samples.jsonl", [sample])
    data = runfiles.data()
    data["train"] |= {"source": HOSTILE, "format": HOSTILE, "dropped": {HOSTILE: 3}}
    item = dict.fromkeys(("file", "rule", "action", "detail", "before", "after"), HOSTILE)
    data["train"]["touched"] = [item | {"row": 1}]
    data["tokens"]["notes"] = {HOSTILE: 1}
    change(folder, "data.json", **data)
    change(folder, "environment.json", command=["smoldpo", HOSTILE], sha256={HOSTILE: HOSTILE})
    change(folder, "timings.json", **{HOSTILE: {"seconds": 1.0, "units": 3, "unit": HOSTILE}})
    with (folder / "config.yaml").open("a") as file:
        file.write("model: \"<script>alert(1)</script><img src=x onerror='alert(2)'>\"\n")


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("evaluation.json", "There is no evaluation. The run did not reach its end."),
        ("samples.jsonl", "There are no samples. No samples were asked for."),
        ("timings.json", "Nothing is known about time and memory."),
        ("data.json", "Nothing is known about the data."),
    ],
)
def test_what_is_missing_is_explained(run, missing, says):
    (run / missing).unlink()
    _, page = page_of(run)
    assert says in page.text
    assert "Training curves" in page.text


def test_a_run_without_held_out_pairs_says_so(tmp_path):
    folder = write_run(tmp_path / "run", eval_fraction=0)
    (folder / "evaluation.json").unlink()
    _, page = page_of(folder)
    assert "No pairs were held out" in page.text and "Trained for 128 steps" in page.text


@pytest.mark.pictures
def test_least_that_an_evaluation_can_hold(run):
    """Where there is one pair, no reference, or no samples, sections say that they are empty."""
    found = judged(run)
    least = {
        "n": 1,
        "headline": "h",
        "verdict": "no evidence",
        "comparisons": 1,
        "correction": "Holm",
    }
    logp = found["accuracy"]["logp"] | {"p": None, "p_corrected": None}
    logp["before"] = {"value": 0.5, "low": None, "high": None}
    one = {"n": 1, "before": 0.0, "after": {"value": 1.0, "low": 0.2, "high": 1.0}}
    none = {"n": 0, "before": None, "after": None}
    groups = {"chosen_longer": one, "chosen_shorter": none, "equal": none, "balanced": None}
    least |= {"metric": "logp", "by_length": {"metric": "logp"} | groups, "calibration": None}
    least |= {
        "margins": None,
        "judges": [
            {
                "judge": "a",
                "n": 0,
                "wins": 0,
                "losses": 0,
                "ties": 0,
                "win_rate": {"value": None, "low": None, "high": None},
                "failed": 8,
                "error": "away",
            }
        ],
    }
    least |= {"generation": found["generation"] | {"kl_per_token": None}}
    least["accuracy"] = {"logp": logp, "reward": None}
    (run / "evaluation.json").write_text(json.dumps(least))
    _, page = page_of(run)
    assert "No evidence of change" in page.text and "1 comparison was made" in page.text
    assert (
        "away" in page.text and "equally long" in page.text and "length-balanced" not in page.text
    )
    page_of(run, run)


@pytest.mark.pictures
def test_early_runs_are_read(run):
    """Before there were statistics, evaluation.json and timings.json held less."""
    old = {"n": 2, "before": {"accuracy": {}}, "after": {"accuracy": {}}, "pairs": []}
    (run / "evaluation.json").write_text(json.dumps(old))
    (run / "timings.json").write_text(json.dumps({"training": 49.34}))
    write_lines(run / "samples.jsonl", [{"prompt": "a", "reference": "b", "policy": "c"}])
    _, page = page_of(run)
    assert "written by an earlier smoldpo" in page.text and "49.3 s" in page.text


@pytest.mark.pictures
def test_numbers_that_are_none_do_not_stop_it(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[10:20]:
        row |= {key: "nan" for key in row if key.startswith(("loss", "rewards"))}
    write_lines(run / "metrics.jsonl", rows)
    page_of(run)


@pytest.mark.parametrize(
    ("break_it", "says", "kind"),
    [
        (lambda run: (run / "config.yaml").unlink(), "holds no run: config.yaml", UsageError),
        (lambda run: (run / "metrics.jsonl").unlink(), "unfinished", SmoldpoError),
        (lambda run: (run / "metrics.jsonl").write_text(""), "unfinished", SmoldpoError),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n[1]\n{}\n"), "row 2", SmoldpoError),
        (lambda run: (run / "evaluation.json").write_text('{\n"n": '), "row 2", SmoldpoError),
        (lambda run: change(run, "evaluation.json", n="many"), "n: input", SmoldpoError),
        (lambda run: change(run, "timings.json", a=[]), "timings.json", SmoldpoError),
        (
            lambda run: (run / "samples.jsonl").write_text('{"prompt": 1}\n'),
            "0.prompt",
            SmoldpoError,
        ),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "config.yaml, row", SmoldpoError),
        (lambda run: (run / "data.json").write_bytes(b"\xff\xfe"), "data.json", SmoldpoError),
    ],
)
def test_what_is_no_run_or_damaged_is_named(run, break_it, says, kind):
    break_it(run)
    with pytest.raises(kind) as error:
        read_run(run)
    assert says in str(error.value) and str(run) in str(error.value)


def places(value, path=()):
    """Where a value can be broken: every key, and the first items of every list."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3])
    for key, item in inner:
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.pictures
@pytest.mark.parametrize("seed", range(80))
def test_whatever_is_broken_gives_a_page_or_a_named_error(tmp_path, monkeypatch, seed):
    """One value somewhere is missing or of another kind."""
    chance = random.Random(seed)
    if seed > 10:  # drawing takes most of the time
        monkeypatch.setattr("smoldpo.reports.plots.svg", lambda *arguments: "")
    folder = write_run(tmp_path / "run")
    name = chance.choice(["environment.json", "data.json", "evaluation.json", "timings.json",
                          "metrics.jsonl", "samples.jsonl"])  # fmt: skip
    text = (folder / name).read_text()
    value = (
        [json.loads(line) for line in text.splitlines()] if name[-1] == "l" else json.loads(text)
    )
    *way, last = chance.choice(list(places(value)))
    inner = value
    for key in way:
        inner = inner[key]
    new = chance.choice(["missing", None, "x", [], {}, -1, 10**400, float("nan"), [1, 2], {"a": 1}])
    if new == "missing":
        del inner[last]
    else:
        inner[last] = new
    if name[-1] == "l":
        write_lines(folder / name, value)
    else:
        (folder / name).write_text(json.dumps(value))
    try:
        page_of(folder)
        page_of(folder, folder)
    except SmoldpoError as error:
        assert name in str(error) and str(folder) in str(error)


def test_a_last_line_that_was_cut_off_does_not_count(run):
    steps = len(read_run(run).steps)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 129, "lo')
    assert len(read_run(run).steps) == steps


@pytest.mark.pictures
def test_several_runs(tmp_path):
    folders = [
        write_run(tmp_path / "one", 0),
        write_run(tmp_path / "two", 1, after=0.58, beta=0.3),
        write_run(tmp_path / "sub" / "two", 2, after=0.55, learning_rate=2e-5),
    ]
    text, page = page_of(*folders)
    shown = {value for _, value in page.figures}
    assert {judged(folder)["accuracy"]["reward"]["after"]["value"] for folder in folders} <= shown
    assert "The highest accuracy after training is one's" in page.text
    differences = text[text.index('id="differences"') :]
    assert "<code>beta</code>" in differences and "<code>learning_rate</code>" in differences
    assert "output_dir" not in differences and "<code>seed</code>" not in differences
    assert str(folders[2]) in text, "two folders of one name are told apart"
    assert "not judged on the same pairs" not in text


def test_runs_on_other_pairs_are_not_compared(tmp_path):
    folders = [write_run(tmp_path / "one", 0), write_run(tmp_path / "two", 1)]
    change(folders[1], "evaluation.json", pairs=[{"id": "another"}])
    text, _ = page_of(*folders)
    assert "not judged on the same pairs" in text and "The highest accuracy" not in text


@pytest.mark.pictures
def test_runs_without_evaluation_can_stand_beside_others(tmp_path):
    folders = [write_run(tmp_path / "one", 0), write_run(tmp_path / "two", 1)]
    for name in ("evaluation.json", "timings.json"):
        (folders[1] / name).unlink()
    _, page = page_of(*folders)
    assert "None. The run did not reach its end." in page.text


def test_mixes_show_every_source(run):
    parts = []
    for name in ("first.jsonl", "second.jsonl"):
        part = runfiles.data()
        part["train"]["source"] = name
        parts.append(part)
    data = {"sources": parts, "split": parts[0]["split"] | {"train_pairs_left_by_weight": 77}}
    (run / "data.json").write_text(json.dumps(data))
    _, page = page_of(run)
    assert "first.jsonl" in page.text and "second.jsonl" in page.text
    assert "77 were left out by the weights" in page.text


def test_words_are_coloured_by_how_far_they_moved():
    tokens = [(f" w{index}", 0.01) for index in range(97)] + [
        (" up", 3.0),
        (" down", -3.0),
        ("x", 0.09),
    ]
    colouring = Colouring.of([tokens])
    answer = colouring.answer("", tokens)
    looks = {piece.text: piece.look[:1] for piece in answer.pieces if piece.look}
    assert looks == {"up": "u", "down": "d"}, "no token under the least change, no space coloured"
    assert "".join(piece.text for piece in answer.pieces) == "".join(text for text, _ in tokens)
    (factor,) = {piece.factor for piece in answer.pieces if piece.text == "up"}
    assert factor == "× 20.1"


def test_smoothing_by_hand():
    values = runfiles.np.arange(12.0)
    assert window(12) == 3 and window(9) == 1
    assert smoothed(values).tolist() == [0.5, *range(1, 11), 10.5]
    assert smoothed(values[:5]).tolist() == [0, 1, 2, 3, 4]


def test_numbers_in_words():
    assert [p_value(p) for p in (0.00001, 0.000402, 0.0123, 0.97, None)] == [
        "< 0.0001", "0.0004", "0.012", "0.97", "–"
    ]  # fmt: skip
    assert [duration(s) for s in (4.16, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 05 min"]
    assert (percent(float("nan")), points(-0.0123)) == ("–", "−1.2")


def test_tokens_and_passwords_are_left_out(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-token")
    secret = ["s3cr3t-token", "https://me:hunter2@host/x", "hf_abcdefghijklmnopqrstuvwxyz"]
    change(run, "environment.json", command=["smoldpo", *secret])
    text, _ = page_of(run)
    assert "https://[secret]@host/x" in text
    assert not any(word in text for word in ("s3cr3t", "hunter2", "hf_abc"))


def test_it_is_written_whole(run, tmp_path):
    path = tmp_path / "out.html"
    write_report([read_run(run)], path)
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    with pytest.raises(SmoldpoError, match="cannot be written"):
        write_report([read_run(run)], tmp_path / "nowhere" / "out.html")
    with pytest.raises(UsageError):
        html_report([])


def test_no_torch(run):
    code = (
        "import sys\nfrom smoldpo.reports.html import html_report\n"
        "from smoldpo.reports.run_files import read_run\n"
        f"html_report([read_run({str(run)!r})])\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
