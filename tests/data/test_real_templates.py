"""Chat templates of published models, as TRL ships them, against transformers' own rendering."""

import pytest
from chat_templates import with_template

from smoldpo.data.chat_template import ADDS, OPENS, TemplateSettings
from smoldpo.data.tokenize import PairTokenizer, Tokenization
from smoldpo.types import PreferencePair

NAMES = {
    "qwen3_instruct_2507": [{}],
    "qwen3_5_think": [{}, {"enable_thinking": False}],
    "qwen3_5_nothink": [{}, {"enable_thinking": True}],
    "llama3_1": [{}],
    "phi3_5": [{}],
    "deepseek_r1_distill": [{}],
    "lfm2_2_5": [{}],
    "glm4moe": [{}, {"enable_thinking": False}],
    "cohere2": [{}],
    "gptoss": [{}],
}
CASES = [(name, kwargs) for name, all_kwargs in NAMES.items() for kwargs in all_kwargs]
PLAIN, THINKS = "In water, for eight minutes.", "<think>\nSoft or hard?\n</think>\n\nEight minutes."


def dialogues():
    """Prompts of one to nine messages, with and without instructions."""
    for system in (False, True):
        for turns in range(5):
            said = [{"role": "system", "content": "Be brief."}] if system else []
            for number in range(turns):
                said.append({"role": "user", "content": f"Question {number}?\n  And more."})
                said.append({"role": "assistant", "content": f"Answer {number}: 1 < 2."})
            yield (*said, {"role": "user", "content": "How do I boil an egg?"})


@pytest.fixture(scope="module")
def tokenizer_for(tiny_tokenizer):
    made = {}

    def make(name):
        if name not in made:
            made[name] = with_template(tiny_tokenizer, name)
        return made[name]

    return make


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
@pytest.mark.parametrize(
    "answer", [PLAIN, THINKS, f"  {PLAIN} "], ids=["plain", "thinks", "spaces"]
)
def test_what_is_scored_is_what_the_template_renders(tokenizer_for, name, kwargs, answer):
    tokenizer = tokenizer_for(name)
    reader = PairTokenizer(tokenizer, Tokenization(10**6, TemplateSettings(kwargs=kwargs)))
    for prompt in dialogues():
        pair = reader.tokenize(PreferencePair(prompt, answer, answer.replace("minutes", "hours")))
        asked = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=False, **kwargs
        )
        whole = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": answer}], tokenize=False, **kwargs
        )
        assert tokenizer.decode(list(pair.prompt_ids)) == asked
        said = tokenizer.decode(list(pair.chosen_ids))
        told = answer.removeprefix("<think>") if asked.rstrip().endswith("<think>") else answer
        assert "".join(told.split()) in "".join(said.split())
        if whole.startswith(asked) and ADDS not in pair.notes and reader.template.ends_turns:
            assert whole.startswith(asked + said)
        assert "boundary_merge" not in pair.notes
        # Under the setting that a mismatch names there is none.
        for found in reader.mismatches.values():
            if found.mismatch.setting:
                on = found.mismatch.setting.endswith("=true")
                argument = {found.mismatch.setting.partition("=")[0]: on}
                other = Tokenization(10**6, TemplateSettings(kwargs=kwargs | argument))
                again = PairTokenizer(tokenizer, other)
                again.tokenize(PreferencePair(prompt, answer, answer))
                assert not again.mismatches


@pytest.mark.parametrize(
    ("name", "answer", "note", "setting"),
    [
        ("qwen3", PLAIN, ADDS, "enable_thinking=false"),
        ("qwen3_5_think", PLAIN, OPENS, "enable_thinking=false"),
        ("deepseek_r1_distill", PLAIN, OPENS, None),
        ("glm4moe", PLAIN, ADDS, "enable_thinking=false"),
        ("qwen2_5", PLAIN, None, None),
        ("llama3_2", THINKS, None, None),
        ("qwen3", THINKS, None, None),
        ("deepseek_r1_distill", THINKS, None, None),
    ],
)
def test_what_is_said_of_a_mismatch(tokenizer_for, name, answer, note, setting):
    reader = PairTokenizer(tokenizer_for(name), 1000)
    reader.tokenize(PreferencePair("How?", answer, answer))
    found = {kind: each.mismatch.setting for kind, each in reader.mismatches.items()}
    assert found == ({} if note is None else {note: setting})
