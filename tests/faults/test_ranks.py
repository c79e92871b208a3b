"""Faults 7, 11, 25 and 26: several ranks are told to stop, lose one, or meet trouble on one.

Ranks are forked from the server of child.py, with the variables that torchrun sets.
"""

import json
import signal
import time

import torch
from safetensors.torch import load_file

from faults import planted
from rank_processes import variables
from smoldpo.training.checkpoint import saved_steps, verify
from smoldpo.training.prove_resume import differences, metrics


def start(place, count, *words, plants=None):
    """The same command on so many ranks; `plants` by rank, as for child.start."""
    told = {rank: {"plant": p, "planted_with": a} for rank, (p, *a) in (plants or {}).items()}
    return [
        place.start(*words, environment=environment, **told.get(rank, {}))
        for rank, environment in enumerate(variables(count))
    ]


def ended(ranks):
    """Exit codes, and what each rank said."""
    return [rank.wait(120) for rank in ranks], [rank.said for rank in ranks]


def test_one_run_on_one_two_and_one_rank(place, whole):
    """Fault 11: stopped twice, each time on one rank; the same pairs, and the same bits."""
    words = place.training("run", "--save-steps", "none")
    code, said = place.run(*words, plant=planted.signal_in, planted_with=("step", signal.SIGTERM))
    assert code == 143, said
    stop = {1: (planted.signal_in, "step", signal.SIGINT)}
    codes, said = ended(start(place, 2, "resume", "run", plants=stop))
    assert codes == [130, 130], said
    assert "interrupted after 8 steps" in said[0] and not said[1]
    assert saved_steps(place / "run" / "checkpoints") == [4, 8]
    place.ok("resume", "run")
    assert differences(whole, place / "run") == []


def test_a_killed_rank_ends_all(place, whole):
    """Fault 25: the others end, name it, and save; three ranks go on where four were."""
    ranks = start(place, 4, *place.training("run"), plants={2: (planted.kill_in_step, 6)})
    assert ranks[2].wait() == -signal.SIGKILL
    begun = time.monotonic()
    codes, said = ended(ranks)
    assert codes == [1, 1, -signal.SIGKILL, 1], said
    assert time.monotonic() - begun < 30
    assert "rank 2 (process" in said[0] and "stopped after 6 steps" in said[0]
    assert verify(place / "run" / "checkpoints" / "step-6")
    codes, said = ended(start(place, 3, "resume", "run"))
    assert codes == [0, 0, 0], said
    assert "goes on after step 6 of 12" in said[0] and not said[1]
    assert differences(whole, place / "run") == []


def test_trouble_on_one_rank(place, whole):
    """Fault 26: without memory both do it again; no number, or a full disk, is the end of both."""
    tight = {1: (planted.memory_runs_out_once, 2)}
    words = place.training("tight")
    codes, said = ended(start(place, 2, *words, plants=tight))
    assert codes == [0, 0] and "out of memory in step 3: done again" in said[0], said
    pairs = [row["pairs"] for row in metrics(whole) if "pairs" in row]
    assert [row["pairs"] for row in metrics(place / "tight") if "pairs" in row] == pairs

    codes, said = ended(
        start(place, 2, *place.training("nan"), plants={1: (planted.not_a_number_in_step, 2)})
    )
    assert codes == [1, 1] and "step 3: the loss or its gradient is not finite" in said[0], said
    assert not said[1] and json.loads((place / "nan" / "not_finite.json").read_text())["step"] == 3

    full = {0: (planted.disk_fills_after_saves, 1)}
    codes, said = ended(start(place, 2, *place.training("full"), plants=full))
    assert codes == [1, 1] and "the disk is full" in said[0] and not said[1]
    assert saved_steps(place / "full" / "checkpoints") == [2]


def test_ranks_with_other_pairs_are_refused(place):
    first, second = variables(2)
    other = place / "other.jsonl"
    other.write_text((place / "pairs.jsonl").read_text().replace("Yes", "Yea"))
    words = place.training("run")
    ranks = [place.start(*words, environment=first)]
    words[words.index("--data") + 1] = other
    ranks.append(place.start(*words, environment=second))
    codes, said = ended(ranks)
    assert codes == [2, 2] and "rank 1 would not compute the same run as rank 0" in said[0]
    assert "the preference pairs" in said[0] and not (place / "run").exists()


def plain_and_sharded(place, *more):
    """The words of a run on the plain engine, which is made, and of the same with FSDP2."""
    words = place.training("whole", "--eval-steps", "none", *more)
    place.ok(*words, "--engine", "plain")
    return [*("run" if word == "whole" else word for word in words), "--fsdp", "true"]


def assert_close(place):
    """Both runs ended with the same weights and optimizer state, up to rounding."""
    for part in ("weights", "optimizer"):
        one, other = (
            load_file(place / run / "checkpoints" / "step-12" / f"{part}.safetensors")
            for run in ("whole", "run")
        )
        assert one.keys() == other.keys()
        for name, each in one.items():
            torch.testing.assert_close(other[name], each, rtol=1e-4, atol=2e-6)
    (saved,) = (place / "run" / "model").glob("*model.safetensors")
    assert load_file(saved).keys() == load_file(place / "whole" / "model" / saved.name).keys()


def test_shared_out_weights_go_on_with_any_number_of_ranks(place):
    """FSDP2 on two ranks, stopped; then on three; then whole on one."""
    words = plain_and_sharded(place)
    told = (planted.signal_after_step, 3, signal.SIGTERM)
    codes, said = ended(start(place, 2, *words, plants={1: told}))
    assert codes == [143, 143] and "interrupted after 3 steps" in said[0], said
    told = (planted.signal_after_step, 7, signal.SIGTERM)
    codes, said = ended(start(place, 3, "resume", "run", plants={2: told}))
    assert codes == [143] * 3 and "goes on after step 3 of 12" in said[0], said
    assert "goes on after step 7 of 12" in place.ok("resume", "run")
    assert_close(place)


def test_adapters_over_shared_out_weights(place):
    """LoRA under FSDP2, to the end: the saved adapter, and answers of the tuned policy."""
    more = ("--use-peft", "true", "--lora-r", 2, "--generate-prompts", 1, "--max-new-tokens", 4)
    codes, said = ended(start(place, 2, *plain_and_sharded(place, *more)))
    assert codes == [0, 0] and not said[1], said
    assert_close(place)
    texts = [(place / run / "samples.jsonl").read_text() for run in ("whole", "run")]
    assert texts[0] == texts[1]
