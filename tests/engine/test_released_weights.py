"""Frozen weights are let go once every pair went through them, and come back when something reads
them.
"""

import sys
from pathlib import Path

import pytest
import torch

import smoldpo
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.load import build_config
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import build_engine
from smoldpo.engine.fast import FastEngine
from smoldpo.losses import Objective
from smoldpo.models.freeze import freeze
from smoldpo.models.load import ModelSource, load_model
from smoldpo.models.mapped_weights import file_page_bytes, release_file_pages
from smoldpo.plan import measure
from smoldpo.plan.trial import Trial
from smoldpo.types import TokenizedPair
from wide import below, make_wide

PAIRS = [TokenizedPair(f"{n}", (5, 6, n), (8, 9, n, 2), (10, n, 2)) for n in range(20, 28)]
UNSEEN = TokenizedPair("unseen", (40, 41), (42, 2), (43, 44, 2))
FROZEN = 3

linux = pytest.mark.skipif(sys.platform != "linux", reason="lets go of pages only there")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory, tiny_tokenizer) -> Path:
    return make_wide(tmp_path_factory.mktemp("wide"), tiny_tokenizer, tied=request.param)


def engine_of(folder: Path, cache: str = "memory", reference: bool = False, **more) -> FastEngine:
    """Loaded as a run does."""
    source = ModelSource(folder.name, str(folder))
    policy = load_model(source, torch.float32)
    freeze(policy, LayerSelection(FROZEN))
    own = load_model(source, torch.float32) if reference else None
    settings = EngineSettings(torch.float32, 8, 8, 3840, cache, 0, compiled=False, **more)
    return build_engine(policy, own, settings, "start").engine


def resident(folder: Path) -> int:
    """Bytes of the weights' file that are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(folder / "model.safetensors"))
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def everything(engine: FastEngine) -> list[torch.Tensor]:
    """Log-probabilities, loss and gradients of a step."""
    result = engine.accumulate_gradients(PAIRS, Objective.of(beta=0.3))
    grads = [parameter.grad.clone() for _, parameter in engine.trainable_parameters()]
    engine.drop_gradients()
    return [result.losses, result.policy.chosen, result.reference.rejected, *grads]


def frozen_bytes(engine: FastEngine) -> int:
    return sum(w.numel() * w.element_size() for w in below(engine.policy, FROZEN))


@linux
def test_frozen_layers_leave_memory_and_a_step_does_not_miss_them(folder):
    engine = engine_of(folder)
    engine.prepare(PAIRS)
    before, wanted = resident(folder), everything(engine)
    gone = engine.release_frozen()
    frozen = frozen_bytes(engine)
    assert 0.98 * frozen < gone <= frozen
    assert before - resident(folder) > 0.9 * gone
    for ours, theirs in zip(everything(engine), wanted, strict=True):
        assert torch.equal(ours, theirs)
    engine.policy_logps(PAIRS)
    assert before - resident(folder) > 0.9 * gone, "a step has read a frozen layer"


def test_they_come_back_for_a_pair_that_was_not_there(folder):
    engine, whole = engine_of(folder), engine_of(folder)
    engine.prepare(PAIRS)
    engine.release_frozen()
    found, wanted = engine.policy_logps([UNSEEN]), whole.policy_logps([UNSEEN])
    assert torch.equal(found.chosen, wanted.chosen) and torch.equal(found.rejected, wanted.rejected)


@linux
def test_what_is_read_again_stays(folder):
    """Without kept states every step runs the frozen layers; nothing is prepared that could be let
    go.
    """
    engine = engine_of(folder, cache="off")
    engine.prepare(PAIRS)
    assert engine.release_frozen() == 0


@linux
@pytest.mark.parametrize("cache", ["off", "memory"])
def test_all_that_does_not_train_goes_while_the_engine_rests(folder, cache):
    engine = engine_of(folder, cache=cache, reference=True)
    engine.prepare(PAIRS)
    wanted = everything(engine)
    kept = [w for w in engine.policy.parameters() if not w.requires_grad]
    resting = file_page_bytes(kept) + file_page_bytes(engine.reference.parameters())
    assert engine.release_frozen(rest=True) == resting > 0
    for ours, theirs in zip(everything(engine), wanted, strict=True):
        assert torch.equal(ours, theirs)


@linux
def test_a_reference_of_its_own_goes_when_it_has_scored_all(folder):
    engine = engine_of(folder, cache="off", reference=True)
    engine.prepare(PAIRS)
    of_reference = file_page_bytes(engine.reference.parameters())
    assert engine.release_frozen() == of_reference > 2 * frozen_bytes(engine) / FROZEN
    assert file_page_bytes(engine.policy.parameters()) >= of_reference
    moving = engine_of(folder, cache="off", reference=True, sync_ref_model=True)
    moving.prepare(PAIRS)
    assert moving.release_frozen() == 0


@linux
def test_trained_weights_outlive_it(folder):
    """A page that was written to is no file's any more."""
    model = load_model(ModelSource("x", str(folder)), torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.fill_(3.0)
    assert release_file_pages(model.parameters()) > 0
    assert bool((weight == 3.0).all())


@linux
@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_the_forecast_knows_what_goes(folder, write_rows, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = [{"prompt": f"Is {n}?", "chosen": "Yes.", "rejected": "No, no."} for n in range(30)]
    given = {"model": str(folder), "data": str(write_rows(data)), "dtype": "float32"}
    given |= {"cache": cache, "generate_prompts": 0, "sample_prompt": None}
    trial = Trial(build_config(given | {"freeze_layers": 2}), 0.0)
    for frozen in (2, 3):
        engine = Trial(build_config(given | {"freeze_layers": frozen}), 0.0).models.engine
        engine.prepare(trial.data.train + trial.data.eval)
        gone = engine.release_frozen()
        assert trial.depths[frozen].released_bytes == pytest.approx(gone, rel=0.01)
        assert gone > 0.98 * sum(4 * w.numel() for w in below(engine.policy, frozen))
        resting = engine.release_frozen(rest=True)
        assert trial.depths[frozen].idle_bytes == pytest.approx(resting, rel=0.01)


def test_a_run_lets_go_before_its_first_step_and_when_training_is_over(
    tiny_folder, write_rows, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = []
    release, step = FastEngine.release_frozen, FastEngine.accumulate_gradients

    def released(self, rest=False):
        seen.append("rest" if rest else "unread")
        return release(self, rest)

    monkeypatch.setattr(FastEngine, "release_frozen", released)
    monkeypatch.setattr(
        FastEngine,
        "accumulate_gradients",
        lambda self, *args: seen.append("step") or step(self, *args),
    )
    data = [{"prompt": f"Is {n}?", "chosen": "Yes.", "rejected": "No, no."} for n in range(30)]
    given = {"model": str(tiny_folder), "data": str(write_rows(data)), "dtype": "float32"}
    given |= {"freeze_layers": 2, "max_steps": 2, "generate_prompts": 0, "sample_prompt": None}
    smoldpo.train(build_config(given | {"output_dir": str(tmp_path / "run")}))
    # Before the model is loaded to be saved, and to answer.
    assert seen == ["unread", "step", "step", "rest", "rest"]


@linux
def test_what_answers_take_is_measured_with_all_weights_there(folder, write_rows, monkeypatch):
    """Pages that come in while answers are drawn would seem to be taken by drawing them."""
    data = [{"prompt": f"Is {n}?", "chosen": "Yes.", "rejected": "No, no."} for n in range(30)]
    given = {"model": str(folder), "data": str(write_rows(data)), "dtype": "float32"}
    config = build_config(given | {"generate_prompts": 2, "max_new_tokens": 4, "cache": "memory"})
    trial = Trial(config, 0.0)
    release_file_pages(trial.models.engine.policy.parameters())
    there, read = [], measure.resident
    monkeypatch.setattr(measure, "resident", lambda: there.append(resident(folder)) or read())
    measure.measure_run_end(config, trial.models, trial.data)
    assert there[0] > 0.98 * trial.models.trainable.policy_bytes
