"""A sweep's page and tables, from made-up trials: figures are there, nothing runs, and it fits a
phone.
"""

import json
import re

import numpy as np
import pytest

from browser import BROWSER, Watched
from smoldpo.evaluation.statistics import paired_test
from smoldpo.sweep import report
from smoldpo.sweep.report import html_page
from smoldpo.sweep.results import DONE, FAILED, FinalResult, TrialRecord, as_csv, collect
from smoldpo.sweep.space import Choices, Range, at_random

pytestmark = pytest.mark.pictures
HOSTILE = "<img src=x onerror=alert(5)>"
SPACE = {
    "beta": Choices((0.05, 0.1, 0.3)),
    "learning_rate": Range(1e-5, 1e-3, log=True),
    "model": Choices(("builtin", f"a/folder/{HOSTILE}")),
    "loss_type": Choices((["sigmoid"], ["sigmoid", "sft"])),
}


def share(value):
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def accuracy(after):
    return {
        "before": {"value": 0.5, "low": None, "high": None}, "after": share(after),
        "change": share(after - 0.5), "improved": 1, "worsened": 0, "test": "exact", "p": 0.5,
        "p_corrected": 0.5, "words": "it looks like chance",
    }  # fmt: skip


def made_up(folder, space=SPACE, count=12, pairs=120):
    """results.json of trials whose accuracy grows with beta; the last one failed."""
    rng = np.random.default_rng(0)
    records, folders = [], {}
    for number, settings in enumerate(at_random(space, count, 0), 1):
        if number == count:
            error = f"not finite {HOSTILE}"
            records.append(
                TrialRecord(
                    number=number, settings=settings, status=FAILED, error=error, seconds=3.0
                )
            )
            continue
        right = rng.random(pairs) < 0.5 + settings["beta"]
        rows = [
            {
                "id": f"p{n}", "prompt": f"q{n // 2}",
                "after": {
                    "id": f"p{n}", "chosen_logp": -5.0 + (1 if yes else -1), "rejected_logp": -5.0,
                    "chosen_tokens": 3, "rejected_tokens": 3,
                    "reference_chosen_logp": -5.0, "reference_rejected_logp": -5.0,
                },
            }
            for n, yes in enumerate(right)
        ]  # fmt: skip
        folders[number] = folder / f"{number:03d}"
        folders[number].mkdir(parents=True)
        (folders[number] / "evaluation.json").write_text(json.dumps({"pairs": rows}))
        found = {"reward": accuracy(float(right.mean()))}
        records.append(
            TrialRecord(
                number=number,
                settings=settings,
                status=DONE,
                value=right.mean(),
                accuracy=found,
                steps=20,
                seconds=12.5,
            )
        )
    part = accuracy(0.71) | {"p_corrected": 0.0004, "words": "very unlikely to be chance"}
    side = {"before": -9.0, "after": -8.0, "change": share(1.0), "per_token": share(0.1)}
    drift = {"chosen": side, "rejected": side, "perplexity_chosen": {"before": 2.0, "after": 1.9}}
    final = {
        "trial": 1, "n": 99, "prompts": 60, "metric": "reward", "headline": "h",
        "verdict": "change", "accuracy": {"reward": part, "logp": part}, "baselines": {},
        "drift": drift, "judges": [],
    }  # fmt: skip
    about = {
        "name": f"mine {HOSTILE}", "metric": "reward", "method": "random", "planned": count,
        "train": {"pairs": 900, "prompts": 800}, "validation": {"pairs": pairs,
         "prompts": pairs // 2},
        "final_pairs": {"pairs": 99, "prompts": 60},
    }  # fmt: skip
    return collect(about, records, folders, FinalResult.model_validate(final))


@pytest.fixture
def results(tmp_path):
    return made_up(tmp_path)


@pytest.fixture
def page(results):
    return html_page(results, SPACE, f"sweep: {HOSTILE}\n")


def test_every_trial_and_figure_is_there(results, page):
    for trial in results.trials[:-1]:
        assert f'<data value="{trial.accuracy.value}">' in page
        assert f"Trial {trial.number}</th>" in page
    order = [int(n) for n in re.findall(r'<th scope="row">Trial (\d+)', page)]
    accuracy = {t.number: t.accuracy.value for t in results.trials if t.accuracy}
    assert order[0] == results.winner and order[-1] == 12
    assert [accuracy[n] for n in order[:-1]] == sorted(accuracy.values(), reverse=True)
    assert "99 final pairs" in page and "0.71" in page and "1 failed" in page
    assert "all 55 pairs of trials" in page, "11 are done"
    assert 'href="best/report.html"' in page


def test_texts_are_escaped_and_nothing_runs(page):
    assert HOSTILE not in page and "&lt;img src=x" in page
    assert "<script" not in page and page.count("<svg role") == 2
    assert not re.search(r"""(?:src|href)=["'](?!#|best/report\.html)""", page)


def test_long_values_are_letters_that_the_page_explains(results):
    plot = report.parallel_coordinates(results, SPACE)
    assert "folder" not in plot.svg and "onerror" not in plot.svg and "sigmoid,sft" not in plot.svg
    assert "model: a is builtin, b is a/folder/" in plot.note
    assert "loss_type: a is sigmoid, b is sigmoid,sft" in plot.note


def test_p_values_take_prompts_as_a_whole(tmp_path, results):
    """Each prompt has two pairs here; with pairs on their own the p-values would be others."""
    winner, scores = results.winner, {}
    other = 1 if winner != 1 else 2
    for number in (winner, other):
        path = tmp_path / f"{number:03d}" / "evaluation.json"
        rows = json.loads(path.read_text())["pairs"]
        scores[number] = [float(row["after"]["chosen_logp"] > -5) for row in rows]
    prompts = [row["prompt"] for row in rows]
    p = paired_test(scores[other], scores[winner], prompts).p
    alone = paired_test(scores[other], scores[winner], list(map(str, range(120)))).p
    assert results.trials[other - 1].p == pytest.approx(p) and p != pytest.approx(alone)


def test_the_map_shows_beta_and_rate_or_two_numbers_or_nothing(tmp_path, results):
    assert report.settings_map(results, SPACE).title == "Accuracy over β and learning rate"
    two = {
        "beta": Choices((0.1, 0.2)),
        "seed": Choices((1, 2, 3)),
        "max_length": Choices((64, 128)),
    }
    assert (
        report.settings_map(made_up(tmp_path / "two", two), two).title == "Accuracy over β and seed"
    )
    assert report.map_settings({"beta": Choices((0.1,)), "loss_type": Choices((["ipo"],))}) is None


def test_axes():
    axis = report.Axis("learning_rate", Choices((1e-5, 1e-4, 1e-3)))
    assert axis.log and [axis.at(v) for v in (1e-5, 1e-4, 1e-3)] == pytest.approx([0, 0.5, 1])
    axis = report.Axis("freeze_layers", Choices((10, 15, 20)))
    assert not axis.log and axis.at(15) == 0.5
    axis = report.Axis("warmup_steps", Choices((None, 5)))
    assert not axis.numeric and axis.at(None) == 0 and axis.ticks() == [(0, "none"), (1, "5")]
    assert report.Axis("seed", Choices((3,))).at(3) == 0.5
    rate = report.Axis("learning_rate", Range(1e-5, 1e-3, log=True))
    assert [text for _, text in rate.ticks()] == ["1e-05", "0.0001", "0.001"]
    many = report.Axis("seed", Choices(tuple(range(50)))).ticks()
    assert len(many) == 6 and many[0] == (0, "0") and many[-1] == (1, "49")


def test_the_table_for_spreadsheets(results):
    lines = as_csv(results).splitlines()
    assert len(lines) == 13 and lines[0].startswith(
        "trial,status,standing,beta,learning_rate,model"
    )
    results.trials[0].error = "=1+1"
    assert "'=1+1" in as_csv(results)


def test_the_answer_in_words(results):
    assert results.headline.startswith(f"Trial {results.winner} is the best of 11: beta 0.3")
    assert "On 99 final pairs, which no trial saw" in results.headline
    text = " ".join(results.explanations)
    assert "all 55 pairs of trials" in text and "at most one sweep in twenty" in text
    assert results.worse and results.as_good
    for number in results.worse:
        assert results.trials[number - 1].p_corrected < 0.05


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
@pytest.mark.parametrize("width", [360, 1100])
def test_it_fits_and_asks_for_nothing(browser, page, tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(page)
    watched = Watched(browser, path, viewport={"width": width, "height": 800})
    wide = watched.page.evaluate("document.documentElement.scrollWidth")
    watched.page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert wide <= width
    assert watched.requests == [path.as_uri()] and watched.trouble == []
    watched.page.close()
