"""TRL's DPOTrainer as an oracle. benchmarks/compare_with_trl.py is the same on any number of pairs."""

import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_with_trl as compare


def test_ten_losses_equal_trls_on_a_tiny_model(tiny_folder, pairs_file):
    source = compare.find_model(str(tiny_folder))
    pairs = compare.read_pairs(str(pairs_file), source, 40, 512)
    config = compare.settings(40, 10, 2).model_copy(update={"learning_rate": 1e-3})
    ours = compare.our_losses(source, pairs, config)
    theirs = compare.trl_losses(source, pairs, config)
    assert len(ours) == 10 and len(set(ours)) > 5, "ten different losses, or nothing is compared"
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.real
def test_log_probabilities_of_real_pairs(real, shared):
    pairs = compare.read_pairs(str(shared / "hh_helpful_dev.jsonl"), real, 4, 1024)
    assert compare.logps_difference(real, pairs) < 1e-4


@pytest.mark.real
def test_losses_of_real_weights_equal_trls(real, shared):
    pairs = compare.read_pairs(str(shared / "hh_helpful_dev.jsonl"), real, 4, 192)
    config = compare.settings(4, 2, 2).model_copy(update={"warmup_steps": 0})
    ours = compare.our_losses(real, pairs, config)
    theirs = compare.trl_losses(real, pairs, config)
    assert ours[0] != ours[1]
    assert ours == pytest.approx(theirs, rel=1e-3)
