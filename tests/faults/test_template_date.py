"""A run whose chat template writes the date goes on the next day, and a year later."""

import datetime
import json
import shutil

import pytest

from conftest import CHAT_TEMPLATE
from faults import planted
from smoldpo.training.prove_resume import differences

DATED = (
    "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\n' }}"
    + CHAT_TEMPLATE
)


@pytest.fixture
def dated(place, tmp_path):
    folder = tmp_path / "dated"
    shutil.copytree(place.model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(DATED)
    place.model = folder
    return place


def test_a_run_goes_on_another_day(dated):
    dated.ok(*dated.training("whole"))
    dated.killed(*dated.training("run"), at=5)
    stored = sorted((dated / "cache").rglob("*.states"))
    assert stored
    for days in (1, 366):
        name = f"run-{days}"
        shutil.copytree(dated / "run", dated / name)
        dated.ok("resume", name, plant=planted.later, planted_with=(days,))
        assert differences(dated / "whole", dated / name) == []
        assert sorted((dated / "cache").rglob("*.states")) == stored, "found again, not made anew"
        assert datetime.date.today().isoformat() in (dated / name / "config.yaml").read_text()


def test_an_evaluation_takes_the_day_of_its_run(dated):
    dated.ok(*dated.training("run", "--template-date", "2024-02-29"))
    found = json.loads((dated / "run" / "evaluation.json").read_text())
    assert found["chat_template"] == {"date": "2024-02-29"}
    card = (dated / "run" / "model" / "README.md").read_text()
    assert "always 2024-02-29" in card
    out = dated.ok("evaluate", "run", dated.pairs, "--json")
    assert '"date": "2024-02-29"' in out
    out = dated.ok("evaluate", "run", dated.pairs, "--json", "--template-date", "2023-01-01")
    assert '"date": "2023-01-01"' in out
