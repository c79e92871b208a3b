"""The numerical conventions of tokenisation, on a tiny tokenizer and on SmolLM2's own."""

import pytest

from conftest import CHAT_TEMPLATE
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError, ModelError

QUESTION = ({"role": "user", "content": "How do I boil an egg?"},)
END = 2


def decode(tokenizer, ids):
    return tokenizer.decode(list(ids))


def with_template(tokenizer, template):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_prompt_has_the_generation_prompt_and_only_completions_are_scored(tiny_tokenizer):
    pair = PairTokenizer(tiny_tokenizer, 512).tokenize(PreferencePair(QUESTION, "Yes.", "No."))
    assert decode(tiny_tokenizer, pair.prompt_ids) == (
        "<|im_start|>user\nHow do I boil an egg?<|im_end|>\n<|im_start|>assistant\n"
    )
    # The end of turn is scored; the newline that the template puts after it is not.
    assert decode(tiny_tokenizer, pair.chosen_ids) == "Yes.<|im_end|>"
    assert decode(tiny_tokenizer, pair.rejected_ids) == "No.<|im_end|>"


def test_no_second_bos(tiny_tokenizer):
    pair = PairTokenizer(tiny_tokenizer, 512).tokenize(PreferencePair(QUESTION, "Yes.", "No."))
    assert pair.prompt_ids[0] == tiny_tokenizer.bos_token_id
    assert pair.prompt_ids[1] != tiny_tokenizer.bos_token_id


def test_a_text_prompt_becomes_a_user_message(tiny_tokenizer):
    reader = PairTokenizer(tiny_tokenizer, 512)
    text = reader.tokenize(PreferencePair(QUESTION[0]["content"], "Yes.", "No."))
    assert text.prompt_ids == reader.tokenize(PreferencePair(QUESTION, "Yes.", "No.")).prompt_ids


def test_plain_model_gets_eos_once_and_the_tokenizers_own_bos(tiny_tokenizer):
    plain = with_template(tiny_tokenizer, None)
    pair = PairTokenizer(plain, 512).tokenize(PreferencePair("The fox", " jumps", " sleeps"))
    assert pair.chosen_ids[-1] == END and pair.chosen_ids.count(END) == 1
    assert decode(plain, pair.prompt_ids) == "The fox"


def test_plain_model_with_bos(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    plain = with_template(tiny_tokenizer, None)
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    pair = PairTokenizer(plain, 512).tokenize(PreferencePair("The fox", " jumps", " sleeps"))
    assert pair.prompt_ids[0] == 1 and 1 not in pair.prompt_ids[1:] + pair.chosen_ids


def test_a_dialogue_for_a_plain_model_is_an_error_with_its_row(tiny_tokenizer):
    plain = with_template(tiny_tokenizer, None)
    with pytest.raises(DataError, match=r"f\.jsonl, row 7: .*no chat template"):
        PairTokenizer(plain, 512).tokenize(PreferencePair(QUESTION, "a", "b", "f.jsonl", 7))


@pytest.mark.parametrize("max_length", range(2, 40))
def test_truncation_keeps_the_completion(tiny_tokenizer, max_length):
    full = PairTokenizer(tiny_tokenizer, 512).tokenize(
        PreferencePair(QUESTION, "Yes, maybe.", "No.")
    )
    reader = PairTokenizer(tiny_tokenizer, max_length)
    cut = reader.tokenize(PreferencePair(QUESTION, "Yes, maybe.", "No."))
    assert cut.longest <= max_length or full.longest <= max_length
    assert len(cut.prompt_ids) >= 1 and cut.chosen_ids and cut.rejected_ids
    # The prompt loses its oldest tokens, and completions only when no more than one of them is
    # left.
    assert full.prompt_ids[-len(cut.prompt_ids) :] == cut.prompt_ids
    assert full.chosen_ids[: len(cut.chosen_ids)] == cut.chosen_ids
    if len(cut.chosen_ids) < len(full.chosen_ids):
        assert len(cut.prompt_ids) == 1
        assert cut.chosen_ids[-1] != END
        assert "chosen_truncated" in cut.notes and reader.notes["chosen_truncated"] == 1
    else:
        assert cut.chosen_ids[-1] == END
    assert ("prompt_truncated" in cut.notes) == (len(cut.prompt_ids) < len(full.prompt_ids))


def test_a_merge_across_the_boundary_is_reported(tiny_tokenizer):
    plain = with_template(tiny_tokenizer, None)
    reader = PairTokenizer(plain, 512)
    assert "boundary_merge" in reader.tokenize(PreferencePair("The qui", "ck fox", "et")).notes
    assert "boundary_merge" not in reader.tokenize(PreferencePair("The", " quick", " fox")).notes
    assert reader.notes["boundary_merge"] == 1


@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_forged_control_tokens_are_spelled_out(tiny_tokenizer, where):
    texts = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    texts[where] += " <|im_end|> more"
    pair = PreferencePair(
        ({"role": "user", "content": texts["prompt"]},), texts["chosen"], texts["rejected"]
    )
    clean = PreferencePair(({"role": "user", "content": "ask"},), "yes", "no")
    reader = PairTokenizer(tiny_tokenizer, 512)
    forged, normal = reader.tokenize(pair), reader.tokenize(clean)
    for side in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert getattr(forged, side).count(END) == getattr(normal, side).count(END)
    assert "<|im_end|> more" in decode(tiny_tokenizer, getattr(forged, f"{where}_ids"))
    assert reader.notes["forged_control_token"] == 1


def test_a_template_that_trims(tiny_tokenizer):
    trims = CHAT_TEMPLATE.replace("message['content']", "(message['content'] | trim)")
    reader = PairTokenizer(with_template(tiny_tokenizer, trims), 512)
    pair = reader.tokenize(PreferencePair(QUESTION, "  Yes.  ", "No."))
    assert decode(tiny_tokenizer, pair.chosen_ids) == "Yes.<|im_end|>"
    kept = PairTokenizer(tiny_tokenizer, 512).tokenize(PreferencePair(QUESTION, " Yes. ", "No."))
    assert decode(tiny_tokenizer, kept.chosen_ids) == " Yes. <|im_end|>"


def test_a_template_without_end_of_turn_gets_eos(tiny_tokenizer):
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    reader = PairTokenizer(with_template(tiny_tokenizer, bare), 512)
    pair = reader.tokenize(PreferencePair(QUESTION, "Yes.", "No."))
    assert decode(tiny_tokenizer, pair.chosen_ids) == "Yes.<|im_end|>"


def test_a_template_that_thinks_before_the_answer_is_reported(tiny_tokenizer):
    thinks = CHAT_TEMPLATE.replace(
        "+ message['content']",
        "+ ('<think></think>' if message['role'] == 'assistant' else '') + message['content']",
    )
    reader = PairTokenizer(with_template(tiny_tokenizer, thinks), 512)
    assert (
        "template_puts_text_before_answer"
        in reader.tokenize(PreferencePair(QUESTION, "Yes.", "No.")).notes
    )


def test_a_template_that_refuses_names_the_row(tiny_tokenizer):
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    reader = PairTokenizer(with_template(tiny_tokenizer, refuses + CHAT_TEMPLATE), 512)
    system = ({"role": "system", "content": "Be brief."}, *QUESTION)
    with pytest.raises(DataError, match=r"d\.jsonl, row 3: .*no system role"):
        reader.tokenize(PreferencePair(system, "a", "b", "d.jsonl", 3))


def test_a_template_without_the_answer_is_refused(tiny_tokenizer):
    with pytest.raises(ModelError, match="leaves the assistant's answer out"):
        PairTokenizer(with_template(tiny_tokenizer, "{{ messages[0]['content'] }}"), 512)


@pytest.mark.real
def test_builtin_tokenizer_splits_digits_as_smollm2_does(real):
    from smoldpo.models.load import load_tokenizer

    tokenizer = load_tokenizer(real)
    # SmolLM2 splits each digit off first, so white space before one stays together.
    assert tokenizer.tokenize("a\n 5  12") == ["a", "ĊĠ", "5", "ĠĠ", "1", "2"]
    reader = PairTokenizer(tokenizer, 1024)
    pair = reader.tokenize(PreferencePair(QUESTION, "In water.", "No."))
    assert tokenizer.decode(pair.prompt_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHow do I boil an egg?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    assert not reader.notes
