"""Readers: each on five rows of its real schema, on two real files, and on anything whatever."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoldpo.data.dialogue import sides
from smoldpo.data.schemas import SCHEMAS, PairReader, Unreadable
from smoldpo.data.schemas.scored import AnswerGroups
from smoldpo.data.sources import Row, open_source
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError, UsageError

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")

BASIL = "How do I keep basil alive indoors?"
GOOD = "Give it six hours of light and water when the top soil is dry."
BAD = "Basil is a herb that people like."


def user(said):
    return {"role": "user", "content": said}


def assistant(said):
    return {"role": "assistant", "content": said}


def system(said):
    return {"role": "system", "content": said}


def read_all(source, **how):
    """The reader, its pairs, and the (row, rule) of every row that holds none."""
    reader, pairs, skipped = PairReader(**how), [], []
    for row in open_source(str(source)).train.rows():
        try:
            pairs += reader.read(row)
        except Unreadable as reason:
            skipped.append((row.row, reason.rule))
    pairs += reader.finish()
    skipped += [(row.row, rule) for row, rule, _ in reader.skipped]
    return reader, pairs, skipped


ASKED = (user(BASIL),)
BRIEF = (system("Be brief."), user(BASIL))
# file: schema, the rows whose pairs come out, the rows that hold none and why, the first prompt
EXPECTED = {
    "explicit_text.jsonl": ("explicit", [1, 2, 3, 4, 5], [], BASIL),
    "explicit_tools.jsonl": ("explicit", [1, 2, 3, 4, 5], [], None),
    "implicit.jsonl": ("implicit", [1, 2, 3, 4, 5], [], ASKED),
    "implicit_text.jsonl": ("implicit", [1, 2, 3, 4, 5], [], None),
    "transcripts.jsonl": ("transcripts", [1, 2, 3, 4], [(5, "prompts_differ")], ASKED),
    "transcript_prompt.jsonl": ("transcript_prompt", [1, 2, 3, 4, 5], [], ASKED),
    "ultrafeedback.jsonl": (
        "ultrafeedback",
        [1, 2, 5],
        [(3, "tie"), (4, "scores_disagree")],
        ASKED,
    ),
    "argilla_mix.jsonl": ("ultrafeedback", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "alpaca.jsonl": ("alpaca", [1, 2, 3, 4, 5], [], None),
    "conversations.jsonl": ("conversations", [1, 2, 3, 4, 5], [], None),
    "axolotl_messages.jsonl": ("conversations", [1, 2, 3, 4, 5], [], BRIEF),
    "orca.jsonl": ("orca", [1, 2, 3, 4, 5], [], (system("You are an assistant."), user(BASIL))),
    "chatml.jsonl": ("chatml", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "chatml_argilla.jsonl": ("chatml", [1, 2, 3, 4, 5], [], ASKED),
    "ratings.jsonl": ("ratings", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "ratings_generations.jsonl": ("ratings", [1, 2, 5], [(3, "tie"), (4, "unrated")], BRIEF),
    "helpsteer.jsonl": ("helpsteer", [2], [(3, "tie"), (4, "tie"), (5, "unpaired")], ASKED),
    "helpsteer3.jsonl": ("helpsteer3", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "shp.jsonl": ("shp", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "arena.jsonl": ("arena", [1, 2, 5], [(3, "tie"), (4, "tie")], ASKED),
    "arena_lmarena.jsonl": ("arena", [1, 2], [(3, "tie"), (4, "tie"), (5, "not_text")], ASKED),
    "openai.jsonl": ("openai", [1, 2, 3, 4, 5], [], BRIEF),
    "swift.jsonl": ("swift", [1, 2, 3, 4, 5], [], ASKED),
    "swift_query.jsonl": ("swift", [1, 2, 3, 4, 5], [], BRIEF),
    "torchtune.jsonl": ("torchtune", [1, 2, 3, 4, 5], [], ASKED),
    "output_list.jsonl": ("output_list", [1, 2, 4, 5], [(3, "unparsable")], ASKED),
    "nectar.jsonl": ("ratings", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "nemo_rl.jsonl": ("ratings", [1, 2, 3, 4, 5], [], BRIEF),
    "ultrainteract.jsonl": ("conversations", [1, 2, 3, 4, 5], [], ASKED),
    "safe_rlhf.jsonl": ("safe_rlhf", [1, 2, 3, 4, 5], [], ASKED),
    "alpaca_farm.jsonl": ("alpaca_farm", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "votes.jsonl": ("votes", [1, 2, 4, 5], [(3, "tie")], BASIL),
    "webgpt.jsonl": ("webgpt", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "helpsteer2.jsonl": ("helpsteer2", [1, 2, 4, 5], [(3, "tie")], ASKED),
    "stack_exchange.jsonl": ("stack_exchange", [1, 2, 3, 4, 5], [], ASKED),
    "summaries.jsonl": ("summaries", [1, 2, 3, 4, 5], [], None),
    "unpaired.jsonl": ("unpaired", [2], [(3, "unpaired"), (4, "tie"), (5, "tie")], ASKED),
    "json_text.jsonl": ("explicit", [1, 2, 3, 4, 5], [], ASKED),
    "arena_kaggle.csv": ("arena", [1, 2, 4, 5], [(3, "tie")], ASKED),
}


def test_every_schema_has_a_fixture_and_every_fixture_an_expectation():
    assert {path.name for path in FIXTURES.iterdir()} == set(EXPECTED)
    assert {schema for schema, *_ in EXPECTED.values()} == set(SCHEMAS)


@pytest.mark.parametrize("name", EXPECTED)
def test_reader_on_its_fixture(name):
    schema, rows, skipped, prompt = EXPECTED[name]
    reader, pairs, dropped = read_all(FIXTURES / name)
    assert reader.format == schema
    assert [pair.row for pair in pairs] == rows
    assert dropped == skipped
    if prompt is not None:
        assert pairs[0].prompt == prompt
    if name not in ("explicit_tools.jsonl", "implicit_text.jsonl"):
        assert (pairs[0].chosen, pairs[0].rejected) == (GOOD, BAD)
    # in every fixture the preferred answers are these; the side must be right in later rows too
    better = {GOOD, "17 times 6 is 102.", "Vienna lies on the Danube.", "It rains."}
    better |= {"Thank you for covering my shift, Ana!", "Yes: ice is less dense than water."}
    better |= {"Yes, it is raining in Oslo, at 8 degrees."}
    last = [sides(pair) for pair in pairs]
    assert {chosen[-1]["content"].strip() for chosen, _ in last} <= better
    assert not {rejected[-1]["content"].strip() for _, rejected in last} & better
    assert all(pair.file.endswith(name) for pair in pairs)


def test_tool_messages_are_kept_as_they_are():
    _, pairs, _ = read_all(FIXTURES / "explicit_tools.jsonl")
    calls, result = pairs[0].prompt[2:]
    assert calls["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert result == {
        "role": "tool",
        "name": "weather",
        "tool_call_id": "c1",
        "content": "rain, 8 degrees",
    }


def test_llamafactory_speakers_become_roles_and_system_comes_first():
    _, pairs, _ = read_all(FIXTURES / "conversations.jsonl")
    assert [m["role"] for m in pairs[0].prompt] == ["system", "user", "assistant", "user"]
    assert [m["role"] for m in pairs[1].prompt] == ["user", "assistant", "tool"]


def test_alpaca_history_input_and_system():
    _, pairs, _ = read_all(FIXTURES / "alpaca.jsonl")
    assert pairs[0].prompt == (
        system("You are a gardener."),
        user("Hello"),
        assistant("Hello! What do you grow?"),
        user(f"Answer in one line.\n{BASIL}"),
    )
    assert pairs[1].prompt == (user("What is 17 times 6?"),)


def test_a_text_prompt_ends_at_a_word_and_the_space_goes_to_the_answers():
    _, pairs, _ = read_all(FIXTURES / "implicit_text.jsonl")
    assert (pairs[0].prompt, pairs[0].chosen) == (BASIL, f" {GOOD}")


@pytest.mark.parametrize("key", ["score", "rating", "overall_score"])
def test_scores_stand_inside_answers_under_several_names(key):
    answers = [{"text": "low", key: 1}, {"text": "high", key: "4.5"}, {"text": "none", key: "N/A"}]
    pair = read_one({"question": "P", "responses": answers})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("P"),), "high", "low")


def test_helpsteer_turns_inside_the_prompt():
    rows = [
        {
            "prompt": "A\n<extra_id_1>Assistant\nB\n<extra_id_1>User\nC",
            "response": r,
            "helpfulness": h,
        }
        for r, h in (("x", 1), ("middle", 2), ("y", 4))
    ]
    reader = PairReader()
    assert [reader.read(Row("f", at, row)) for at, row in enumerate(rows, 1)] == [[], [], []]
    (pair,) = reader.finish()
    assert pair.prompt == (user("A"), assistant("B"), user("C"))
    assert (pair.chosen, pair.rejected, pair.row) == ("y", "x", 3)
    assert [(row.row, rule) for row, rule, _ in reader.skipped] == [(2, "unpaired")]


def test_answers_of_one_prompt_are_not_held_without_bound():
    reader = PairReader()
    most = 0
    for at in range(3 * AnswerGroups.LARGEST):
        reader.read(Row("f", at, {"prompt": "P", "response": "r", "helpfulness": at}))
        most = max(most, len(reader._groups._rows))
    assert most == AnswerGroups.LARGEST


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Say hi. Thank you", "Say hi. Thanks", "Say hi."),  # "Thank" would split the other's word
        ("Say hi. Thanks", "Say hi. Thank you", "Say hi."),
        ("Q: two\nA: four", "Q: two\nA: five", "Q: two\nA:"),
        ("Say hi. Hi there", "Say hi. Hi", "Say hi. Hi"),
        ("Say hi. Hi", "Say hi. Hi", "Say hi."),
    ],
)
def test_no_word_of_either_side_is_split(chosen, rejected, prompt):
    pair = read_one({"chosen": chosen, "rejected": rejected})
    assert (pair.prompt, pair.prompt + pair.chosen) == (prompt, chosen)
    assert pair.prompt + pair.rejected == rejected


@needs_shared
def test_real_hh_transcripts():
    reader, pairs, skipped = read_all(SHARED / "hh_raw_sample.jsonl.gz")
    assert reader.format == "transcripts"
    assert (len(pairs), skipped) == (744, [(325, "prompts_differ")])
    assert all(pair.prompt[0]["role"] == "user" for pair in pairs)
    # the dirt that reading leaves to cleaning; docs/data-reading.md has the same figures
    dirt = Counter()
    for pair in pairs:
        dirt["identical"] += pair.chosen == pair.rejected
        dirt["empty_rejected"] += not pair.rejected
        dirt["residue"] += pair.chosen.endswith("\n\nHuman") or pair.rejected.endswith("\n\nHuman")
        dirt["label"] += any(s.startswith("Human:") for s in (pair.chosen, pair.rejected))
    assert dirt == {"identical": 35, "empty_rejected": 6, "residue": 4, "label": 5}


@needs_shared
def test_real_llamafactory_conversations():
    reader, pairs, skipped = read_all(SHARED / "llamafactory_dpo_en_demo.json")
    assert (reader.format, len(pairs), skipped) == ("conversations", 300, [])
    raw = json.loads((SHARED / "llamafactory_dpo_en_demo.json").read_text(encoding="utf-8"))
    for values, pair in zip(raw, pairs, strict=True):
        assert [turn["value"] for turn in values["conversations"]] == [
            message["content"] for message in pair.prompt
        ]
        assert values["chosen"]["value"] == pair.chosen
        assert values["rejected"]["value"] == pair.rejected


def read_one(values, **how):
    (pair,) = PairReader(**how).read(Row("f.jsonl", 7, values))
    return pair


def test_columns_are_mapped_by_name():
    values = {"ask": "P", "better": "C", "worse": "R", "prompt": "not this one"}
    pair = read_one(values, columns={"prompt": "ask", "chosen": "better", "rejected": "worse"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("P", "C", "R")


def test_a_renamed_column_no_longer_decides_the_schema():
    values = {"question": "P", "chosen": "C", "rejected": "R"}
    assert read_one(values).prompt == (user("P"),)
    reader = PairReader(columns={"prompt": "question"})
    reader.read(Row("f", 1, values))
    assert reader.format == "explicit"
    values = {"prompt": "P", "winner": "C", "rejected": "R", "response_a": "", "response_b": ""}
    reader = PairReader(columns={"chosen": "winner"})
    reader.read(Row("f", 1, values))
    assert reader.format == "explicit"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"format": "explicitt"}, "did you mean explicit"),
        ({"columns": {"promt": "ask"}}, "did you mean prompt"),
        ({"format": "orca", "columns": {"prompt": "ask"}}, "no column of the schema orca"),
        ({"columns": {"prompt": "aks"}}, "did you mean ask"),
        ({"columns": {"helpfulness": "ask"}}, "no column of the schema explicit"),
    ],
)
def test_a_wrong_request_names_the_nearest(how, says):
    values = {"prompt": "P", "ask": "P", "chosen": "C", "rejected": "R"}
    with pytest.raises(UsageError, match=says):
        read_one(values, **how)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["query", "better", "worse"], "--columns prompt=query,chosen=better,rejected=worse"),
        (["prompt", "Chosen_Answer", "rejected_answer"], "chosen=Chosen_Answer,rejected=rejected_"),
        (
            ["history", "human_ref_a", "human_ref_b", "labels"],
            "nearest is shp.*A=human_ref_a,human_ref_B=human_ref_b",
        ),
        (["x"], "prompt=COLUMN,chosen=COLUMN,rejected=COLUMN"),
        ([], "known schema: none"),
    ],
)
def test_an_unknown_schema_shows_the_mapping_to_write(keys, says):
    values = {key: 1 if key == "labels" else "some text" for key in keys}
    with pytest.raises(DataError, match=f"f.jsonl, row 7: .*{says}"):
        read_one(values)


def test_a_proposed_mapping_works_when_it_is_followed():
    values = {"query": "P", "better": "C", "worse": "R"}
    with pytest.raises(DataError) as caught:
        read_one(values)
    written = str(caught.value).split("--columns ")[1].split(",  or")[0].split(", or")[0]
    pair = read_one(values, columns=dict(part.split("=") for part in written.split(",")))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("P", "C", "R")


PROPOSED = [
    {"query": "P", "better": "C", "worse": "R"},
    {"question": "P", "accepted": "C", "rejected_answer": "R"},
    {"input": "P", "preferred": [assistant("C")], "dispreferred": [assistant("R")]},
    {"instruction": "P", "winner": "C", "loser": "R", "judge": "m"},
    {"prompt": "P", "response_A": "C", "response_B": "R", "winner": "model_a"},
    {"input": {"messages": [user("P")]}, "preferred": [assistant("C")], "notes": "x"},
    {"instruction": "P", "input": "", "outputs": ["C", "R"], "history": []},
    {"text": 5, "good": "C", "bad": "R"},
    {"prompt, text": "P", "good": "C", "bad": "R"},
    {"messages": [user("P"), assistant("C")], "rejected_answer": "R"},
]


@pytest.mark.parametrize("values", PROPOSED, ids=lambda values: "+".join(values))
def test_what_an_error_proposes_reads_the_row_or_asks_for_names(values):
    with pytest.raises(DataError) as caught:
        read_one(values)
    message = str(caught.value)
    written = message.split("--columns ")[1].split(", or")[0]
    if "COLUMN" in written or "The nearest" not in message:
        assert "name them with --columns prompt=" in message
        return
    pair = read_one(values, columns=dict(part.split("=") for part in written.split(",")))
    assert (pair.chosen, pair.rejected) == ("C", "R")


def test_an_empty_first_row_decides_nothing():
    reader = PairReader()
    with pytest.raises(Unreadable) as caught:
        reader.read(Row("f", 1, {"chosen": None, "rejected": "\n\nHuman: a\n\nAssistant: b"}))
    assert (caught.value.rule, reader.format) == ("empty_chosen", "")
    talk = "\n\nHuman: a\n\nAssistant: "
    assert reader.read(Row("f", 2, {"chosen": talk + "b", "rejected": talk + "c"}))
    assert reader.format == "transcripts"


@pytest.mark.parametrize(
    ("later", "says"),
    [
        ({"prompt": "P", "chosen": "C", "rejected": "R"}, "--format explicit"),
        (
            dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b"),
            "--format transcripts",
        ),
    ],
)
def test_a_later_row_that_contradicts_the_first_is_an_error(later, says):
    reader = PairReader()
    reader.read(Row("f", 1, {"chosen": "Two and two are four", "rejected": "Two and two are five"}))
    with pytest.raises(DataError, match=says):
        reader.read(Row("f", 2, later))


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"prompt": None, "chosen": "", "rejected": "x"}, "empty_chosen"),
        ({"prompt": "p", "chosen": "x", "rejected": None}, "empty_rejected"),
        ({"prompt": "p", "chosen": [], "rejected": "x"}, "unparsable"),
        ({"prompt": "p", "chosen": [user("p")], "rejected": "x"}, "unparsable"),
        ({"chosen": "one", "rejected": "two"}, "unparsable"),
        (
            {
                "prompt": "p",
                "chosen": [user("p"), assistant("c")],
                "rejected": [user("q p"), assistant("r")],
            },
            "prompts_differ",
        ),
        (
            {
                "prompt": "else",
                "chosen": [user("p"), assistant("c")],
                "rejected": [user("p"), assistant("r")],
            },
            "prompts_differ",
        ),
        (
            {"system": "a", "prompt": [system("b"), user("p")], "chosen": "c", "rejected": "r"},
            "two_system_prompts",
        ),
        (
            {"prompt": [user([{"type": "image", "url": "x"}])], "chosen": "c", "rejected": "r"},
            "not_text",
        ),
    ],
)
def test_rows_without_a_pair_are_counted_by_rule(values, rule):
    with pytest.raises(Unreadable) as caught:
        read_one(values)
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": 5, "chosen": "c", "rejected": "r"}, "'prompt' is a int"),
        ({"prompt": "p", "chosen": ["c"], "rejected": "r"}, "'chosen', message 1 is a str"),
        (
            {"prompt": [{"role": "narrator", "content": "x"}], "chosen": "c", "rejected": "r"},
            "role",
        ),
        ({"prompt": [{"role": "user"}], "chosen": "c", "rejected": "r"}, "no content"),
        ({"question": "q", "chosen": 1.5, "rejected": "r"}, "'chosen' is a float"),
        (
            {
                "winner": "model_c",
                "prompt": "p",
                "response_a": "a",
                "response_b": "b",
            },
            "'winner'",
        ),
    ],
)
def test_wrong_types_name_file_row_and_key(values, says):
    with pytest.raises(DataError, match=f"f.jsonl, row 7: .*{says}"):
        read_one(values)


def test_missing_columns_of_a_schema_asked_for_are_named():
    with pytest.raises(DataError, match="row 7: the key 'question' is missing"):
        read_one({"prompt": "p", "chosen": "c", "rejected": "r"}, format="orca")


# --- anything whatever ----------------------------------------------------------------------------

anything = st.text(st.characters(exclude_categories=()), max_size=30)
"""Text with lone surrogates, NUL and all else that a str may hold."""
transcripts = st.lists(
    st.one_of(anything, st.sampled_from(["\n\nHuman:", "\n\nAssistant:", "Human", "\n\n", " "])),
    max_size=8,
).map("".join)
texts = st.one_of(anything, transcripts)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
dialogues = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), scalars),
            "content": st.one_of(texts, scalars, st.lists(st.dictionaries(texts, scalars))),
            "from": st.one_of(st.sampled_from(["human", "gpt", "observation"]), scalars),
            "value": st.one_of(texts, scalars),
            "tool_calls": scalars,
        },
    ),
    max_size=4,
)
values_of_any_kind = st.one_of(
    scalars,
    dialogues,
    dialogues.map(lambda messages: messages[0] if messages else {}),
    st.recursive(
        scalars, lambda v: st.one_of(st.lists(v), st.dictionaries(texts, v)), max_leaves=8
    ),
)
columns = st.sampled_from(sorted({name for schema in SCHEMAS.values() for name in schema.known}))
rows = st.dictionaries(st.one_of(columns, columns, anything), values_of_any_kind, max_size=8)


def holds_only_its_own_errors(reader, many):
    for at, values in enumerate(many, 1):
        try:
            pairs = reader.read(Row("f", at, values))
        except (Unreadable, DataError):
            continue
        for pair in pairs:
            assert isinstance(pair, PreferencePair)
            assert isinstance(pair.chosen, str) and isinstance(pair.rejected, str)
            assert isinstance(pair.prompt, str | tuple)
    for pair in reader.finish():
        assert isinstance(pair.chosen, str)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(rows, max_size=4))
def test_any_rows_raise_nothing_but_the_readers_own_errors(many):
    holds_only_its_own_errors(PairReader(), many)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_any_values_in_a_schemas_columns(schema):
    names = st.fixed_dictionaries(
        {}, optional=dict.fromkeys(SCHEMAS[schema].known, values_of_any_kind)
    )

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(names, max_size=3))
    def holds(many):
        holds_only_its_own_errors(PairReader(schema), many)

    holds()


@settings(max_examples=100, deadline=None)
@given(transcripts, transcripts)
def test_any_transcripts(chosen, rejected):
    sides = {"chosen": chosen, "rejected": rejected}
    holds_only_its_own_errors(PairReader("transcripts"), [sides])
    holds_only_its_own_errors(PairReader("implicit"), [sides])
    holds_only_its_own_errors(PairReader("transcript_prompt"), [sides | {"prompt": chosen}])


def test_deep_nesting_and_foreign_values_in_messages_are_errors_of_ours():
    deep = {"a": None}
    for _ in range(500):
        deep = {"a": deep}
    for extra in (deep, {1: 2}, object(), b"bytes"):
        with pytest.raises(DataError, match="no JSON, or is nested"):
            read_one({"prompt": [user("p") | {"x": extra}], "chosen": "c", "rejected": "r"})
    with pytest.raises(DataError, match="'prompt' is a object"):
        read_one({"prompt": object(), "chosen": deep, "rejected": deep})
