"""Every fault is found at its row, and nothing elsewhere; what is clean stays as it is."""

from __future__ import annotations

import json
import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planted import clean_row

from smoldpo.data.account import DROP, WARN
from smoldpo.data.audit import CheckOptions, check_data
from smoldpo.data.cleaning.cleaner import RULES, Cleaner, choose_rules, evaluation_rules
from smoldpo.data.cleaning.duplicates import minhash, shingles, similar_pairs
from smoldpo.data.length_stats import WordCounter
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import UsageError

USER = {"role": "user", "content": "And what then?"}
ASSISTANT = {"role": "assistant", "content": "Then you are done."}
LONG = "So the work goes on day after day in every kind of weather. "


def say(row, text):
    row["prompt"][0]["content"] = text


def edited(row, number=1, key="chosen"):
    """The text of `key` with `number` of its words replaced."""
    words = row[key].split()
    for at in range(3, 3 + number):
        words[at] = "otherwise"
    return " ".join(words)


FAULTS = {
    "invalid_unicode": lambda row: row.update(chosen="Half an emoji \ud83d here. " + row["chosen"]),
    "control_characters": lambda row: say(row, "A\x00 question with\x1b[31m noise. " + LONG),
    "bidi_controls": lambda row: row.update(
        rejected="Runs \u202ebackwards\u202c. " + row["rejected"]
    ),
    "transcript_residue": lambda row: row.update(chosen=row["chosen"] + "\n\nHuman"),
    "empty_prompt": lambda row: say(row, "  \n"),
    "empty_chosen": lambda row: row.update(chosen=" \n "),
    "empty_rejected": lambda row: row.update(rejected=""),
    "identical": lambda row: row.update(rejected=row["chosen"] + "\n"),
    "near_identical": lambda row: row.update(rejected=row["chosen"][:-1] + "!"),
    "not_alternating": lambda row: row.update(prompt=[*row["prompt"], USER]),
    "not_user_last": lambda row: row.update(prompt=[*row["prompt"], ASSISTANT]),
    "prompts_differ": lambda row: row.update(
        chosen=[{"role": "user", "content": "One"}, {"role": "assistant", "content": "A first."}],
        rejected=[
            {"role": "user", "content": "Two"},
            {"role": "assistant", "content": "A second."},
        ],
    ),
    "repeats_prompt": lambda row: row.update(
        chosen=f"{row['prompt'][0]['content']}\n{row['chosen']}"
    ),
    "role_label": lambda row: row.update(rejected=row["rejected"] + "\n\nHuman: And you?\nI see."),
    "forged_control_token": lambda row: row.update(chosen="Well<|im_end|> " + row["chosen"]),
    "cut_off": lambda row: row.update(chosen=row["chosen"] + " Then put the other half of the"),
    "refusal": lambda row: row.update(
        chosen="I'm sorry, but I can't help with that. " + row["chosen"]
    ),
    "long_prompt": lambda row: say(row, LONG * 90),
    "long_answer": lambda row: row.update(rejected=LONG * 90),
    "mixed_language": lambda row: row.update(
        chosen="Das ist nicht so schwer, und ich helfe dir mit der Arbeit. Nimm für den Anfang ein "
        "weiches Tuch."
    ),
}
ACROSS = ("exact_duplicate", "near_duplicate", "contradictory", "eval_prompt", "eval_prompt_near")
CONTROL_FORMS = ["<|im_start|>", "<|endoftext|>", "[INST]", "<s>", "<</SYS>>", "<end_of_turn>",
                 "<|eot_id|>", "<｜User｜>"]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plant(copies=2, rows=300, seed=5):
    """Rows with faults at random places, {rule: rows from 1}, and the prompts of evaluation."""
    data = [clean_row(number) for number in range(rows)]
    places = random.Random(seed).sample(range(20, rows), copies * (len(FAULTS) + 7))
    expected = defaultdict(set)
    for rule, spoil in FAULTS.items():
        for _ in range(copies):
            at = places.pop()
            spoil(data[at])
            expected[rule].add(at + 1)
    evaluation = [clean_row(number) for number in range(10_000, 10_020)]
    for copy in range(copies):
        at, source = places.pop(), places.pop()
        data[at] = json.loads(json.dumps(data[source]))
        expected["exact_duplicate"].add(max(at, source) + 1)
        at, source = places.pop(), places.pop()
        data[at] = data[source] | {"chosen": edited(data[source], 2)}
        expected["near_duplicate"].add(max(at, source) + 1)
        at, source = places.pop(), places.pop()
        data[at] = data[source] | {
            "chosen": data[source]["rejected"],
            "rejected": data[source]["chosen"],
        }
        expected["contradictory"] |= {at + 1, source + 1}
        evaluation_prompt = evaluation[copy]["prompt"][0]["content"]
        say(data[copy], evaluation_prompt.upper() + " ")
        expected["eval_prompt"].add(copy + 1)
        say(data[copy + 10], evaluation_prompt.replace("should I", "shall we"))
        expected["eval_prompt_near"].add(copy + 11)
    return data, expected, evaluation


def test_each_planted_fault_is_found_at_its_row_and_nothing_elsewhere(tmp_path, capsys):
    data, expected, evaluation = plant()
    options = CheckOptions(
        eval_data=write(tmp_path / "held.jsonl", evaluation),
        rules=choose_rules(on=["mixed_language"]),
    )
    report = check_data(write(tmp_path / "rows.jsonl", data), options, WordCounter())
    found = defaultdict(set)
    for item in report.findings:
        found[item.rule].add(item.row)
    print(f"{'rule':<24}{'found':>7}{'missed':>8}{'false':>7}")
    table = {}
    for rule in sorted({*expected, *found}):
        right, wrong = found[rule] & expected[rule], found[rule] - expected[rule]
        table[rule] = (len(right), sorted(expected[rule] - found[rule]), sorted(wrong))
        print(f"{rule:<24}{len(right):>7}{len(table[rule][1]):>8}{len(wrong):>7}")
    assert table == {rule: (len(rows), [], []) for rule, rows in sorted(expected.items())}
    assert {*RULES} - {*expected} == {"not_tokenizable"}, "plant this rule's fault too"
    dropped = {row for rule, rows in expected.items() for row in rows if _drops(rule)}
    assert report.rows_read == len(data) and report.rows_kept == len(data) - len(dropped)
    assert {item.action for item in report.findings if _drops(item.rule)} == {DROP}


def _drops(rule):
    return rule not in RULES or RULES[rule].action == DROP


@pytest.mark.parametrize("rule", [*FAULTS, *ACROSS])
def test_a_rule_that_is_off_finds_nothing(tmp_path, rule):
    if rule not in RULES:
        pytest.skip("a row without a pair cannot be kept")
    data, _, evaluation = plant(copies=1, rows=80)
    options = CheckOptions(
        eval_data=write(tmp_path / "held.jsonl", evaluation), rules=choose_rules(off=[rule])
    )
    report = check_data(write(tmp_path / "rows.jsonl", data), options, WordCounter())
    assert rule not in {item.rule for item in report.findings}
    assert len(report.findings) > 15


def pair(chosen="Yes, it does.", rejected="No.", prompt="Does it?"):
    return PreferencePair(prompt, chosen, rejected, "f", 1)


def rules_of(*pairs, rules=None):
    cleaner = Cleaner(rules)
    for number, one in enumerate(pairs, 1):
        cleaner.clean(PreferencePair(one.prompt, one.chosen, one.rejected, "f", number))
    cleaner.finish()
    return [(item.row, item.rule) for item in cleaner.findings]


ORDINARY = [
    pair("The answer is 42.", "The answer is 43."),
    pair("Paris is the capital of France, and it has 2,102,650 people.",
         "Paris is the capital of France, and it has 9,102,650 people."),
    pair("Dear Ann,\n\nThank you for the lovely evening. We all had such a good time with you. The "
         "cake was a dream, and the children still talk about the garden. Kind regards",
         "Thanks."),
    pair("1. Bread\n2. Milk\n3. Eggs\n4. A small bag of flour\n5. Butter", "Buy food"),
    pair("Every Human: A History is a good book.", "I can't swim, but I would like to learn."),
    pair("مرحبا\u200f بالعالم", "שלום\u200e לכולם"),
    pair("Use `a < b` and `x[i]`, not <b>bold</b>.", "f(x) |> g"),
    pair("\tTabs\r\nand line ends\nstay.", "🎉 emoji stay, too: 👩‍👩‍👧"),
    pair("Here is the code:\n\n```python\nprint('hello')\n```", "print"),
    pair("See https://example.org/a/long/path", "no"),
]  # fmt: skip


@pytest.mark.parametrize("one", ORDINARY, ids=lambda one: one.chosen[:20])
def test_ordinary_texts_are_left_alone(one):
    cleaner = Cleaner()
    assert cleaner.clean(one) == one
    assert cleaner.findings == []


def test_short_texts_that_resemble_each_other_are_no_duplicates():
    towns = ["Paris", "Rome", "Oslo", "Bern", "Lima", "Kyiv", "Riga", "Doha", "Cairo", "Tunis"]
    pairs = [
        pair(
            f"The capital is {town}.",
            "I do not know that, sorry.",
            f"What is the capital? {town[0]}",
        )
        for town in towns
    ]
    assert rules_of(*pairs) == []


def test_the_same_long_prompt_with_other_answers_is_no_duplicate():
    passage = clean_row(1)["chosen"] * 8
    pairs = [pair(clean_row(n)["chosen"], clean_row(n)["rejected"], passage) for n in range(2, 9)]
    assert rules_of(*pairs) == []


@pytest.mark.parametrize("token", CONTROL_FORMS)
def test_control_tokens_of_every_family_are_seen(token):
    assert rules_of(pair(f"Well, {token} yes.")) == [(1, "forged_control_token")]
    assert rules_of(pair(prompt=f"Say {token} now.")) == [(1, "forged_control_token")]


def test_a_tokenizers_own_control_tokens_are_seen():
    rules = choose_rules(control_tokens=("<secret_token>",))
    assert rules_of(pair("A <secret_token> here."), rules=rules) == [(1, "forged_control_token")]
    assert rules_of(pair("A <secret_token> here.")) == []


@pytest.mark.parametrize(
    ("end", "left"),
    [
        ("\n\nHuman", ""),
        ("\n\nHuman:", ""),
        (" \n\nAssistant: \n", ""),
        ("\nUser:", ""),
        ("\n### Instruction:", ""),
        ("\n\nHuman:\n\nAssistant:", ""),
        ("\nHuman", "\nHuman"),
        ("\n\nHumans", "\n\nHumans"),
    ],
)
def test_residue_is_cut_and_nothing_else(end, left):
    kept = Cleaner().clean(pair("That is all." + end))
    assert kept is not None and kept.chosen == "That is all." + left


def test_huge_and_hostile_texts_take_no_time_and_no_memory():
    spaces, letters = " \n" * 500_000, "ab " * 1_000_000
    cleaner = Cleaner()
    cleaner.clean(pair("x" + spaces + "y\n\nHuman", letters))
    assert [item.rule for item in cleaner.findings] == ["transcript_residue"]


def test_an_answer_that_is_nothing_but_residue_is_empty():
    assert [rule for _, rule in rules_of(pair("\n\nHuman:"))] == [
        "transcript_residue",
        "empty_chosen",
    ]


def test_a_touched_row_says_what_was_and_what_is():
    cleaner = Cleaner()
    kept = cleaner.clean(
        pair("A bell\x07 rings.", prompt=({"role": "user", "content": "W\ud800o?"},))
    )
    assert kept is not None and kept.chosen == "A bell rings."
    assert kept.prompt == ({"role": "user", "content": "W\ufffdo?"},)
    unicode, control = cleaner.findings
    assert (unicode.before, unicode.after) == ("W\\ud800o?", "W\ufffdo?")
    assert (control.before, control.after, control.action) == (
        "A bell\\x07 rings.",
        "A bell rings.",
        "mend",
    )


def test_halves_of_one_character_are_joined():
    kept = Cleaner().clean(pair("A party \ud83c\udf89."))
    assert kept is not None and kept.chosen == "A party 🎉."


def test_dialogues_with_tools_and_system_prompts_alternate():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "12"}
    system = {"role": "system", "content": "Be brief."}
    assert rules_of(pair(prompt=(system, USER, call, tool, tool))) == []
    assert rules_of(pair(prompt=(ASSISTANT, USER, ASSISTANT, USER))) == []
    assert rules_of(pair(prompt=(system,))) == [(1, "not_user_last")]
    assert rules_of(pair(prompt=(USER, tool))) == [(1, "not_alternating")]


def test_contradictions_drop_both_also_among_duplicates():
    one, other = pair("Left is right.", "Right is left."), pair("Right is left.", "Left is right.")
    assert rules_of(one, other) == [(1, "contradictory"), (2, "contradictory")]
    assert rules_of(one, one, other) == [(n, "contradictory") for n in (1, 2, 3)]
    assert rules_of(one, one) == [(2, "exact_duplicate")]
    system = {"role": "system", "content": "Lie."}
    elsewhere = pair(
        other.chosen, other.rejected, (system, {"role": "user", "content": "Does it?"})
    )
    assert rules_of(one, elsewhere) == [], "under another system prompt it is another question"


def test_unknown_rules_and_thresholds_are_usage_errors():
    with pytest.raises(UsageError, match="did you mean refusal"):
        choose_rules(off=["refusals"])
    with pytest.raises(UsageError, match="0 to 1"):
        choose_rules(near_identical=95)


def test_evaluation_scores_every_row_that_can_be_scored():
    rules = evaluation_rules()
    hard = pair("\x07Cut off in the\n\nHuman", "I can't help with that", (USER, USER, ASSISTANT))
    cleaner = Cleaner(rules)
    assert cleaner.clean(hard) == hard and cleaner.clean(hard) == hard
    assert cleaner.finish().all() and not cleaner.findings
    assert rules_of(pair("a", "a"), pair("", "b"), rules=rules) == [
        (1, "identical"),
        (2, "empty_chosen"),
    ]


def test_signatures_estimate_similarity():
    texts = [clean_row(7)["chosen"], edited(clean_row(7), 2), clean_row(8)["chosen"]]
    sets = [set(shingles(text).tolist()) for text in texts]
    signatures = np.stack([minhash(shingles(text)) for text in texts])
    for other in (1, 2):
        true = len(sets[0] & sets[other]) / len(sets[0] | sets[other])
        assert abs((signatures[0] == signatures[other]).mean() - true) < 0.15
    strangers = np.random.default_rng(0).integers(0, 2**32, (2, 40, 300)).astype(np.uint32)
    agree = [
        (minhash(ours) == minhash(theirs)).mean() for ours, theirs in zip(*strangers, strict=True)
    ]
    assert np.mean(agree) < 0.01
    first, second, _ = similar_pairs(signatures, 0.7)
    assert list(zip(first, second, strict=True)) == [(0, 1)]


TEXT = st.text(st.characters(exclude_categories=()), max_size=60)
DIRTY = st.lists(
    st.one_of(
        TEXT,
        st.sampled_from(["\n\nHuman", "\n\nAssistant:", "\x00", "\ud800", "\u202e", " ", "\n"]),
    ),
    max_size=5,
).map("".join)
PROMPT = st.one_of(
    DIRTY,
    st.lists(
        st.builds(lambda role, text: {"role": role, "content": text},
                  st.sampled_from(["system", "user", "assistant", "tool"]), DIRTY),
        max_size=4,
    ).map(tuple),
)  # fmt: skip
PAIRS = st.lists(st.builds(PreferencePair, PROMPT, DIRTY, DIRTY), max_size=8)


def cleaned(pairs, rules=None):
    cleaner = Cleaner(rules)
    passed = [one for one in map(cleaner.clean, pairs) if one is not None]
    return [one for one, kept in zip(passed, cleaner.finish(), strict=True) if kept], cleaner


@settings(max_examples=150, deadline=None)
@given(PAIRS)
@example([pair("x\n\n\x00Human"), pair("x\n\nHuman\ud800")])
def test_cleaning_is_idempotent(pairs):
    once, _ = cleaned(pairs)
    twice, cleaner = cleaned(once)
    assert twice == once
    assert {item.action for item in cleaner.findings} <= {WARN}
    for one in once:
        one.content_hash()
        (one.chosen + one.rejected + json.dumps(one.prompt, ensure_ascii=False)).encode()


def test_a_side_of_messages_is_mended_once_and_its_text_follows():
    """Its text is that of its messages, so a rule that mends counts a row once."""
    turns = ({"role": "assistant", "content": "A\u0000b."}, {"role": "assistant", "content": "C."})
    cleaner = Cleaner()
    given = PreferencePair("Q?", "A\u0000b.\n\nC.", "No.", "f", 1, chosen_messages=turns)
    done = cleaner.mend(given)
    assert done.chosen_messages[0]["content"] == "Ab." and done.chosen == "Ab.\n\nC."
    assert [item.rule for item in cleaner.findings] == ["control_characters"]
