"""What is kept is found under a key that changes with everything that results depend on."""

import pytest
import torch
import transformers

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine import build
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.batching import TokenBatching
from smoldpo.engine.build import build_engine
from smoldpo.engine.cache import keys
from smoldpo.engine.cache.keys import pair_key, results_key
from smoldpo.models.freeze import freeze
from smoldpo.models.weights import weights_sha256
from smoldpo.types import TokenizedPair

CPU = torch.device("cpu")


class Run:
    """What a run is built from, to be changed in one thing."""

    def __init__(self, tiny_config):
        torch.manual_seed(0)
        self.policy = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**tiny_config.to_dict())
        )
        self.kernels = KernelChoice()
        self.frozen = 2
        self.dtype = torch.float32
        self.compiled = False
        self.batch, self.stream_tokens, self.about = 4, 4096, {"model": "tiny"}

    @property
    def base(self):
        return self.policy.model

    def keys(self, monkeypatch):
        """The keys of trunk states and of reference log-probabilities."""
        monkeypatch.setattr(build, "choose_kernels", lambda *_: self.kernels)
        freeze(self.policy, LayerSelection(self.frozen))
        settings = EngineSettings(
            compute_dtype=self.dtype,
            train_batch_size=self.batch,
            eval_batch_size=self.batch,
            stream_tokens=self.stream_tokens,
            cache="disk",
            cache_bytes=1e9,
            compiled=self.compiled,
        )
        sha256 = weights_sha256(self.policy)
        built = build_engine(self.policy, None, settings, sha256, self.about)
        keys = {folder.parent.name: folder.name for folder in built.folders}
        return keys["trunk"], keys["reference"]


@pytest.fixture
def build_run(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda: Run(tiny_config)


def nudge(tensor):
    with torch.no_grad():
        tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(9.0))


def set_config(run, **values):
    for name, value in values.items():
        assert getattr(run.policy.config, name) != value
        setattr(run.policy.config, name, value)


BOTH, REFERENCE = (True, True), (False, True)


@pytest.mark.parametrize(
    "change, changed",
    [
        (lambda run, _: nudge(run.base.layers[0].mlp.up_proj.weight), BOTH),
        (lambda run, _: nudge(run.base.layers[1].input_layernorm.weight), BOTH),
        (lambda run, _: nudge(run.base.embed_tokens.weight), BOTH),
        (lambda run, _: nudge(run.base.layers[2].mlp.up_proj.weight), REFERENCE),
        (lambda run, _: nudge(run.base.norm.weight), REFERENCE),
        (lambda run, _: set_config(run, rms_norm_eps=1e-4), BOTH),
        (lambda run, _: run.policy.config.rope_parameters.update(rope_theta=5.0), BOTH),
        (lambda run, _: setattr(run, "dtype", torch.bfloat16), BOTH),
        (lambda run, _: setattr(run, "kernels", KernelChoice(fused_attention=False)), BOTH),
        (lambda run, _: setattr(run, "kernels", KernelChoice(fused_head=False)), REFERENCE),
        (lambda run, _: setattr(run, "compiled", True), BOTH),
        (lambda run, _: setattr(run, "frozen", 3), BOTH),
        (lambda _, patch: patch.setattr(keys, "code_sha256", lambda: "another"), BOTH),
        (lambda _, patch: patch.setattr(torch, "__version__", "0.1"), BOTH),
        (lambda _, patch: patch.setattr(keys, "_processor", lambda _: "another"), BOTH),
    ],
    ids=["a trunk weight", "a norm of the trunk", "an embedding", "a weight of the top",
         "the final norm", "epsilon", "rope", "dtype", "attention", "head", "compiled",
         "frozen layers", "code", "torch", "processor"],
)  # fmt: skip
def test_a_run_looks_elsewhere_when_something_changes(build_run, monkeypatch, change, changed):
    before = build_run().keys(monkeypatch)
    run = build_run()
    change(run, monkeypatch)
    after = run.keys(monkeypatch)
    assert tuple(one != other for one, other in zip(before, after, strict=True)) == changed


def test_a_run_looks_at_the_same_place_when_nothing_changes(build_run, monkeypatch):
    run = build_run()
    run.policy.config._name_or_path = "/elsewhere"
    run.policy.config.transformers_version = "0"
    run.batch, run.stream_tokens, run.about = 1, 99, {"model": "the same by another name"}
    assert run.keys(monkeypatch) == build_run().keys(monkeypatch)


def test_trunk_and_reference_do_not_share_a_key(build_run, monkeypatch):
    trunk, reference = build_run().keys(monkeypatch)
    assert trunk != reference


SAME = {"weights": "w", "dtype": torch.float32, "device": CPU, "config": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "v"},
        {"dtype": torch.bfloat16},
        {"device": torch.device("meta")},
        {"config": {"a": 1, "b": 3}},
        {"config": {"a": 1}},
        {"attention": False},
    ],
    ids=str,
)
def test_the_key_of_results_changes_with_each_part(other):
    assert results_key(**SAME | other) != results_key(**SAME)


@pytest.mark.parametrize(
    "owner, name, value",
    [
        (keys, "code_sha256", lambda: "another"),
        (torch, "__version__", "0.1"),
        (keys, "version", lambda _: "0.1"),
        (keys, "processor_name", lambda: "another"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        (torch.cpu, "_is_amx_tile_supported", lambda: "perhaps"),
    ],
    ids=["code", "torch", "transformers", "processor", "instructions", "amx"],
)
def test_the_key_of_results_changes_with_code_and_machine(monkeypatch, owner, name, value):
    before = results_key(**SAME)
    monkeypatch.setattr(owner, name, value)
    assert results_key(**SAME) != before


def test_the_key_of_results_is_that_of_any_number_of_threads(monkeypatch):
    before = results_key(**SAME)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert results_key(**SAME) == before


def test_the_key_of_results_is_equal_when_nothing_changes():
    again = {"config": {"b": 2, "a": 1}} | {k: v for k, v in SAME.items() if k != "config"}
    assert results_key(**again) == results_key(**SAME)


PAIR = TokenizedPair("id", (1, 2, 3), (4, 5), (6, 7))
OTHERS = {
    "a token of the prompt": TokenizedPair("id", (1, 2, 9), (4, 5), (6, 7)),
    "a token of chosen": TokenizedPair("id", (1, 2, 3), (4, 9), (6, 7)),
    "a token of rejected": TokenizedPair("id", (1, 2, 3), (4, 5), (6, 9)),
    "from prompt to chosen": TokenizedPair("id", (1, 2), (3, 4, 5), (6, 7)),
    "from chosen to prompt": TokenizedPair("id", (1, 2, 3, 4), (5,), (6, 7)),
    "from chosen to rejected": TokenizedPair("id", (1, 2, 3), (4,), (5, 6, 7)),
    "chosen and rejected exchanged": TokenizedPair("id", (1, 2, 3), (6, 7), (4, 5)),
    "order": TokenizedPair("id", (2, 1, 3), (4, 5), (6, 7)),
    "one token more": TokenizedPair("id", (1, 2, 3), (4, 5), (6, 7, 7)),
    "other digits": TokenizedPair("id", (12, 3), (4, 5), (6, 7)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_key_of_a_pair_changes_with_its_tokens(other):
    assert pair_key(other, 0) != pair_key(PAIR, 0)


def test_the_key_of_a_pair_changes_with_what_is_shared():
    assert len({pair_key(PAIR, shared) for shared in range(3)}) == 3
    found = {prefix: TokenBatching(prefix=prefix).key(PAIR) for prefix in ((), (1, 2), (2, 1))}
    assert found[1, 2] == pair_key(PAIR, 2)
    assert found[2, 1] == found[()] == pair_key(PAIR, 0), "this prompt begins otherwise"


def test_the_key_of_a_pair_is_its_tokens_alone():
    assert pair_key(TokenizedPair("another", (1, 2, 3), (4, 5), (6, 7)), 1) == pair_key(PAIR, 1)
