"""What a GGUF file says in other places than transformers looks: read, or the file is refused."""

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType

import smoldpo
from smoldpo.models.generate import end_ids
from smoldpo.models.load import find_model, load_model, load_tokenizer
from smoldpo.types import TokenizedPair
from smoldpo.utils.errors import ModelError

WIDTH, HEADS, KV_HEADS, LAYERS, CONTEXT = 128, 4, 2, 2, 1024
HEAD = WIDTH // HEADS
TOKENS = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "ab", "<s>", "</s>"]
IDS = [(index * 7 + 3) % 36 for index in range(200)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(arch):
    rng = np.random.default_rng(0)
    found = {
        "token_embd.weight": rng.standard_normal((len(TOKENS), WIDTH)),
        "output_norm.weight": np.ones(WIDTH),
        "output.weight": rng.standard_normal((len(TOKENS), WIDTH)) * 0.3,
    }
    kv = KV_HEADS * HEAD
    shapes = {"attn_q": WIDTH, "attn_k": kv, "attn_v": kv, "attn_output": WIDTH}
    shapes |= {"ffn_gate": WIDTH, "ffn_up": WIDTH, "ffn_down": WIDTH}
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{norm}.weight"] = np.ones(WIDTH)
        for name, rows in shapes.items():
            found[f"blk.{layer}.{name}.weight"] = rng.standard_normal((rows, WIDTH)) * 0.2
        if arch == "qwen2":
            for name in ("attn_q", "attn_k", "attn_v"):
                found[f"blk.{layer}.{name}.bias"] = rng.standard_normal(shapes[name]) * 0.1
    return found


def write(path, arch="llama", pre="smollm", say=None, change=None):
    """A random model of two layers; `say` writes more metadata, `change` changes the tensors."""
    writer = GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    if say is not None:
        say(writer)
    tensors = weights(arch)
    if change is not None:
        change(tensors)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path):
    return load_model(find_model(str(path)), torch.float32)


def llama3(factor, low=1.0, high=4.0, old=8192):
    """What llama.cpp's converter puts into rope_freqs.weight (convert_hf_to_gguf.py)."""
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    smooth = np.clip((old / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def frequencies(factors):
    return lambda tensors: tensors.update({"rope_freqs.weight": factors})


def linear(writer):
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def old_linear(writer):
    writer.add_float32(f"{writer.arch}.rope.scale_linear", 4.0)


def yarn(writer):
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(256)


def sharper_yarn(writer):
    yarn(writer)
    writer.add_rope_scaling_attn_factors(1.5)


# log-probabilities of tokens 0 to 3 behind 200 tokens, by llama.cpp (build of xllamacpp
# 2026.10.11549, CPU, float32 cache) from the files that `write` writes.
LLAMA_CPP = {
    "plain": ({}, [-2.4034, -7.911, -3.1324, -7.4244]),
    "llama3, 8": ({"change": frequencies(llama3(8.0))}, [-1.6981, -7.8911, -2.7392, -7.3723]),
    "llama3, 32": ({"change": frequencies(llama3(32.0))}, [-1.6138, -7.9262, -2.7186, -7.3752]),
    "factors of another kind": (
        {"change": frequencies(llama3(8, 1, 2, 64))}, [-2.793, -9.612, -6.6714, -4.9204],
    ),
    "linear": ({"say": linear}, [-3.5081, -6.3215, -5.8757, -5.1897]),
    "linear, older key": ({"say": old_linear}, [-3.5081, -6.3215, -5.8757, -5.1897]),
    "yarn": ({"say": yarn}, [-6.1412, -2.1612, -2.722, -5.3763]),
    "yarn, sharper": ({"say": sharper_yarn}, [-8.5758, -1.1382, -3.9643, -7.279]),
    "qwen2, yarn": ({"arch": "qwen2", "say": yarn}, [-10.9919, -13.3511, -5.5343, -14.9538]),
}  # fmt: skip


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_log_probabilities_are_those_of_llama_cpp(tmp_path, kind):
    settings, expected = LLAMA_CPP[kind]
    model = load(write(tmp_path / "m.gguf", **settings))
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([IDS])).logits[0, -1].double(), -1)
    assert found[:4].tolist() == pytest.approx(expected, abs=5e-4)


def test_what_is_read_of_llama3s_scaling_is_its_own(tmp_path):
    model = load(write(tmp_path / "m.gguf", change=frequencies(llama3(32.0))))
    assert model.config.rope_parameters == {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain = 500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    expected = plain / torch.from_numpy(llama3(32.0))
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_factors_of_one_change_nothing(tmp_path):
    path = write(tmp_path / "m.gguf", change=frequencies(np.ones(HEAD // 2)))
    assert load(path).config.rope_parameters["rope_type"] == "default"


REFUSED = {
    "scaled twice": ({"say": linear, "change": frequencies(llama3(8.0))}, "twice"),
    "factors that do not fit": ({"change": frequencies(np.full(5, 2.0))}, "5 factors"),
    "longrope": (
        {"say": lambda w: w.add_rope_scaling_type(RopeScalingType.LONGROPE)}, "'longrope'",
    ),
    "yarn's own settings": (
        {"say": lambda w: [yarn(w), w.add_float32("llama.rope.scaling.yarn_beta_fast", 16.0)]},
        "yarn_beta_fast is 16",
    ),
    "a new key": ({"say": lambda w: w.add_float32("llama.rope.scaling.new", 2.0)}, "new"),
    "partly rotated": ({"say": lambda w: w.add_rope_dimension_count(HEAD // 2)}, "part of each"),
    "a window": ({"say": lambda w: w.add_sliding_window(64)}, r"sliding_window \(64\)"),
    "experts": ({"say": lambda w: w.add_expert_count(4)}, "expert_count is 4"),
    "a part": ({"say": lambda w: w.add_uint16("split.count", 3)}, "one of 3 parts"),
    "a bias": (
        {"change": lambda t: t.update({"blk.1.attn_q.bias": np.ones(WIDTH)})}, r"1\.attn_q\.bias",
    ),
    "a layer too many": (
        {"change": lambda t: t.update({"blk.2.ffn_up.weight": np.ones(WIDTH)})}, r"blk\.2",
    ),
    "a weight too few": ({"change": lambda t: t.pop("blk.1.ffn_up.weight")}, r"1\.mlp\.up_proj"),
    "smollm3, a weight too few": (
        {"arch": "smollm3", "change": lambda t: t.pop("blk.1.ffn_up.weight")}, r"1\.mlp\.up_proj",
    ),
    "smollm3, a bias": (
        {"arch": "smollm3", "change": lambda t: t.update({"blk.1.attn_q.bias": np.ones(WIDTH)})},
        r"1\.attn_q\.bias",
    ),
    "another shape": (
        {"change": lambda t: t.update({"output_norm.weight": np.ones(4)})}, r"norm\.weight is \[4",
    ),
    "no word of splitting": ({"pre": None}, "does not say how"),
    "another word of splitting": ({"pre": "superbpe"}, "'superbpe'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path, kind):
    settings, says = REFUSED[kind]
    with pytest.raises(ModelError, match=rf"m\.gguf: cannot be read as a GGUF model: .*{says}"):
        load(write(tmp_path / "m.gguf", **settings))
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "nothing is left over"


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "command-r", "exaone"])
def test_each_digit_is_split_off_where_the_file_says_so(tmp_path, pre):
    tokenizer = load_tokenizer(find_model(str(write(tmp_path / "m.gguf", pre=pre))))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [text for text, _ in split("ab 12c")] == ["ab", "Ġ", "1", "2", "c"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ1234", "c"]),
        ("llama-bpe", ["ab", "Ġ", "123", "4", "c"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4", "c"]),
        ("stablelm2", ["ab", "Ġ", "1", "2", "3", "4", "c"]),
    ],
)
def test_other_ways_of_splitting(tmp_path, pre, pieces):
    tokenizer = load_tokenizer(find_model(str(write(tmp_path / "m.gguf", pre=pre))))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [text for text, _ in split("ab 1234c")] == pieces


@pytest.mark.parametrize(("more", "ends"), [((), [39]), (("eot",), [38, 39]), (("eom",), [38, 39])])
def test_every_token_that_ends_a_turn_ends_an_answer(tmp_path, more, ends):
    def say(writer):
        for name in more:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", 38)

    source = find_model(str(write(tmp_path / "m.gguf", say=say)))
    assert end_ids(load_model(source, torch.float32), load_tokenizer(source)) == ends


def test_no_file_is_read_whose_tensors_are_not_the_models(tmp_path):
    for name in ("token_embd", "blk.0.attn_q", "blk.1.ffn_norm", "blk.1.ffn_down"):
        for kind in ("remove", "rename", "reshape", "add"):

            def change(tensors, name=f"{name}.weight", kind=kind):
                found = tensors[name]
                if kind in ("remove", "rename"):
                    del tensors[name]
                if kind in ("rename", "add"):
                    tensors[name.replace(".weight", "_more.weight")] = found
                if kind == "reshape":
                    tensors[name] = np.concatenate([found, found[:HEAD]])

            with pytest.raises(ModelError, match="cannot be read as a GGUF model: "):
                load(write(tmp_path / "m.gguf", change=change))


def test_the_fast_engine_computes_the_same(tmp_path):
    """With factors of another kind transformers may change its rotary embedding as it runs."""
    source = find_model(str(write(tmp_path / "m.gguf", change=frequencies(llama3(8, 1, 2, 64)))))
    model = load_model(source, torch.float32)
    pair = TokenizedPair("1", tuple(IDS[:50]), tuple(IDS[50:150]), tuple(IDS[150:]))
    with torch.no_grad():
        found = smoldpo.sequence_logps(model, [pair])
        for answer, logp in ((pair.chosen_ids, found.chosen), (pair.rejected_ids, found.rejected)):
            whole = torch.tensor([[*pair.prompt_ids, *answer]])
            plain = torch.log_softmax(model(whole).logits[0].double(), -1)[49:-1]
            expected = plain.gather(1, torch.tensor(answer)[:, None]).sum()
            assert logp.item() == pytest.approx(expected.item(), rel=1e-5)
