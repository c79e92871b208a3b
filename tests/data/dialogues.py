"""Thirty dialogues of all the shapes that preference data has, for chat templates to render."""

from __future__ import annotations

from smoldpo.types import Message, PreferencePair, TemplateArguments

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "The word."}},
                "required": ["word"],
            },
        },
    },
)
CODE = (
    "def twice(x):\n    return {'x': [x] * 2}  # {{ x }} {% if x %}\n\n\n\tprint(f\"{twice('a')}\")"
)
THOUGHT = "<think>\nSoft or hard?\n</think>\n\nEight minutes."


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def says(text: str, **more: object) -> Message:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def call(word: object, id: str = "abcdefgh1") -> dict[str, object]:
    arguments = word if isinstance(word, str) else {"word": "egg", "n": word}
    return {"id": id, "type": "function", "function": {"name": "look_up", "arguments": arguments}}


def calls(*made: dict[str, object], **more: object) -> Message:
    return {"role": "assistant", "tool_calls": list(made), **more}


def found(text: str, id: str = "abcdefgh1") -> Message:
    return {"role": "tool", "name": "look_up", "content": text, "tool_call_id": id}


Q, A = user("How do I boil an egg?"), says("In water, for eight minutes.")
Q2, A2 = user("And soft?\n  For two."), says("Five.")
Q3 = user("Thanks! 1 < 2?")
RULES = system("Be brief.\nNo lists.")
THINKING = says("Eight minutes.", reasoning_content="Soft or hard?\nHard.")
NO = (says("No idea."),)

_SHAPES: list[tuple[str, tuple[Message, ...], tuple[Message, ...], bool]] = [
    # what it is; the prompt; the chosen side; whether tools are given
    ("one question", (Q,), (A,), False),
    ("instructions", (RULES, Q), (A,), False),
    ("three turns", (Q, A, Q2), (A2,), False),
    ("instructions, seven turns", (RULES, Q, A, Q2, A2, Q3, says("Yes."), Q), (A,), False),
    ("digits", (user("12345 * 67 = ?"),), (says("827115, or 8.27e5; 3,14 and 1 000 000."),), False),
    ("code", (user(f"Why?\n```python\n{CODE}\n```"),), (says(f"```py\n{CODE}\n```"),), False),
    (
        "Cyrillic, Chinese",
        (user("Как сварить яйцо?"),),
        (says("水煮八分钟。Восемь."),),
        False,
    ),
    ("Arabic, Hindi, emoji", (user("كيف أسلق بيضة؟"),), (says("आठ मिनट 👩‍🍳🏽 ok é"),), False),
    ("spaces around the answer", (Q,), (says("  In water. \n"),), False),
    ("an answer that begins with lines", (Q,), (says("\n\nIn water."),), False),
    ("an empty question", (user(""),), (A,), False),
    ("a blank question", (user(" \n"),), (A,), False),
    ("empty instructions", (system(""), Q), (A,), False),
    ("an empty answer", (Q,), (says(""),), False),
    ("a long answer", (Q,), (says("# Eggs\n\n- water\n- salt\n\n1. Boil.\n" * 5),), False),
    ("thinking in the text", (Q,), (says(THOUGHT),), False),
    ("thinking in a field", (Q,), (THINKING,), False),
    ("past thinking in the text", (Q, says(THOUGHT), Q2), (A2,), False),
    ("past thinking in a field", (RULES, Q, THINKING, Q2), (says(THOUGHT),), False),
    ("a call", (Q,), (calls(call(1)),), True),
    ("a call with text", (RULES, Q), (calls(call(2), content="I look."),), True),
    ("a call, its result, an answer", (Q,), (calls(call(3)), found("boil: 100 °C"), A), True),
    ("a call in the prompt", (Q, calls(call(4)), found('{"ok": true}')), (A,), True),
    (
        "two calls in the prompt",
        (RULES, Q, calls(call(5), call(6, "abcdefgh2")), found("1"), found("2", "abcdefgh2")),
        (A,),
        True,
    ),
    ("tools, and no call", (RULES, Q), (A,), True),
    ("arguments as JSON text", (Q,), (calls(call('{"word": "egg"}', "call_1")),), True),
    ("several turns", (Q,), (A, Q2, A2, Q3, says("Yes.")), False),
    ("several turns that think", (RULES, Q), (says(THOUGHT), Q2, says(THOUGHT)), False),
    ("thinking, a call, an answer", (Q,), (THINKING | calls(call(7)), found("8"), THINKING), True),
    ("two questions in a row", (Q, Q2), (A,), False),
]


def dialogues() -> dict[str, PreferencePair]:
    """Pairs by what they are; the rejected side is one short answer."""
    return {
        name: PreferencePair(
            prompt,
            "chosen",
            "No idea.",
            "dialogues",
            row,
            chosen_messages=side,
            rejected_messages=NO,
            arguments=TemplateArguments(tools=TOOLS if with_tools else None),
        )
        for row, (name, prompt, side, with_tools) in enumerate(_SHAPES, start=1)
    }
