"""`smoldpo data check`: what it prints, counts and writes, whatever stands in the texts."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from planted import clean_row
from rich.console import Console
from typer.testing import CliRunner

from conftest import SHARED
from smoldpo.cli.data import app
from smoldpo.data.audit import CheckOptions, check_data
from smoldpo.data.length_stats import LengthStats, TokenCounter, Truncation, WordCounter
from smoldpo.data.tokenize import PairTokenizer, Tokenization
from smoldpo.reports.data_audit import html_report, print_report
from smoldpo.types import PreferencePair

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)></style><a href='javascript:x'>"


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def rows():
    return [clean_row(number) for number in range(30)]


def test_json_holds_rows_and_findings(tmp_path, rows):
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[9]["chosen"] = "Broken \ud800 text. " + rows[9]["chosen"]
    path = write(tmp_path / "d.jsonl", rows)
    result = run("check", path, "--model", "none", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["rows_read"], found["rows_kept"], found["format"]) == (30, 29, "explicit")
    assert [(t["file"], t["row"], t["rule"], t["action"]) for t in found["touched"]] == [
        (path, 5, "identical", "drop"), (path, 10, "invalid_unicode", "mend")
    ]  # fmt: skip
    assert found["touched"][1]["after"].startswith("Broken \ufffd text.")
    assert found["statistics"]["distinct_prompts"] == 29


def test_statistics_by_hand(tmp_path):
    texts = [("a b c", "a", "a a a a"), ("a b c", "d e", "d"), ("x", "b", "f"), ("y z", "g h", "i")]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]
    options = CheckOptions(max_length=6)
    numbers = check_data(write(tmp_path / "d.jsonl", rows), options, WordCounter()).statistics
    assert numbers["distinct_prompts"] == 3
    assert numbers["length_baseline"] == {
        "unit": "characters",
        "chosen_longer": 0.5,
        "equally_long": 0.25,
        "accuracy_of_picking_the_longer": 0.625,
    }
    assert numbers["lengths"]["prompt"] == {"median": 2.5, "p90": 3, "p99": 3, "max": 3}
    assert numbers["truncation"]["pairs"] == 1 and numbers["truncation"]["share"] == 0.25
    words = numbers["vocabulary"]  # chosen: a d e b g h; rejected: a d f i
    assert (words["chosen_words"], words["rejected_words"], words["in_both"]) == (6, 4, 2)
    assert words["overlap"] == 2 / 8


def test_lengths_and_truncation_are_those_of_training(tiny_tokenizer):
    rng = np.random.default_rng(0)
    pairs = [
        PreferencePair("q" * int(p), "c " * int(c), "<|im_end|>" * int(number % 3) + "r " * int(r))
        for number, (p, c, r) in enumerate(rng.integers(1, 40, (60, 3)))
    ]
    lengths = TokenCounter(tiny_tokenizer).count(pairs)
    exact = PairTokenizer(tiny_tokenizer, 10**9)
    assert lengths == [
        (len(t.prompt_ids), len(t.chosen_ids), len(t.rejected_ids))
        for t in exact.tokenize_all(pairs)
    ]
    cutting = PairTokenizer(tiny_tokenizer, 0)
    for pair, length in zip(pairs[:25], lengths, strict=False):
        longer = max(length[1:])
        for edge in (min(length[1:]), longer, longer + 1, length[0] + longer):
            for limit in (edge - 1, edge, edge + 1):
                cutting.how = Tokenization(limit)
                notes, rule = cutting.tokenize(pair).notes, Truncation(limit)
                assert rule.prompt(length) == ("prompt_truncated" in notes)
                sides = ["chosen_truncated" in notes, "rejected_truncated" in notes]
                assert rule.answers(length).tolist() == sides


def test_a_large_set_is_sampled_evenly_but_every_long_pair_is_counted():
    measured = LengthStats(WordCounter(), max_length=50, sample=16)
    found = []
    for number in range(1000):
        size = 200 if number % 97 == 0 else 1 + number % 7
        measured.add(
            PreferencePair("p", "w " * size, "v", row=number), lambda *got: found.append(got)
        )
    measured.flush(lambda *got: found.append(got))
    kept = np.ones(1000, bool)
    numbers = measured.statistics(kept)
    assert 8 <= numbers["pairs_counted"] <= 16
    assert [pair.row for pair, rule, _ in found if rule == "long_answer"] == list(
        range(0, 1000, 97)
    )
    assert numbers["truncation"]["chosen"] == 11 and numbers["lengths"]["chosen"]["max"] == 200


def test_splits_of_a_source_are_checked_against_each_other(tmp_path, rows):
    folder = tmp_path / "set"
    held = [clean_row(number) for number in range(100, 105)]
    rows[7]["prompt"] = held[2]["prompt"]
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", held)
    report = check_data(str(folder), CheckOptions(), WordCounter())
    assert report.rows_read == 35 and report.rows_kept == 34
    (item,) = report.findings
    assert (item.row, item.rule, item.action) == (8, "eval_prompt", "drop")
    assert item.file.endswith("train.jsonl") and "test.jsonl, row 3" in item.detail
    alone = check_data(str(folder), CheckOptions(split="train"), WordCounter())
    assert (alone.rows_read, [t.rule for t in alone.findings]) == (30, ["eval_prompt"])
    held_out = check_data(str(folder), CheckOptions(split="test"), WordCounter())
    assert held_out.rows_read == 5 and not held_out.findings
    refused = run("check", folder, "--model", "none", "--write", tmp_path / "out.jsonl")
    assert refused.exit_code == 2 and "--split" in refused.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_written_is_clean_and_nothing_else_is_lost(tmp_path, rows):
    rows[3] = rows[2]
    rows[5]["chosen"] += "\n\nHuman"
    out = tmp_path / "clean.jsonl"
    result = run("check", write(tmp_path / "d.jsonl", rows), "--model", "none", "--write", out)
    assert result.exit_code == 0, result.stderr
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(written) == 29
    assert written[0]["prompt"] == rows[0]["prompt"]
    assert written[0]["chosen"] == [{"role": "assistant", "content": rows[0]["chosen"]}]
    again = run("check", out, "--model", "none", "--json")
    assert json.loads(again.stdout)["touched"] == []


class Page(HTMLParser):
    """Tags, and what in them could run or be fetched."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.bad = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            local = (value or "").startswith("#")
            if name.startswith("on") or (name in ("src", "href", "xlink:href") and not local):
                self.bad.append((tag, name, value))


@pytest.mark.pictures
def test_the_page_runs_nothing_and_asks_for_nothing(tmp_path, rows):
    for number, row in enumerate(rows[:4]):
        row["rejected"] = row["chosen"] = HOSTILE + str(number)
    path = write(tmp_path / "a<b>&c.jsonl", rows)
    text = html_report(check_data(path, CheckOptions(), WordCounter()))
    page = Page(text)
    assert not page.bad and not page.tags & {"script", "img", "a", "link", "iframe", "object"}
    assert "&lt;script&gt;alert(1)" in text and "a&lt;b&gt;&amp;c.jsonl" in text
    assert "url(http" not in text and "@import" not in text
    assert text.count("<svg") == 3 and "chosen minus rejected, words" in text


def test_the_table_escapes_what_a_terminal_would_obey(tmp_path, rows):
    rows[4]["chosen"] = rows[4]["rejected"] = "[red]x[/red] \x1b[31m \u202e "
    report = check_data(write(tmp_path / "d.jsonl", rows), CheckOptions(), WordCounter())
    console = Console(width=160, record=True, force_terminal=False)
    with console.capture() as captured:
        print_report(report, console)
    text = captured.get()
    assert "identical" in text and "\x1b" not in text and "\u202e" not in text
    assert "[red]x[/red]" in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--off", "refusals"], 2, "did you mean refusal"),
        (["--columns", "prompt"], 2, "prompt=question"),
        (["--near-identical", "2"], 2, "0 to 1"),
        (["--html", "/nowhere/at/all.html"], 2, "does not exist"),
        (["--write", "out.txt"], 2, "must end with .jsonl"),
        (["--split", "dev"], 2, "has no split"),
        (["--eval-data", "missing.jsonl"], 2, "missing.jsonl"),
        (["--model", "no/such/model/here"], 2, "no such folder"),
    ],
)
def test_usage_errors(tmp_path, rows, arguments, code, says):
    model = [] if "--model" in arguments else ["--model", "none"]
    result = run("check", write(tmp_path / "d.jsonl", rows), *model, *arguments)
    assert result.exit_code == code and says in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_a_row_of_another_kind_is_named(tmp_path, rows):
    rows[20]["chosen"] = 7
    result = run("check", write(tmp_path / "d.jsonl", rows), "--model", "none")
    assert result.exit_code == 1 and "row 21" in result.stderr


def test_counting_words_needs_no_torch(tmp_path, rows):
    path = write(tmp_path / "d.jsonl", rows)
    code = (
        "import sys\nfrom smoldpo.cli.data import app\n"
        f"app(['check', {path!r}, '--model', 'none'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no bar where standard error is no terminal"


def test_convert_writes_and_accounts(tmp_path, rows):
    rows[2] = {"prompt": "x", "chosen": None, "rejected": "y"}
    out = tmp_path / "out.jsonl"
    result = run("convert", write(tmp_path / "d.jsonl", rows), out, "--to", "implicit")
    assert result.exit_code == 0, result.stderr
    assert "29 pairs as implicit, from 30 rows" in result.stderr and "row 3" in result.stderr
    assert len(out.read_text().splitlines()) == 29
    assert run("convert", out, tmp_path / "o.jsonl", "--to", "implicitly").exit_code == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_counts_on_raw_hh():
    """The same figures stand in docs/data.md; twenty of the rows were checked by hand."""
    report = check_data(str(SHARED / "hh_raw_sample.jsonl.gz"), CheckOptions(), WordCounter())
    counts = {rule: rows for rule, action, rows, _ in report.by_rule() if action != "warn"}
    assert (report.rows_read, report.rows_kept) == (745, 699)
    assert counts == {
        "identical": 35,
        "empty_rejected": 6,
        "near_identical": 3,
        "not_alternating": 1,
        "prompts_differ": 1,
        "transcript_residue": 4,
    }
