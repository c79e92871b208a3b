"""Prompts from every kind of source."""

import pytest

from smoldpo.pairs.prompts import read_prompts
from smoldpo.types import TemplateArguments
from smoldpo.utils.errors import DataError, UsageError


def user(text):
    return {"role": "user", "content": text}


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffFirst?\r\n\r\n  Second? \r\nFirst?\nDrítte?".encode())
    found = read_prompts(str(path))
    assert [asked.prompt for asked in found.prompts] == ["First?", "Second?", "Drítte?"]
    assert found.repeated == 1 and [asked.row for asked in found.prompts] == [1, 3, 5]
    assert [p.prompt for p in read_prompts(str(path), limit=2).prompts] == ["First?", "Second?"]
    briefly = read_prompts(str(path), system="Be brief.")
    assert briefly.prompts[0].prompt == (
        {"role": "system", "content": "Be brief."},
        user("First?"),
    )


def test_rows_with_a_prompt_and_no_pair(write_rows):
    tools = [{"type": "function", "function": {"name": "look"}}]
    answer = {"role": "assistant", "content": "Yes."}
    path = write_rows(
        [
            {"prompt": "Text?", "tools": None},
            {"messages": [user("Chat?"), answer], "system": "Be brief.", "tools": tools},
            {"instruction": "Sum up.", "input": "A text."},
            {"text": "Plain"},
            {"prompt": " "},
            {"prompt": [user("More?"), answer, user("And?")]},
        ]
    )
    found = read_prompts(str(path))
    assert [asked.prompt for asked in found.prompts] == [
        "Text?",
        ({"role": "system", "content": "Be brief."}, user("Chat?")),
        (user("Sum up.\nA text."),),
        "Plain",
        (user("More?"), answer, user("And?")),
    ]
    assert found.prompts[1].arguments == TemplateArguments(tools=tuple(tools))
    assert found.unreadable == 1


def test_pairs_give_their_prompts(write_rows):
    rows = [{"prompt": f"Q{n % 2}?", "chosen": "yes", "rejected": "no"} for n in range(4)]
    found = read_prompts(str(write_rows(rows)))
    assert [asked.prompt for asked in found.prompts] == ["Q0?", "Q1?"] and found.repeated == 2


def test_what_holds_no_prompt_is_told_with_its_row(write_rows, tmp_path):
    path = write_rows([{"prompt": "a"}, {"answer": "b"}])
    with pytest.raises(DataError, match=r"row 2.*holds no prompt: none of the columns"):
        read_prompts(str(path))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(str(empty))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))
    with pytest.raises(UsageError, match="a prompt a line"):
        read_prompts(str(empty), split="train")
    with pytest.raises(UsageError, match="no such file"):
        read_prompts(str(tmp_path / "none.txt"))
