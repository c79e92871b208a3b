"""`smoldpo pairs make`: pairs that can be made again, interruptions, several models, judges."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from smoldpo.data.load import load_pairs
from smoldpo.models.load import find_model, load_model
from smoldpo.models.weights import weights_sha256
from smoldpo.pairs.sample import answer_seed

PROMPTS = ["How do I boil an egg?", "Is 7 a number?", "What does the fox do?", "Where is the bank?"]


@pytest.fixture
def make(cli, tmp_path, tiny_folder):
    """`pairs make` of a tiny model's short answers; returns what was said and the rows."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(*more, code=0, output="pairs.jsonl", model=(tiny_folder,), judge="length"):
        words = [word for name in model for word in ("--model", name)]
        words += ["--judge", judge] if judge else []
        result = cli(
            "pairs", "make", "prompts.txt", "--output", output, *words,
            "--max-new-tokens", 6, "--batch-size", 3, "--dtype", "float32", *more,
        )  # fmt: skip
        assert result.code == code, result.err
        path = tmp_path / output
        rows = [json.loads(line) for line in path.open()] if path.exists() else []
        return result, rows

    return run


def test_pairs_are_read_as_pairs_and_say_how_they_were_made(make, tiny_folder):
    result, rows = make("--num-answers", 3, "--top-p", 0.9, "--temperature", 0.8, "--json")
    said = json.loads(result.out)
    assert said["prompts"] == 4 and said["answers"] == 12 and said["pairs"] == len(rows)
    assert len(rows) + sum(said["dropped"].values()) == 4 and len(rows) >= 3
    import torch

    sha256 = weights_sha256(load_model(find_model(str(tiny_folder)), torch.float32))
    for row in rows:
        assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
        made = row["provenance"]
        assert made["chosen"]["sha256"] == made["rejected"]["sha256"] == sha256
        assert made["chosen"]["scores"]["length"] > made["rejected"]["scores"]["length"]
        assert made["chosen"]["number"] != made["rejected"]["number"]
        assert made["settings"] == {
            "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 6, "dtype": "float32",
            "seed": 42, "num_answers": 3,
        }  # fmt: skip
    loaded = load_pairs("pairs.jsonl")
    assert loaded.account.columns_not_read == []
    assert [pair.prompt for pair in loaded.pairs] == [
        row["prompt"][0]["content"] for row in rows
    ], "prompts of a text file stay text"
    assert {pair.source for pair in loaded.pairs} == {f"made:{tiny_folder}"}
    assert len({answer_seed(s, n) for s in (42, 43) for n in range(4)}) == 8


def test_an_interrupted_call_goes_on_and_ends_with_the_same_pairs(make, tmp_path):
    _, whole = make("--num-answers", 2, "--threads", 2)
    journal = tmp_path / "pairs.jsonl.answers"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert sum(b'"text"' in line for line in lines) == 8
    (tmp_path / "pairs.jsonl").unlink()
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # four answers, and one torn off
    result, again = make("--num-answers", 2)
    assert "4 answers were drawn before" in result.err and again == whole
    kept = [json.loads(line) for line in journal.open()][1:]
    drawn = Counter((row["prompt"], row["number"]) for row in kept if "text" in row)
    assert len(drawn) == 8 and set(drawn.values()) == {1}, "no answer is written twice"
    assert [json.loads(line) for line in lines[1:5]] == kept[:4]


def test_another_check_needs_no_new_answers_and_other_answers_are_refused(make, tmp_path):
    make("--num-answers", 2)
    before = (tmp_path / "pairs.jsonl.answers").read_bytes()
    result, _ = make(code=2)
    assert "pairs.jsonl: exists" in result.err
    result, rows = make("--num-answers", 2, "--check", "max_words=99", "--overwrite")
    assert "8 answers were drawn before" in result.err
    assert set(rows[0]["provenance"]["weights"]) == {"length", "max_words=99"}
    assert (tmp_path / "pairs.jsonl.answers").read_bytes() == before, "judged before, too"
    (tmp_path / "pairs.jsonl").unlink()
    result, _ = make("--num-answers", 3, "--seed", 1, code=2)
    assert "num_answers: 2 then, 3 now" in result.err and "seed: 42 then, 1 now" in result.err
    assert (tmp_path / "pairs.jsonl.answers").read_bytes() == before
    make("--num-answers", 3, "--seed", 1, "--overwrite")


def test_two_models_are_ranked_together(make, tiny_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(20)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "other")
    _, rows = make("--num-answers", 2, "--pairs", "all", model=(tiny_folder, "other"))
    sides = [(row["provenance"]["chosen"], row["provenance"]["rejected"]) for row in rows]
    assert {a["model"] != b["model"] for a, b in sides} == {True, False}
    hashes = {each["model"]: each["sha256"] for both in sides for each in both}
    assert len(set(hashes.values())) == 2


def test_where_nothing_is_left_the_reasons_are_told_and_the_answers_stay(make, tmp_path):
    result, rows = make("--num-answers", 2, "--check", "contains=xylophone", code=1)
    assert "no pair is left of 4 prompts (dropped: 4 all fail)" in result.err and not rows
    assert (tmp_path / "pairs.jsonl.answers").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "pairs.csv"], "must end with .jsonl"),
        (["--pairs", "most"], "best-worst, all"),
        (["--weights", "1,x"], "must be numbers"),
        (["--check", "max_wrods=3"], "did you mean max_words"),
        (["--template-date", "soon"], "template_date"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(make, tmp_path, words, message):
    result, _ = make(*words, code=2)
    assert message in result.err
    assert not list(tmp_path.glob("*.answers"))


@pytest.fixture
def endpoint():
    """A local endpoint that prefers the longer answer, but A where answers are of like length."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(json.loads(body)["messages"][1]["content"])
            given = (rf"\[answer {x} \w+\]\n(.*?)\n\[end of answer {x} " for x in "AB")
            first, second = (re.search(each, asked[-1], re.DOTALL)[1] for each in given)
            lead = len(first) - len(second)
            message = {"role": "assistant", "content": "B" if lead < -3 else "A"}
            reply = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_once_in_both_orders_and_its_disagreement_is_told(make, endpoint):
    url, asked = endpoint
    result, rows = make("--num-answers", 3, "--json", judge=url)
    said = json.loads(result.out)
    assert rows and len(asked) == 2 * 4 * 3, "both orders of three comparisons of four prompts"
    assert 0 < said["disagreement"][url] < 1
    for row in rows:
        lengths = [len(row[side][0]["content"]) for side in ("chosen", "rejected")]
        assert lengths[0] > lengths[1]
    make("--num-answers", 3, "--check", "max_words=99", "--overwrite", judge=url)
    assert len(asked) == 24, "its verdicts are in the journal"
