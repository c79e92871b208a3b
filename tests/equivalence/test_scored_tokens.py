"""Completions of which some tokens are not scored, in float64: every loss, every gradient.

Two oracles besides the plain engine: sequences straight through transformers, one at a time; and
pairs whose sides begin with the same unscored tokens, which are pairs with a longer prompt.
"""

import copy
import functools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_adapters import adapted
from test_adapters import engines as adapted_engines
from test_fast_engine import PAIRS, SHARING, SYSTEM, VOCABULARY, build, disk_store
from test_fast_engine import engines as engines_of
from test_moving_reference import engines as moving_engines
from test_moving_reference import move
from test_steps import FREE, assert_same, step
from test_steps import OBJECTIVES as USUAL
from test_tails_and_squares import FIELDS
from test_tails_and_squares import OBJECTIVES as TAILS_AND_SQUARES

from smoldpo.api.logps import sequence_logps
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine import logprobs
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.batching import STREAM_MULTIPLE, TokenBatching
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.cache.trunk_states import MemoryStore
from smoldpo.engine.packing import pack
from smoldpo.models.freeze import freeze
from smoldpo.types import TokenizedPair

COUNTING = ["sigmoid", "ipo", "sigmoid_norm", "sft", "simpo", "orpo", "rpo"]
COUNTING += ["aot (lengths)", "both (lengths)"]
"""Those that read numbers of tokens, tails or squares, each in another way."""
OBJECTIVES = USUAL | {f"{name} (lengths)": loss for name, loss in TAILS_AND_SQUARES.items()}
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def masked(pairs, seed=1):
    """The same tokens, some of them not scored: at the beginning, between, at the end."""
    drawn = random.Random(seed)

    def mask(ids):
        found = [drawn.random() < 0.5 for _ in ids]
        found[drawn.randrange(len(found))] = True
        return tuple(found)

    return [
        replace(pair, chosen_scored=mask(pair.chosen_ids), rejected_scored=mask(pair.rejected_ids))
        for pair in pairs
    ]


ALONE, TOGETHER = masked(PAIRS), masked(SHARING)


@functools.cache
def engines(sharing, kind, use_weighting=False, needs_reference=True):
    """Both engines and the pairs that they are for, moved away from the reference."""
    pairs = TOGETHER if sharing else ALONE
    told = {"use_weighting": use_weighting, "needs_reference": needs_reference, "pairs": pairs}
    model = build("llama")
    if kind == "full":
        freeze(model, LayerSelection(3))
        return *engines_of(model, **told), pairs
    return *adapted_engines(adapted(model, freeze_layers=3), **told), pairs


@torch.no_grad()
def by_hand(model, pair, dtype=None):
    """The six numbers of a pair (types.PairLogps), from single sequences without padding."""
    found = {}
    shorter = min(pair.chosen_tokens, pair.rejected_tokens)
    for side, (ids, scored) in zip(("chosen", "rejected"), pair.completions, strict=True):
        logits = model(torch.tensor([pair.prompt_ids + ids])).logits[0].to(dtype or torch.float64)
        probs = torch.softmax(logits[len(pair.prompt_ids) - 1 : -1], -1)[torch.tensor(scored)]
        kept = [token for token, each in zip(ids, scored, strict=True) if each]
        logps = probs.gather(1, torch.tensor(kept)[:, None])[:, 0].log()
        found |= {side: logps.sum(), f"{side}_tail": logps[shorter:].sum(), f"{side}_all": logps}
        found[f"{side}_squares"] = (probs**2).sum(-1).log().sum()
    return found


def test_the_masks_here_leave_something_out_and_something_in():
    for pairs in (ALONE, TOGETHER):
        sides = [side for pair in pairs for side in pair.completions]
        assert any(not s.scored[0] for s in sides) and any(not s.scored[-1] for s in sides)
        assert any(all(s.scored) for s in sides)
        assert sum(pair.chosen_tokens > pair.rejected_tokens for pair in pairs) > 0
        assert sum(pair.chosen_tokens < pair.rejected_tokens for pair in pairs) > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "alone"])
def test_both_engines_against_single_sequences(sharing, kind):
    plain, fast, pairs = engines(sharing, kind, use_weighting=True)
    assert fast.batching.prefix == (SYSTEM if sharing else ())
    for of_policy in (True, False):
        model = plain.policy if of_policy else plain.reference
        expected = [by_hand(model, pair) for pair in pairs]
        for engine in (plain, fast):
            logps = engine.policy_logps(pairs) if of_policy else engine.reference_logps(pairs)
            for name in FIELDS if of_policy else FIELDS[:4]:
                close(vars(logps)[name], torch.stack([each[name] for each in expected]))


# Every loss with both kinds of training and with both kinds of pairs; all of these with each other.
WAYS = [
    (name, sharing, kind)
    for number, name in enumerate(OBJECTIVES)
    for sharing, kind in zip((True, False), ("full", "lora")[:: (-1) ** number], strict=True)
]


@pytest.mark.parametrize("name, sharing, kind", WAYS)
def test_every_loss(name, sharing, kind):
    loss = OBJECTIVES[name]
    plain, fast, pairs = engines(sharing, kind, loss.use_weighting)
    assert_same(step(fast, loss, pairs), step(plain, loss, pairs))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", FREE)
def test_engines_without_a_reference(name, kind):
    plain, fast, pairs = engines(True, kind, needs_reference=False)
    found = step(fast, OBJECTIVES[name], pairs)
    assert_same(found, step(plain, OBJECTIVES[name], pairs))
    assert found[0].reference is None


@pytest.mark.parametrize("name", COUNTING)
def test_unscored_tokens_in_front_are_as_good_as_a_longer_prompt(name):
    loss = OBJECTIVES[name]
    told = engines(False, "full", loss.use_weighting)[1]
    unmasked = [replace(pair, prompt_ids=(*pair.prompt_ids, 3, 4)) for pair in PAIRS]
    behind = [
        replace(
            pair,
            chosen_ids=(3, 4, *pair.chosen_ids),
            rejected_ids=(3, 4, *pair.rejected_ids),
            chosen_scored=(False, False, *[True] * len(pair.chosen_ids)),
            rejected_scored=(False, False, *[True] * len(pair.rejected_ids)),
        )
        for pair in PAIRS
    ]
    engine = fresh(told)
    assert_same(step(engine, loss, behind), step(engine, loss, unmasked))


def fresh(engine):
    """The engine for pairs that it has not prepared, with a reference of its own."""
    made = copy.copy(engine)
    made.reference = build("llama", seed=5)
    made._models = made._models_of_workers()
    made._reference_logps, made._states = ReferenceStore(), MemoryStore(1e9)
    made._prepared = set()
    return made


tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7).map(tuple)
prompts = st.builds(lambda head, own: head + own, st.sampled_from([(), SYSTEM]), tokens)
any_pairs = st.lists(
    st.builds(TokenizedPair, st.just("x"), prompts, tokens, tokens), max_size=5, min_size=1
)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(any_pairs, st.integers(0, 9), st.sampled_from(sorted(OBJECTIVES)), st.integers(1, 60))
def test_pairs_and_masks_of_any_shape(pairs, seed, name, stream_tokens):
    loss, pairs = OBJECTIVES[name], masked(pairs, seed)
    plain, fast, _ = engines(True, "full", loss.use_weighting)
    fast, plain = fresh(fast), copy.copy(plain)
    plain.reference = fast.reference
    fast.budget = stream_tokens
    assert_same(step(fast, loss, pairs), step(plain, loss, pairs))


@pytest.mark.parametrize("kernels", [KernelChoice(True, False), KernelChoice(False, True)], ids=str)
def test_either_kernel(kernels):
    model = build("mistral-sliding")
    freeze(model, LayerSelection(2))
    plain, fast = engines_of(model, pairs=ALONE, kernels=kernels)
    assert_same(step(fast, USUAL["ipo"], ALONE), step(plain, USUAL["ipo"], ALONE))


def test_a_moving_reference():
    model = build("llama")
    freeze(model, LayerSelection(2))
    plain, fast = moving_engines(model, pairs=TOGETHER)
    for engine in (plain, fast):
        move(engine, 0)
        engine.synced_reference.sync(0.4)
    assert_same(step(fast, USUAL["ipo"], TOGETHER), step(plain, USUAL["ipo"], TOGETHER))


def test_stores_keep_pairs_apart_that_differ_in_what_is_scored(tmp_path):
    """One run with all tokens scored, the next with some: each finds its own."""
    model = build("llama")
    freeze(model, LayerSelection(2))
    for pairs in (PAIRS, ALONE, masked(PAIRS, seed=2)):
        states, logps = disk_store(tmp_path), ReferenceStore(tmp_path / "reference")
        plain, fast = engines_of(model, pairs=pairs, trunk_store=states, reference_store=logps)
        for side in FIELDS[:4]:
            found, expected = fast.reference_logps(pairs), plain.reference_logps(pairs)
            close(vars(found)[side], vars(expected)[side])


def test_each_scored_tokens_log_probability(monkeypatch):
    """By the fast engine, and one by one for families that it does not take."""
    model = build("llama").requires_grad_(False)
    expected = [by_hand(model, pair) for pair in ALONE]
    for reason in (None, "not proven"):
        monkeypatch.setattr(logprobs, "unsupported", lambda _, reason=reason: reason)
        found = logprobs.token_logps(model, ALONE, KernelChoice())
        for sides, pair, wanted in zip(found, ALONE, expected, strict=True):
            assert [len(side) for side in sides] == [pair.chosen_tokens, pair.rejected_tokens]
            for side, name in zip(sides, ("chosen_all", "rejected_all"), strict=True):
                close(torch.tensor(side, dtype=torch.float64), wanted[name])


def test_in_float32_against_transformers(tiny_model):
    """As people run it: the public function, on a model that nothing was changed in."""
    model = tiny_model.float()
    pairs = [*ALONE, *TOGETHER]
    found = sequence_logps(model, pairs)
    expected = [by_hand(model, pair, torch.float32) for pair in pairs]
    for side in ("chosen", "rejected"):
        wanted = torch.stack([each[side] for each in expected])
        torch.testing.assert_close(getattr(found, side).detach(), wanted, rtol=1e-4, atol=0)


def test_the_head_runs_on_scored_tokens_alone():
    batching = TokenBatching()
    batch, work = pack(ALONE, "cpu", STREAM_MULTIPLE), batching.count(ALONE)
    assert work.head_rows == len(batch.targets) == sum(pair.scored_tokens for pair in ALONE)
    assert work.rows == batching.count(PAIRS).rows and batch.input_ids.shape[1] <= work.rows
    assert len(batch.rows) < len(pack(PAIRS, "cpu", STREAM_MULTIPLE).rows)
