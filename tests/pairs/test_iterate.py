"""`smoldpo iterate` on a tiny model: rounds, references, what a kill leaves, when it ends."""

import json

import pytest
import yaml

from smoldpo.pairs.iterate import split_prompts
from smoldpo.pairs.prompts import AskedPrompt, Prompts
from smoldpo.pairs.rank import Ranking
from smoldpo.pairs.rounds import PolicyComparison, RoundResult, WinRate, passing_share, report
from smoldpo.utils.errors import UsageError

WORDS = (
    "--check", "max_words=4", "--judge", "length", "--weights", "1,3", "--num-answers", 3,
    "--max-new-tokens", 6, "--dtype", "float32", "--freeze-layers", 2, "--max-steps", 2,
    "--learning-rate", 3e-3, "--eval-fraction", 0.4, "--compile", "off",
)  # fmt: skip


@pytest.fixture
def iterate(cli, tmp_path, tiny_folder):
    lines = [f"Is {number} a number?" for number in range(24)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))

    def run(*more, code=0):
        result = cli(
            "iterate", "prompts.txt", "--model", tiny_folder, "--output-dir", "out", *WORDS, *more
        )
        assert result.code == code, result.err
        return result

    return run


@pytest.fixture
def always_real(monkeypatch):
    """Two steps of a tiny model gain nothing, and rounds would end after the first."""
    monkeypatch.setattr(RoundResult, "is_real", property(lambda _: True))


def test_each_round_begins_with_the_last_ones_policy(iterate, always_real, tmp_path, tiny_folder):
    said = json.loads(iterate("--rounds", 2, "--reference-of-round", "start", "--json").out)
    assert said["stopped"] == "2 rounds were asked for" and said["kept"].endswith("round-2/run")
    out = tmp_path / "out"
    first, second = (
        yaml.safe_load((out / f"round-{n}" / "run" / "config.yaml").read_text()) for n in (1, 2)
    )
    assert (first["model"], first["reference"]) == (str(tiny_folder), None)
    assert (second["model"], second["reference"]) == ("out/round-1/run", str(tiny_folder))
    assert first["learning_rate"] == 3e-3 and first["eval_fraction"] == 0.2
    rows = [json.loads(line) for line in (out / "round-2" / "pairs.jsonl").open()]
    assert {row["source"] for row in rows} == {"round-2"}
    assert {row["provenance"]["chosen"]["model"] for row in rows} == {"out/round-1/run"}
    found = said["rounds"]
    assert [each["number"] for each in found] == [1, 2] and found[0]["pairs"] > 5
    assert found[0]["against_start"] == found[0]["against_last"]
    won = found[1]["against_start"]["won"]
    assert won["wins"] + won["losses"] + won["ties"] >= 5
    assert len({each["against_start"]["passing"]["start"] for each in found}) == 1
    page = (out / "report.md").read_text()
    assert "| 2 |" in page and "Kept: out/round-2/run." in page
    # The same command finds all of it done, and one with more rounds goes on.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "round-2" / "pairs.jsonl").unlink()
    (out / "round-2" / "run" / "resume.json").unlink()  # as if killed while it made pairs
    again = json.loads(iterate("--rounds", 2, "--reference-of-round", "start", "--json").out)
    assert again == said
    assert set(out.rglob("*.safetensors")) == set(before)
    kept = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
    assert all("round-1" in str(path) for path in kept) and kept
    result = iterate("--rounds", 2, "--seed", 7, "--reference-of-round", "start", code=2)
    assert "began otherwise (sampling, settings)" in result.err


def test_rounds_end_where_nothing_is_gained(iterate, tmp_path):
    result = iterate("--rounds", 3, "--learning-rate", 1e-9)
    assert "Ended: round 1 is no real gain over the round before. No round is kept." in result.out
    assert not (tmp_path / "out" / "round-2").exists()
    assert json.loads((tmp_path / "out" / "iterate.json").read_text())["kept"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x.jsonl"], "data: each round of iterate has its own"),
        (["--learning-rat", "1"], "did you mean learning_rate"),
        (["--reference-of-round", "first"], "last, start"),
        (["--eval-prompts", "prompts.txt"], "0 prompts to train on"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_made(iterate, tmp_path, words, message):
    assert message in iterate(*words, code=2).err
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_held_out_are_not_trained_on():
    asked = [AskedPrompt(f"Is {n} a number?") for n in range(50)]
    train, held = split_prompts(Prompts(asked, 0, 0), None, 0.3)
    assert len(train) + len(held) == 50 and 5 < len(held) < 25
    train, held = split_prompts(
        Prompts(asked, 0, 0), Prompts([AskedPrompt("is 3  a NUMBER?")], 0, 0), 0.3
    )
    assert len(train) == 49 and len(held) == 1
    with pytest.raises(UsageError, match="held out"):
        split_prompts(Prompts(asked[:1], 0, 0), None, 0.3)


def won(value, p, share=None, alarms=()):
    rate = WinRate(value, value - 0.1, value + 0.1, 6, 2, 2, p)
    return PolicyComparison(rate, share, list(alarms))


def test_a_gain_is_real_where_it_is_a_gain_and_not_chance():
    cases = [(0.7, 0.01, True), (0.7, 0.06, False), (0.3, 0.01, False)]
    for value, p, real in cases:
        found = RoundResult(1, 9, won(0.9, 0.001), won(value, p))
        assert found.is_real is real
    share = passing_share([0.0] * 10 + [1.0] * 10, [1.0] * 9 + [0.0] + [1.0] * 10, 1)
    assert (share.start, share.policy) == (0.5, 0.95) and share.change == pytest.approx(0.45)
    assert share.p == pytest.approx(2 / 2**9) and share.low > 0.2
    page = report(
        [RoundResult(1, 9, won(0.9, 0.001, share, ["It no longer ends."]), won(0.7, 0.01))],
        Ranking.of([], ["ends"]), 20, "out/round-1/run", "enough",
    )  # fmt: skip
    assert "| 1 | 95.0% | 50.0% | +45.0 (" in page and "Alarm, round 1: It no longer ends." in page
    assert "Ended: enough. Kept: out/round-1/run." in page


def test_two_models_compared_on_prompts(cli, tmp_path, tiny_folder, iterate):
    (tmp_path / "few.txt").write_text("One?\nTwo?\nThree?")
    words = ("--check", "max_words=4", "--max-new-tokens", 6, "--dtype", "float32")
    result = cli(
        "pairs", "compare", tiny_folder, tiny_folder, "few.txt", *words, "--output", "c.json"
    )
    assert result.code == 0, result.err
    assert "its answers win 50.0% (" in result.out and "0 won, 0 lost, 3 tied" in result.out
    said = json.loads((tmp_path / "c.json").read_text())
    assert said["passing"]["change"] == 0 and said["won"]["p"] == 1 and said["prompts"] == 3
    assert len({each["sha256"] for each in said["models"]}) == 1
    again = cli(
        "pairs", "compare", tiny_folder, tiny_folder, "few.txt", *words, "--output", "c.json"
    )
    assert again.out == result.out and "3 answers were drawn before" in again.err
