"""Uploads to the hub: what goes, what stays, and what breaks off; a small hub answers."""

import hashlib
import json

import pytest
from hub_stand_in import Hub
from huggingface_hub import ModelCard, constants

from conftest import rows

ARGUMENTS = ("--to", "hub", "--repo", "me/mine")
TOKEN = "hf_" + "s" * 34


@pytest.fixture
def hub(monkeypatch):
    """The hub that the library asks, and a token for it."""
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    yield made
    made.server.shutdown()


@pytest.fixture
def run(golden, tmp_path):
    return golden("export", tmp_path, "--max-steps", "2")[1]


def test_what_goes_arrives_and_texts_stay(cli, run, hub):
    result = cli("export", run, *ARGUMENTS)
    assert result.code == 0, result.err
    assert result.out.strip().startswith(f"{hub.url}/me/mine/commit/")
    assert hub.repos["me/mine"]["visibility"] == "private" or hub.repos["me/mine"]["private"]
    assert hub.files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    names = {"README.md", "report.html", "SHA256SUMS", "config.json", "tokenizer.json"}
    assert names <= hub.files.keys() and "samples.jsonl" not in hub.files
    for line in hub.files["SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(hub.files[name]).hexdigest() == digest
    written = b"".join(content for name, content in hub.files.items() if "token" not in name)
    for row in rows(40):
        assert not any(text.encode() in written for text in row.values() if len(text) > 12)
    assert str(run.parent).encode() not in hub.files["README.md"]
    assert TOKEN not in result.err + result.out and TOKEN.encode() not in written
    assert {asked for _, asked in hub.asked} >= {f"Bearer {TOKEN}"}


def test_the_card_says_how_sure_its_figures_are(cli, run, hub):
    assert cli("export", run, *ARGUMENTS, "--public").code == 0
    data = ModelCard(hub.files["README.md"].decode()).data
    said = json.loads((run / "evaluation.json").read_text())["accuracy"]["reward"]["after"]
    found = {result.metric_name: result for result in data.eval_results}
    reward = next(result for name, result in found.items() if "reward" in name)
    assert reward.metric_value == round(said["value"], 4)
    assert (reward.metric_args["low"], reward.metric_args["high"]) == (said["low"], said["high"])


def test_a_dry_run_asks_nothing(cli, run, hub):
    result = cli("export", run, *ARGUMENTS, "--dry-run", "--with-texts", "--json")
    assert result.code == 0 and not hub.asked, result.err
    said = json.loads(result.out)
    assert said["files"]["model.safetensors"] > 1000 and "evaluation.json" in said["files"]
    assert said["private"] is True and said["url"] is None


def test_an_upload_that_broke_off_goes_on(cli, run, hub):
    hub.fails["commit"] = 503
    result = cli("export", run, *ARGUMENTS)
    assert result.code == 1 and "call it again" in result.err, result.err
    assert not hub.files and len(hub.large) == 1
    hub.fails.clear()
    del hub.asked[:]
    assert cli("export", run, *ARGUMENTS).code == 0
    assert "model.safetensors" in hub.files
    assert "store" not in {name for name, _ in hub.asked}, "the large file went once"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("refused", "the hub refuses (403); log in"),
        ("not reached", "the hub is not reached"),
        ("another file", "did not arrive as it is here"),
    ],
)
def test_what_fails_is_said(cli, run, hub, monkeypatch, what, says):
    if what == "refused":
        hub.fails["create"] = 403
    if what == "not reached":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if what == "another file":
        hub.on_paths_info = lambda body: [
            entry | {"size": 1} for entry in Hub.on_paths_info(hub, body)
        ]
    result = cli("export", run, *ARGUMENTS)
    assert result.code == 1 and says in result.err, result.err
    assert TOKEN not in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "hub"), "--repo: give"),
        (("--to", "hub", "--repo", "mine"), "give OWNER/NAME"),
        (("--to", "gguf", "--repo", "me/mine"), "are for --to hub"),
        (ARGUMENTS, "is no run; `hf upload me/mine"),
    ],
)
def test_what_cannot_be_is_said_at_once(cli, tiny_folder, words, says):
    result = cli("export", tiny_folder, *words)
    assert result.code == 2 and says in result.err
