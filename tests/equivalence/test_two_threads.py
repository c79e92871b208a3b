"""Two models at once, each in a thread of its own: the bits of each are those that it gives
alone.
"""

import copy
import threading

import pytest
import torch
import transformers
from test_fast_engine import LOSS, PAIRS, SHAPE

import smoldpo
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.kernels.layers import own_modules, rotary
from smoldpo.engine.precision import MasterWeights
from smoldpo.models.freeze import freeze

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": ROPE}),
    "qwen3": (
        transformers.Qwen3Config,
        {"head_dim": 8, "rope_parameters": ROPE | {"rope_theta": 50.0}},
    ),
    # One rope that changes with the stream's length, on its own module.
    "llama-longrope": (
        transformers.LlamaConfig,
        {
            "rope_parameters": ROPE
            | {
                "rope_type": "longrope",
                "original_max_position_embeddings": 16,
                "factor": 4.0,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [3.0, 4.0, 5.0, 6.0],
            },
            "max_position_embeddings": 64,
        },
    ),
}


def build(family):
    config_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_class(**SHAPE | extra)).eval()


def steps(model, frozen=2, pairs=PAIRS):
    """Three steps of an engine: its losses, log-probabilities, gradients and weights."""
    model = copy.deepcopy(model)
    freeze(model, LayerSelection(frozen))
    engine = FastEngine(
        model, MasterWeights(model, torch.float32), settings=EngineSettings(stream_tokens=60)
    )
    found = []
    for _ in range(3):
        losses, policy, reference = engine.accumulate_gradients(pairs, LOSS)
        found += [losses, policy.chosen, policy.rejected, reference.chosen, reference.rejected]
        with torch.no_grad():
            for _, weight in engine.trainable_parameters():
                found.append(weight.grad.clone())
                weight -= 0.1 * weight.grad
                weight.grad = None
        engine.updated()
    return found + [weight.detach().clone() for weight in model.parameters()]


def logps(model, pairs=PAIRS):
    with torch.no_grad():
        found = smoldpo.sequence_logps(model, pairs, stream_tokens=40)
    return [found.chosen, found.rejected]


def at_once(*tasks, times=4):
    """What the tasks give, each done `times` times in a thread of its own, all begun together."""
    results, start = [[] for _ in tasks], threading.Barrier(len(tasks))

    def work(task, into):
        torch.set_num_threads(1)
        start.wait()
        into += [task() for _ in range(times)]

    threads = [
        threading.Thread(target=work, args=both) for both in zip(tasks, results, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(each) for each in results] == [times] * len(tasks), "a thread failed"
    return results


def assert_same_bits(found, expected):
    for each in found:
        assert all(torch.equal(one, other) for one, other in zip(each, expected, strict=True))


def test_steps_of_two_families():
    models = [build("llama"), build("qwen3")]
    tasks = [lambda model=model: steps(model) for model in models]
    alone = [task() for task in tasks]
    assert not torch.equal(alone[0][1], alone[1][1])
    for found, expected in zip(at_once(*tasks), alone, strict=True):
        assert_same_bits(found, expected)


def test_log_probabilities_of_two_families():
    models = [build("llama"), build("qwen3")]
    tasks = [lambda model=model: logps(model) for model in models]
    alone = [task() for task in tasks]
    for found, expected in zip(at_once(*tasks, times=10), alone, strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_under_one_model(family):
    """The model itself is shared: streams of other lengths and rows beside its own change no
    bit.
    """
    model = build(family)
    tasks = [lambda some=some: logps(model, some) for some in (PAIRS[:3], PAIRS[4:])]
    alone = [task() for task in tasks]
    for found, expected in zip(at_once(*tasks, times=10), alone, strict=True):
        assert_same_bits(found, expected)
    ids = torch.tensor([PAIRS[0].prompt_ids])
    expected = model(ids).logits
    found = at_once(tasks[1], lambda: [model(ids).logits], times=10)
    assert_same_bits(found[1], [expected])


@pytest.mark.parametrize("family", ["llama", "smollm3", "qwen2", "qwen3", "mistral"])
def test_attention_rotates_by_our_function_in_the_engines_modules_alone(family):
    config = transformers.AutoConfig.for_model(family, **SHAPE)
    base = transformers.AutoModel.from_config(config)
    theirs = type(base.layers[0].self_attn)
    own = own_modules(base).layers[0].self_attn
    assert isinstance(own, theirs)
    assert type(own).forward.__globals__["apply_rotary_pos_emb"] is rotary
    assert theirs.forward.__globals__["apply_rotary_pos_emb"] is not rotary
    assert type(base.layers[0].self_attn) is theirs
