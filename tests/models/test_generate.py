"""Generated answers: alone or in a batch the same, from the model's own distribution, seeded."""

import copy
import math
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from smoldpo.models.generate import end_ids, generate_answer, generate_answers
from smoldpo.utils.errors import UsageError

PROMPTS = [[7, 8, 9], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59], [30], [11, 12], [7, 8, 9, 10, 11]]


def answers(model, tokenizer, prompts=PROMPTS, **changes):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "batch_size": 3}
    return generate_answers(model, tokenizer, prompts, **(settings | changes))


@pytest.fixture
def sharp(tiny_model):
    """The tiny model with logits that differ enough for its answers to depend on the prompt."""
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight.mul_(20)
    return tiny_model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(sharp, tiny_tokenizer, temperature):
    together = answers(sharp, tiny_tokenizer, temperature=temperature)
    alone = [answers(sharp, tiny_tokenizer, [p], temperature=temperature)[0] for p in PROMPTS]
    backwards = answers(sharp, tiny_tokenizer, PROMPTS[::-1], batch_size=5, temperature=temperature)
    assert together == alone == backwards[::-1]
    assert len({answer.ids for answer in together}) == len(PROMPTS)


def test_greedy_answers_are_those_of_the_whole_sequence_without_cache(sharp, tiny_tokenizer):
    for prompt, answer in zip(
        PROMPTS, answers(sharp, tiny_tokenizer, temperature=0.0), strict=True
    ):
        ids = list(prompt)
        for token in answer.ids:
            assert sharp(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_the_seed_and_only_the_seed_changes_an_answer(sharp, tiny_tokenizer):
    first = answers(sharp, tiny_tokenizer, temperature=3.0)
    torch.manual_seed(99)
    assert answers(sharp, tiny_tokenizer, temperature=3.0) == first
    other = answers(sharp, tiny_tokenizer, temperature=3.0, seed=4)
    assert all(old.ids != new.ids for old, new in zip(first, other, strict=True))


def test_two_models_meet_the_same_random_numbers(sharp, tiny_tokenizer):
    """A model that hardly differs gives nearly the same answers; with other numbers none would
    agree.
    """
    near = copy.deepcopy(sharp)
    with torch.no_grad():
        near.model.norm.weight.mul_(1 + 1e-6)
    assert answers(near, tiny_tokenizer, temperature=3.0) == answers(
        sharp, tiny_tokenizer, temperature=3.0
    )


def contextless(words: int) -> LlamaForCausalLM:
    """A model whose next token depends on the last one alone: its layers add nothing."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            tie_word_embeddings=False,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=None,
        )
    )
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(10)
    return model.double().eval()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_models_own_distribution(tiny_tokenizer, temperature):
    """Chi-square over first and second tokens, though the model's settings would have it
    otherwise.
    """
    words, count = 12, 3000
    model = contextless(words)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=5.0, num_beams=2
    )
    settings = model.generation_config
    prompts = [[(i // 12**k) % 12 for k in range(4)] + [5] for i in range(count)]
    found = answers(
        model, tiny_tokenizer, prompts, temperature=temperature, max_new_tokens=2, batch_size=1000
    )
    assert model.generation_config is settings
    firsts = Counter(answer.ids[0] for answer in found)
    follows(firsts, model, 5, temperature)
    for first, _ in firsts.most_common(2):
        seconds = Counter(answer.ids[1] for answer in found if answer.ids[0] == first)
        follows(seconds, model, first, temperature)


def follows(seen: Counter, model, last: int, temperature: float) -> None:
    """Chi-square of what was seen behind `last`; words that are expected less than five times are
    one.
    """
    logits = model(torch.tensor([[last]])).logits[0, -1].detach() / temperature
    expected = seen.total() * torch.softmax(logits, -1)
    observed = torch.tensor([seen[word] for word in range(len(expected))]).double()
    often = expected >= 5
    rest = expected[~often].sum().clamp(min=1e-9)
    statistic = ((observed - expected) ** 2 / expected)[often].sum()
    statistic += (observed[~often].sum() - rest) ** 2 / rest.clamp(min=5)
    assert often.sum() >= 4, "a distribution to speak of"
    assert statistic < 37, statistic  # at most 11 degrees of freedom: by chance once in 10,000


def test_an_answer_ends_with_any_of_the_models_end_tokens(sharp, tiny_tokenizer):
    assert end_ids(sharp, tiny_tokenizer) == [2]
    free = answers(sharp, tiny_tokenizer, temperature=0.0)
    assert not any(answer.ended for answer in free)
    ends = [free[0].ids[4], free[1].ids[2]]
    sharp.generation_config.eos_token_id = ends
    found = answers(sharp, tiny_tokenizer, temperature=0.0)
    for before, after in zip(free, found, strict=True):
        place = next((i for i, token in enumerate(before.ids) if token in ends), None)
        assert after.ids == before.ids[: None if place is None else place + 1]
        assert after.ended == (place is not None)
    assert sum(answer.ended for answer in found) >= 2
    assert end_ids(sharp, tiny_tokenizer) == sorted({2, *ends})


def test_a_text_has_no_control_tokens(sharp, tiny_tokenizer):
    free = answers(sharp, tiny_tokenizer, [[7, 8, 9]], temperature=0.0)[0]
    assert free.text == tiny_tokenizer.decode(free.ids).strip()
    with torch.no_grad():
        sharp.lm_head.weight[2] = (
            1e3 * sharp.lm_head.weight[free.ids[0]]
        )  # the end of turn, at once
    ended = answers(sharp, tiny_tokenizer, [[7, 8, 9]], temperature=0.0)[0]
    assert ended.ids == (2,) and ended.text == "" and ended.ended


def test_a_prompt_without_room_for_an_answer_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(UsageError, match=r"505 tokens.*512 positions.*lower --max-new-tokens"):
        answers(tiny_model, tiny_tokenizer, [[5], [7] * 505], max_new_tokens=8)
    answers(tiny_model, tiny_tokenizer, [[5], [7] * 504], max_new_tokens=8)


def test_progress_counts_every_prompt_and_no_prompts_give_no_answers(tiny_model, tiny_tokenizer):
    told = []
    answers(tiny_model, tiny_tokenizer, max_new_tokens=1, advance=told.append)
    assert told == [3, 2]
    assert answers(tiny_model, tiny_tokenizer, []) == []


def test_a_streamed_answer_is_the_same_as_a_batched_one(sharp, tiny_tokenizer):
    pieces = []
    streamed = generate_answer(
        sharp, tiny_tokenizer, PROMPTS[1], max_new_tokens=12, write=pieces.append
    )
    assert streamed == answers(sharp, tiny_tokenizer, temperature=0.0)[1].text
    assert "".join(pieces).strip() == streamed


def test_noise_is_gumbels():
    """Mean γ and variance π²/6; no two alike, where float32's uniform numbers would have thousands
    alike.
    """
    from smoldpo.models.generate import _generator, _Gumbel

    noise = _Gumbel(1.0, [_generator(0, [1])])(torch.zeros(1, 1), torch.zeros(1, 400_000).double())
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert noise.isfinite().all() and len(noise.unique()) == noise.numel()


def test_top_p_draws_from_the_likeliest_tokens_alone(sharp, tiny_tokenizer):
    prompts = [PROMPTS[0]] * 200
    drawn = answers(
        sharp,
        tiny_tokenizer,
        prompts,
        max_new_tokens=1,
        temperature=2.0,
        seed=range(200),
        top_p=0.5,
    )
    logits = sharp(torch.tensor([PROMPTS[0]])).logits[0, -1]
    likely, order = (logits / 2).softmax(-1).sort(descending=True)
    nucleus = order[: int((likely.cumsum(0) < 0.5).sum()) + 1].tolist()
    counts = Counter(answer.ids[0] for answer in drawn)
    assert set(counts) <= set(nucleus) and len(counts) > 1
    expected = (likely[0] / likely[: len(nucleus)].sum()).item()
    assert counts[nucleus[0]] / 200 == pytest.approx(expected, abs=0.12)


def test_known_answers_are_not_drawn_again(sharp, tiny_tokenizer):
    whole = answers(sharp, tiny_tokenizer)
    order = sorted(range(len(PROMPTS)), key=lambda at: -len(PROMPTS[at]))  # batches of three
    batches, steps = [], []
    known = {at: whole[at] for at in order[:4]}
    again = answers(
        sharp,
        tiny_tokenizer,
        known=known,
        finished=lambda some, new: batches.append((list(some), list(new))),
        advance=steps.append,
    )
    assert again == whole
    assert batches == [(order[3:], [whole[at] for at in order[3:]])], "a batch is computed whole"
    assert steps == [3, 2]
