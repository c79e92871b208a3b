"""Thirty dialogues under the chat templates of ten model families, against transformers' own
rendering: what is scored, and behind what, or why a pair is refused."""

import itertools
import re

import pytest
from chat_templates import with_template
from dialogues import dialogues

from smoldpo.data.chat_template import ADDS, CHANGES, CLOSES, REWRITES, TemplateSettings
from smoldpo.data.tokenize import PairTokenizer, Tokenization
from smoldpo.models.load import load_tokenizer
from smoldpo.utils.errors import DataError

BLOCK = "<think>\n\n</think>\n\n"
BLOCK_AT_END = re.compile(r"<think>\s*</think>\s*\Z")
NO_REASONING, TRIMMED = "reasoning_not_written", "template_trims_answer"
NO_TOOLS, LOST, MOVED = "tools_not_read", "tool_turns_not_written", "template_rewrites_prompt"
MERGED = "boundary_merge"
THOUGHT, AND_ANSWER = "thinking in a field", "thinking, a call, an answer"
SPACES = ("spaces around the answer", "an answer that begins with lines", "a long answer")
LAST_CALLS = ("a call", "a call with text", "arguments as JSON text")
LONGER_CALLS = ("a call, its result, an answer", AND_ANSWER)
PAST_CALLS = ("a call in the prompt", "two calls in the prompt")
CALLS = (*LAST_CALLS, *LONGER_CALLS)
TOOLS = (*CALLS, *PAST_CALLS, "tools, and no call")
TWICE = "two questions in a row"
OF_NO_FIELD = {NO_REASONING: (THOUGHT, AND_ANSWER)}
WITHOUT_TOOLS = OF_NO_FIELD | {NO_TOOLS: TOOLS, CHANGES: CALLS, LOST: (*LONGER_CALLS, *PAST_CALLS)}
WITHOUT_CALLS = {name: what for name, what in WITHOUT_TOOLS.items() if name != NO_TOOLS}
REFUSES_TOOL_TURNS = OF_NO_FIELD | {NO_TOOLS: TOOLS, CHANGES: LAST_CALLS}
BRINGS_THINKING = ("thinking in the text", "past thinking in a field", "several turns that think")
# By template and arguments: notes and the dialogues that have them, or "all"; those refused.
EXPECTED = {
    ("smollm2", ""): (WITHOUT_TOOLS | {MERGED: SPACES[:2]}, {}),
    ("smollm3", ""): (WITHOUT_CALLS | {TRIMMED: SPACES[1:2]}, {}),
    ("smollm3", "enable_thinking"): (
        WITHOUT_CALLS | {TRIMMED: SPACES[1:2], CLOSES: (*BRINGS_THINKING, THOUGHT, AND_ANSWER)},
        {},
    ),
    ("qwen2_5", ""): (OF_NO_FIELD, {}),
    ("qwen3", ""): (
        {ADDS: "all", TRIMMED: SPACES[1:2], REWRITES: ("several turns that think",)},
        {},
    ),
    ("qwen3", "enable_thinking"): (
        {
            TRIMMED: SPACES[1:2],
            CLOSES: (*BRINGS_THINKING, THOUGHT, AND_ANSWER),
            REWRITES: ("several turns", "several turns that think", *LONGER_CALLS),
        },
        {},
    ),
    ("llama3_2", ""): (
        OF_NO_FIELD | {TRIMMED: SPACES, CHANGES: ("a call with text", AND_ANSWER)},
        {"two calls in the prompt": "only supports single tool-calls"},
    ),
    ("gemma3", ""): (
        REFUSES_TOOL_TURNS | {TRIMMED: SPACES},
        dict.fromkeys((*LONGER_CALLS, *PAST_CALLS, TWICE), "roles must alternate"),
    ),
    ("mistral_small", ""): (
        REFUSES_TOOL_TURNS,
        dict.fromkeys((*LONGER_CALLS, *PAST_CALLS), "Only user, system and assistant roles"),
    ),
    ("mistral_nemo", ""): (
        OF_NO_FIELD
        | {
            CHANGES: ("a call with text", AND_ANSWER),
            REWRITES: ("several turns that think",),
            MOVED: (
                "instructions",
                "instructions, seven turns",
                "empty instructions",
                "past thinking in a field",
                "a call with text",
                "tools, and no call",
                "several turns that think",
            ),
        },
        {TWICE: "roles must alternate", "arguments as JSON text": "ids have length 9"},
    ),
    ("phi4", ""): (WITHOUT_TOOLS, {}),
    ("olmo2", ""): (WITHOUT_TOOLS, {}),
    ("granite3", ""): (WITHOUT_CALLS, {}),
    ("granite3", "thinking"): (WITHOUT_CALLS, {}),
    ("granite4", ""): (OF_NO_FIELD, {}),
}
ARGUMENTS = {"": {}, "enable_thinking": {"enable_thinking": False}, "thinking": {"thinking": True}}


@pytest.fixture(scope="module")
def tokenizer_for(tiny_tokenizer, real):
    made = {"smollm2": load_tokenizer(real)}

    def make(name):
        if name not in made:
            made[name] = with_template(tiny_tokenizer, name)
        return made[name]

    return make


class Rendering:
    """A dialogue as transformers writes it, with the messages in the form that templates read."""

    def __init__(self, tokenizer, pair, kwargs):
        self.tokenizer, self.given = tokenizer, dict(kwargs)
        if pair.arguments.tools:
            self.given["tools"] = list(pair.arguments.tools)

    def __call__(self, messages, in_use):
        return self.tokenizer.apply_chat_template(
            [self.readable(message) for message in messages],
            add_generation_prompt=in_use,
            tokenize=False,
            **self.given,
        )

    @staticmethod
    def readable(message):
        made = {"content": "", **message}
        for call in made.get("tool_calls", ()):
            if call["function"]["arguments"] == '{"word": "egg"}':
                function = call["function"] | {"arguments": {"word": "egg"}}
                made["tool_calls"] = [call | {"function": function}]
        return made


def scored_runs(tokenizer, tokens, side):
    """Each run of scored tokens: the text before it, and its own."""
    completion = tokens.completions[side]
    ids = [*tokens.prompt_ids, *completion.ids]
    at = len(tokens.prompt_ids)
    for scored, run in itertools.groupby(completion.scored):
        end = at + len(list(run))
        if scored:
            yield tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:end])
        at = end


def rest_behind(seen, written):
    """What a template writes in a turn, behind what a model in use is given."""
    for start in (seen, BLOCK_AT_END.sub("", seen)):
        if written.startswith(start):
            return written[len(start) :]
    return written.rpartition("[/INST]")[2]  # Mistral's, which takes the instructions away


@pytest.mark.parametrize(("name", "argument"), EXPECTED, ids=str)
def test_thirty_dialogues(tokenizer_for, name, argument):
    tokenizer, kwargs = tokenizer_for(name), ARGUMENTS[argument]
    reader = PairTokenizer(tokenizer, Tokenization(10**6, TemplateSettings(kwargs=kwargs)))
    notes, refused = EXPECTED[name, argument]
    assert len(dialogues()) == 30
    for what, pair in dialogues().items():
        if what in refused:
            with pytest.raises(DataError, match=rf"dialogues, row {pair.row}: .*{refused[what]}"):
                reader.tokenize(pair)
            continue
        tokens = reader.tokenize(pair)
        expected = {n for n, where in notes.items() if what in where or where == "all"}
        assert tokens.notes == expected, what
        render = Rendering(tokenizer, pair, kwargs)
        for number, side in enumerate((pair.chosen_messages, pair.rejected_messages)):
            turns = [n for n, message in enumerate(side) if message["role"] == "assistant"]
            if REWRITES in tokens.notes:
                turns = turns[-1:]
            runs = list(scored_runs(tokenizer, tokens, number))
            assert len(runs) == len(turns), what
            for turn, (before, scored) in zip(turns, runs, strict=True):
                seen = render([*pair.prompt, *side[:turn]], True)
                assert before == seen, what
                rest = rest_behind(seen, render([*pair.prompt, *side[: turn + 1]], False))
                if ADDS in tokens.notes and not side[turn].get("reasoning_content"):
                    rest = rest.removeprefix(BLOCK)
                assert scored == rest.removesuffix("\n"), what
            whole = [*tokens.prompt_ids, *tokens.completions[number].ids]
            text = tokenizer.decode(whole)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert (ids == whole) is (MERGED not in tokens.notes or number == 1), what
