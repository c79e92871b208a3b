"""Loading: the built-in model, GGUF files, folders, and what is refused."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from conftest import make_tiny
from smoldpo.models import gguf
from smoldpo.models.builtin import builtin_gguf
from smoldpo.models.hf_logging import quiet
from smoldpo.models.load import find_model, load_model, load_tokenizer
from smoldpo.models.weights import weights_sha256
from smoldpo.utils.errors import ModelError, SmoldpoError, UsageError


@pytest.mark.real
def test_the_builtin_model_knows_its_capital(cli):
    result = cli("chat", "builtin", "--prompt", "What is the capital of France?")
    assert "Paris" in result.out


@pytest.mark.real
def test_the_unpacked_model_is_mended_and_can_be_saved(real, tmp_path):
    model = load_model(real, torch.float32)
    assert model.config.rms_norm_eps == 1e-5
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert weights_sha256(AutoModelForCausalLM.from_pretrained(tmp_path)) == weights_sha256(model)


@pytest.mark.real
def test_a_damaged_unpacked_model_is_made_anew(monkeypatch, tmp_path):
    """With the GGUF reading counted, since it takes long, and a small model in its place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read = []

    def small(path, advance):
        read.append(path)
        config = load_model(find_model(str(tiny)), torch.float32)
        return config, load_tokenizer(find_model(str(tiny)))

    tiny = tmp_path / "tiny"
    make_tiny(tiny)
    monkeypatch.setattr(gguf, "read_gguf", small)
    folder = gguf.unpack_gguf(builtin_gguf())
    assert gguf.unpack_gguf(builtin_gguf()) == folder and len(read) == 1
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    gguf.unpack_gguf(builtin_gguf())
    assert len(read) == 2 and weights.read_bytes() != bytes(damaged)
    (folder / "manifest.json").unlink()
    gguf.unpack_gguf(builtin_gguf())
    assert len(read) == 3
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing left over"


def test_a_gguf_is_read_as_transformers_reads_it_without_a_bar(tmp_path, capfd):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    model = gguf._read_model(path, "llama", {}, [])
    assert "Converting" not in capfd.readouterr().err
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    assert "Converting" in capfd.readouterr().err, (
        "the bar is gone; read with from_pretrained alone"
    )
    assert type(model) is type(theirs)
    ours = model.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())
    assert ours["model.layers.0.self_attn.q_proj.weight"].std() > 0.5, "not as it was initialised"


def write_gguf(path):
    """A llama of one layer and eight words, its weights standard normal numbers."""
    from gguf import GGUFWriter

    rng, width = np.random.default_rng(0), 16
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list("abcdefgh"))
    shapes = {"token_embd": (8, width), "output_norm": (width,)}
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}"] = (width,)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (width, width)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_quiet_in_two_threads_leaves_the_settings_as_they_were():
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert before[0] != logging.ERROR
    entered, leave = threading.Event(), threading.Event()

    def other():
        with quiet():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        entered.wait(0.1)  # it must not, or it would take the silence for the settings
        assert logging.get_verbosity() == logging.ERROR
    leave.set()
    thread.join()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_damaged_gguf_is_refused(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"broken\.gguf: cannot be read"):
        find_model(str(path))
    with pytest.raises(UsageError, match="no such file"):
        find_model(str(tmp_path / "missing.gguf"))


def test_a_run_folder_is_its_model(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "run" / "model")
    assert find_model(str(tmp_path / "run")).location == str(tmp_path / "run" / "model")


def test_weights_stored_in_bfloat16_train_in_float32(tiny_folder, tmp_path):
    source = find_model(str(tiny_folder))
    narrow = load_model(source, torch.bfloat16)
    narrow.save_pretrained(tmp_path)
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    loaded = load_model(find_model(str(tmp_path)), torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_dropout_is_off_everywhere(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"attention_dropout": 0.5}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    model = load_model(find_model(str(tmp_path / "m")), torch.float32)
    assert model.config.attention_dropout == 0 and not model.training


def test_dropout_modules_are_off_too(tiny_tokenizer, tmp_path):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": len(tiny_tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    assert json.loads((tmp_path / "gpt2" / "config.json").read_text())["embd_pdrop"] > 0
    model = load_model(find_model(str(tmp_path / "gpt2")), torch.float32)
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert modules and not any(module.p for module in modules)


def test_damaged_weights_are_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(SmoldpoError, match="cannot be loaded"):
        load_model(find_model(str(tmp_path / "m")), torch.float32)


def test_the_hash_is_of_the_content(tiny_folder):
    source = find_model(str(tiny_folder))
    one, other = load_model(source, torch.float32), load_model(source, torch.float32)
    assert weights_sha256(one) == weights_sha256(other)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    assert weights_sha256(one) != weights_sha256(other)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def refuse(self, name, timeout):
        asked.append((name, timeout))
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    source = find_model("someone/some-model")
    with pytest.raises(ModelError, match="the hub does not answer, and the cache has none"):
        load_tokenizer(source)
    assert asked == [("someone/some-model", 5.0)] and constants.HF_HUB_OFFLINE is False
