"""A GGUF file, read back by our own reader and by transformers, is the model that was written."""

import json

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from conftest import CHAT_TEMPLATE, CONTROL_TOKENS, byte_level_bpe, rows
from smoldpo.data.tokenize import Tokenization
from smoldpo.engine.autotune import KernelChoice
from smoldpo.evaluation.metrics import PairFacts
from smoldpo.export.gguf import About, require_exportable, write_gguf
from smoldpo.export.verify import VerificationError, compare, measure
from smoldpo.models.generate import end_ids
from smoldpo.models.gguf import read_gguf
from smoldpo.models.gguf_tokenizer import WRITTEN, splitter
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import ModelError, UsageError

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}
PAIRS = [PreferencePair(row["prompt"], row["chosen"], row["rejected"]) for row in rows(4)]


def model_of(kind, vocabulary=400, tied=True, **settings):
    """A random model of two layers; matrices' rows have 64 numbers."""
    config, model = KINDS[kind]
    torch.manual_seed(0)
    shape = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "initializer_range": 0.3,
    }  # fmt: skip
    if kind == "mistral":
        shape["sliding_window"] = None
    if kind == "smollm3":
        shape["num_hidden_layers"] = 4  # the last of which has no rotary embedding
    made = model(config(**shape | {"tie_word_embeddings": tied} | settings)).eval()
    for name, weight in made.named_parameters():
        if weight.dim() == 1:  # biases are 0 and norms 1 at first
            weight.data += torch.randn_like(weight) * 0.2
        assert torch.isfinite(weight).all(), name
    return made


def tokenizer_of(name="smollm", ignore_merges=False, bos=False, **more):
    """A byte-level BPE that splits text as this name says."""
    begin = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return byte_level_bpe(
        splitter(name), ["12 345 6789, it's 1,000"], ignore_merges, begin if bos else None, **more
    )


def round_trip(path, model, tokenizer, kind="f32"):
    """The file written, read back and compared, as `smoldpo export` does."""
    write_gguf(path, model, tokenizer, kind, About("mine", "mit", "someone/some-model"))
    how, kernels = Tokenization(256), KernelChoice(False, False)
    read, its_tokenizer = read_gguf(path)
    before = measure(model, tokenizer, PAIRS, how, kernels, CONTROL_TOKENS, "the model")
    after = measure(read, its_tokenizer, PAIRS, how, kernels, CONTROL_TOKENS, "the file")
    return read, compare(before, after, [PairFacts.of(pair) for pair in PAIRS], kind)


SCALED = {
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn, sharper": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128, "attention_factor": 1.5,
    },
}  # fmt: skip
CASES = {
    **{f"{kind}, {'tied' if tied else 'untied'}": (kind, {"tied": tied})
       for kind in KINDS for tied in (True, False)},
    **{f"llama, {name}": ("llama", {"rope_parameters": rope}) for name, rope in SCALED.items()},
    "smollm3, yarn": ("smollm3", {"rope_parameters": SCALED["yarn"]}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": SCALED["yarn"]}),
    "a head's own width": ("llama", {"head_dim": 32}),
    "one key head for each": ("llama", {"num_key_value_heads": 4}),
    "rows without tokens": ("llama", {"vocabulary": 448}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_back_is_the_model_bit_for_bit(tmp_path, case):
    kind, settings = CASES[case]
    model = model_of(kind, **settings)
    read, verified = round_trip(tmp_path / "m.gguf", model, tokenizer_of())
    assert verified.largest < (1e-5 if "yarn" in case else 1e-12)
    own, found = dict(model.named_parameters()), dict(read.named_parameters())
    assert own.keys() == found.keys()
    for name, weight in own.items():
        assert torch.equal(weight, found[name]), name
    assert verified.before == verified.after


@pytest.mark.parametrize(
    ("kind", "bits", "bound"), [("f16", 16, 2e-2), ("bf16", 16, 0.1), ("q8_0", 8.5, 0.1)]
)
def test_narrower_types_are_near(tmp_path, kind, bits, bound, monkeypatch):
    monkeypatch.setattr("smoldpo.export.verify.BOUNDS", {kind: bound})
    model = model_of("llama", tied=False, initializer_range=0.1)
    _, verified = round_trip(tmp_path / "m.gguf", model, tokenizer_of(), kind)
    assert 0 < verified.mean < bound
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    matrix = tensors["output.weight"]
    assert matrix.n_bytes * 8 / matrix.n_elements == bits


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("bos", [False, True])
def test_tokenizers_come_back(tmp_path, name, bos):
    ignore = name in ("llama-bpe", "tekken")
    tokenizer = tokenizer_of(name, ignore_merges=ignore, bos=bos)
    round_trip(tmp_path / "m.gguf", model_of("llama"), tokenizer)
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == name


def test_merges_are_ignored_where_the_tokenizer_ignores_them(tmp_path):
    """A word that is a token, and that no merges make."""
    tokenizer = tokenizer_of("llama-bpe", ignore_merges=True)
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["model"]["merges"] = [m for m in said["model"]["merges"] if "".join(m) != "quick"][:20]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(said))
    round_trip(tmp_path / "m.gguf", model_of("llama"), tokenizer)
    _, read = read_gguf(tmp_path / "m.gguf")
    assert len(read.encode("brown fox lazy", add_special_tokens=False)) < 8


def test_tokens_that_are_added_and_not_special_come_back(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<think>", "</think>"])
    write_gguf(
        tmp_path / "m.gguf", model_of("llama", len(tokenizer)), tokenizer, "f32", About("mine")
    )
    _, read = read_gguf(tmp_path / "m.gguf")
    text = "a<think>b</think>c"
    assert read.encode(text) == tokenizer.encode(text)
    types = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert types[-2:] == [4, 4] and types[:3] == [3, 3, 3]


def test_every_end_comes_back(tmp_path):
    model, tokenizer = model_of("llama"), tokenizer_of()
    model.generation_config.eos_token_id = [2, 0]
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "f32", About("mine"))
    assert sorted(end_ids(*read_gguf(tmp_path / "m.gguf"))) == [0, 2]


def test_what_the_file_says_of_itself(tmp_path):
    write_gguf(
        tmp_path / "m.gguf", model_of("llama"), tokenizer_of(), "q8_0",
        About("mine", "mit", "someone/some-model"),
    )  # fmt: skip
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    said = {name: field.contents() for name, field in fields.items()}
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "mine",
        "general.license": "mit", "general.base_model.0.name": "some model",
        "general.base_model.0.organization": "someone", "general.file_type": 7,
        "general.quantization_version": 2, "llama.block_count": 2, "llama.context_length": 512,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0, "llama.vocab_size": 400,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    assert {name: said.get(name) for name in expected} == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "smollm3"])
def test_transformers_reads_it_too(tmp_path, kind):
    model, tokenizer = model_of(kind), tokenizer_of()
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "f32", About("mine"))
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").chat_template


REFUSED = {
    "a bias": (lambda: model_of("llama", attention_bias=True), r"q_proj\.bias"),
    "an activation": (lambda: model_of("llama", hidden_act="gelu"), "'gelu'"),
    "other layers that are not rotated": (
        lambda: model_of("smollm3", no_rope_layers=[1, 0, 1, 0]),
        "no_rope_layers",
    ),
    "a window": (lambda: model_of("mistral", sliding_window=64), r"window \(64"),
    "dynamic scaling": (
        lambda: model_of(
            "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "'dynamic'",
    ),
    "yarn's own settings": (
        lambda: model_of("llama", rope_parameters={**SCALED["yarn"], "beta_fast": 16}),
        "beta_fast 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_go_are_refused_by_name(case):
    make, says = REFUSED[case]
    with pytest.raises(ModelError, match=says):
        require_exportable(make())


def odd_splits():
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("o"), "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    return tokenizer


def lower_case():
    from tokenizers import normalizers

    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def no_bytes():
    words = {word: number for number, word in enumerate(["a", "b", "c"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "a")))


@pytest.mark.parametrize(
    ("make", "says"),
    [(odd_splits, "no name for"), (lower_case, "Lowercase"), (no_bytes, "no byte-level BPE")],
)
def test_tokenizers_that_cannot_go_are_refused(tmp_path, make, says):
    with pytest.raises(ModelError, match=says):
        write_gguf(tmp_path / "m.gguf", model_of("llama"), make(), "f32", About("mine"))


def test_a_token_without_a_row_is_refused(tmp_path):
    with pytest.raises(ModelError, match="only 300 rows"):
        write_gguf(tmp_path / "m.gguf", model_of("llama", 300), tokenizer_of(), "f32", About("m"))


def test_weights_beyond_float16_are_refused(tmp_path):
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e5
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight holds 100000.*bf16"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer_of(), "f16", About("mine"))


@pytest.mark.parametrize("wrong", ["weights", "rows", "tokenizer"])
def test_a_file_that_is_another_model_is_found_out(tmp_path, wrong, monkeypatch):
    if wrong == "rows":
        monkeypatch.setattr("smoldpo.export.gguf.INTERLEAVED", set())
    model, tokenizer = model_of("llama"), tokenizer_of("gpt-2")
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "f32", About("mine"))
    read, its = read_gguf(tmp_path / "m.gguf")
    if wrong == "weights":
        read.model.layers[0].mlp.up_proj.weight.data[0] += 0.1
    if wrong == "tokenizer":
        its.backend_tokenizer.pre_tokenizer = splitter("smollm")
    how, kernels = Tokenization(256), KernelChoice(False, False)
    before = measure(model, tokenizer, PAIRS, how, kernels, CONTROL_TOKENS, "the model")
    after = measure(read, its, PAIRS, how, kernels, CONTROL_TOKENS, "the file")
    says = "tokenizer is not" if wrong == "tokenizer" else "is not the model: mean"
    with pytest.raises(VerificationError, match=says):
        compare(before, after, [PairFacts.of(pair) for pair in PAIRS], "f32")


def test_types_that_cannot_be_written_say_how_to_get_them():
    from smoldpo.export.gguf import require_type

    assert require_type("Q8_0") == "q8_0"
    with pytest.raises(UsageError, match=r"llama-quantize, which is not on the PATH"):
        require_type("q4_k_m")
    with pytest.raises(UsageError, match="did you mean bf16"):
        require_type("bf61")
