"""Runs with adapters: what they save, who can load it, and that every later command takes it."""

import json
import shutil
import signal
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import rows
from smoldpo.config.load import build_config
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.plain import PlainEngine
from smoldpo.models.load import find_model, load_model, load_tokenizer
from smoldpo.models.weights import weights_sha256
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.resume import resume_training
from smoldpo.training.run import Run, run_training
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import ConfigError, ModelError, UsageError
from smoldpo.utils.signals import InterruptedRunError

QUICK = {
    "freeze_layers": 1,
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "warmup_ratio": 0.0,
    "sample_prompt": None,
    "generate_prompts": 0,
    "dtype": "float64",
    "device": "cpu",
}


@pytest.fixture
def train(tmp_path, tmp_path_factory, tiny_folder, monkeypatch):
    """Train a tiny model with adapters, in this process; returns the run's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(30)))

    def run(name, **settings):
        paths = {
            "model": str(tiny_folder),
            "data": [str(pairs)],
            "output_dir": str(tmp_path / name),
        }
        return run_training(build_config(QUICK | paths | settings)).folder

    return run


def logps(model, folder):
    """Summed log-probabilities of a few pairs by transformers' own forward pass, in float64."""
    reader = PairTokenizer(load_tokenizer(find_model(str(folder))), 256)
    pairs = [PreferencePair(id=str(number), **row) for number, row in enumerate(rows(6))]
    engine = PlainEngine(
        model.double(),
        None,
        EngineSettings(compute_dtype=torch.float64, train_batch_size=2, eval_batch_size=2),
    )
    found = engine.policy_logps(reader.tokenize_all(pairs))
    return torch.cat([found.chosen, found.rejected])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_and_unmerged_are_the_same_model(kind, train, tiny_folder):
    """The run's own evaluation, the adapter as peft loads it, as smoldpo does, and merged: all
    equal.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    run = train("merged", merge=True, use_dora=kind == "dora", use_rslora=True)
    assert not (run / "model" / "adapter_config.json").exists()
    assert not (run / "adapter" / "config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float64)
    assert type(merged).__name__ == "LlamaForCausalLM" and not hasattr(merged, "peft_config")
    expected = logps(merged, run)
    start = logps(load_model(find_model(str(tiny_folder)), torch.float64), tiny_folder)
    assert (start - expected).abs().min() > 1e-3, "it learnt something"
    ours = load_model(find_model(str(run / "adapter")), torch.float64)
    close(logps(ours, run), expected)
    close(logps(load_model(find_model(str(run)), torch.float64), run), expected)
    theirs = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float64)
    assert any("lora_A" in name for name, _ in theirs.named_parameters())
    close(logps(theirs.eval(), run), expected)
    if kind == "lora":  # transformers leaves DoRA's magnitudes out, which the card says
        theirs = AutoModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float64)
        close(logps(theirs.eval(), run), expected)
    evaluated = json.loads((run / "evaluation.json").read_text())["pairs"][0]
    assert evaluated["after"]["chosen_logp"] != evaluated["before"]["chosen_logp"]


def test_both_engines_train_to_the_same_adapter(train):
    fast, plain = (train(engine, engine=engine, use_dora=True) for engine in ("fast", "plain"))
    one, other = (load_file(run / "model" / "adapter_model.safetensors") for run in (fast, plain))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        # Adam divides by gradients that begin near 0, and norms are in float32.
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-6)


def test_the_plain_engine_has_one_model_in_bfloat16_too(train, monkeypatch):
    copies = types.SimpleNamespace(deepcopy=lambda _: pytest.fail("a second model"))
    monkeypatch.setattr("smoldpo.engine.build.copy", copies)
    run = train("plain", engine="plain", dtype="bfloat16", max_steps=2)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_dora_starts_as_its_reference_in_float32(engine, train):
    """To the last bit: the run itself holds the first loss to ln 2 within 1e-6, and here beta is
    100.
    """
    told = {"dtype": "float32", "use_dora": True, "freeze_layers": 0, "max_steps": 1}
    run = train("mine", engine=engine, beta=100.0, **told)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first["loss"] == pytest.approx(0.69314718, abs=1e-6)


def test_every_later_command_takes_the_run(train, cli, tiny_folder, tmp_path):
    run = train("mine", dtype="float32", generate_prompts=2, max_new_tokens=3)
    assert {path.name for path in (run / "model").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert not list(run.glob("model/model*.safetensors")) and not (run / "adapter").exists()
    size = (run / "model" / "adapter_model.safetensors").stat().st_size
    assert size < (tiny_folder / "model.safetensors").stat().st_size / 2
    card = (run / "model" / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" in card and "library_name: peft" in card
    assert "LoRA of rank 4" in card and "held-out pairs" in card
    assert "magnitudes" not in card, "that is DoRA's"
    data = tmp_path / "pairs.jsonl"
    result = cli("evaluate", tiny_folder, run, data, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["before"] != found["after"]
    for command in (
        ["chat", run, "--prompt", "Hi", "--max-new-tokens", 2],
        ["show", run],
        ["report", run],
        ["data", "show", data, "--row", 1, "--model", run],
    ):
        result = cli(*command)
        assert result.code == 0, (command, result.err)
    # On from there: the weights themselves, or adapters again, which need to be merged.
    more = ["--data", data, "--max-steps", 1, "--generate-prompts", 0, "--sample-prompt", "none"]
    result = cli("train", "--model", run, *more, "--freeze-layers", 2, "--output-dir", "on")
    assert result.code == 0, result.err
    assert (tmp_path / "on" / "model" / "model.safetensors").exists()
    again = ["train", "--model", run, *more, "--use-peft", "--output-dir", "again"]
    result = cli(*again)
    assert result.code == 2 and "set merge" in result.err
    result = cli(*again, "--merge")
    assert result.code == 0, result.err
    assert (tmp_path / "again" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "again" / "adapter").exists()


def test_a_resume_goes_on_to_the_same_bits(train, monkeypatch, tmp_path):
    settings = {"use_dora": True, "dtype": "float32", "save_steps": 2}
    whole = train("whole", **settings)
    after_step = Run._after_step

    def stop_after_three(self, steps):
        if steps == 3:
            self.interruption._received = signal.SIGTERM
        return after_step(self, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_after_step", stop_after_three)
        with pytest.raises(InterruptedRunError):
            train("stopped", **settings)
    stopped = tmp_path / "stopped"
    names = set(load_file(stopped / "checkpoints" / "step-3" / "weights.safetensors"))
    assert names and all("lora_" in name for name in names), "adapters alone"
    text = (stopped / "config.yaml").read_text()
    for before, after, setting in (
        ("lora_r: 4", "lora_r: 5", "lora_r"),
        ("lora_alpha: 8.0", "lora_alpha: 9.0", "lora_alpha"),
        ("use_dora: true", "use_dora: false", "use_dora"),
        ("use_rslora: false", "use_rslora: true", "use_rslora"),
        ("lora_target_modules: []", "lora_target_modules: [q_proj]", "lora_target_modules"),
    ):
        assert before in text
        (stopped / "config.yaml").write_text(text.replace(before, after))
        with pytest.raises(UsageError, match=f"setting {setting} is"):
            resume_training(stopped)
    (stopped / "config.yaml").write_text(text.replace("merge: false", "merge: true"))
    resume_training(stopped)
    one = load_file(whole / "model" / "adapter_model.safetensors")
    other = load_file(stopped / "adapter" / "adapter_model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert find_model(str(stopped)).base is None, "merged, as asked anew"


def test_an_extended_run_keeps_no_adapter_of_before(train, monkeypatch):
    """Merged or not may change; what stands beside model/ is always of its own weights."""
    loads = []
    start = PolicyAndReference._start
    monkeypatch.setattr(PolicyAndReference, "_start", lambda self: loads.append(1) or start(self))
    settings = {"max_steps": None, "num_train_epochs": 1.0, "save_steps": 1, "eval_fraction": 0.5}
    run = train("mine", merge=True, **settings)
    assert loads == [1], "adapter and merged model are made from one load"
    assert (run / "adapter").is_dir() and (run / "model" / "model.safetensors").is_file()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("merge: true", "merge: false"))
    resume_training(run, extend=1)
    assert (run / "model" / "adapter_config.json").is_file() and not (run / "adapter").exists()
    modules = json.loads((run / "model" / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) == 7 and modules == sorted(modules), "equal runs leave equal files"
    first = load_file(run / "model" / "adapter_model.safetensors")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("merge: false", "merge: true"))
    resume_training(run, extend=1)
    second = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    merged = logps(load_model(find_model(str(run / "model")), torch.float64), run)
    close(merged, logps(load_model(find_model(str(run / "adapter")), torch.float64), run))


def test_a_run_of_an_older_smoldpo_lacks_settings_that_came_later(train):
    run = train("mine", max_steps=None, num_train_epochs=1.0, save_steps=1)
    kept = json.loads((run / "resume.json").read_text())
    for name in ("use_dora", "lora_target_modules", "beta_end"):
        del kept["began"]["settings"][name]
    (run / "resume.json").write_text(json.dumps(kept))
    resume_training(run, extend=1)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("use_dora: false", "use_dora: true"))
    with pytest.raises(UsageError, match="setting use_dora is True, and was False"):
        resume_training(run, extend=1)


def test_the_base_is_held_to_what_it_was(train, tiny_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    run = train("mine", model=str(base), max_steps=1)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="no longer those"):
        load_model(find_model(str(run)), torch.float32)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="its model is not there"):
        find_model(str(run))


@pytest.fixture
def foreign(tmp_path, tiny_folder):
    """An adapter as peft alone writes it: no tokenizer, no word of smoldpo's."""
    from peft import LoraConfig, get_peft_model

    model = load_model(find_model(str(tiny_folder)), torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    adapted.save_pretrained(tmp_path / "foreign", save_embedding_layers=False)
    return tmp_path / "foreign", adapted


def test_an_adapter_of_others_loads_merged(foreign, tiny_tokenizer):
    folder, adapted = foreign
    source = find_model(str(folder))
    model = load_model(source, torch.float32)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert load_tokenizer(source).get_vocab() == tiny_tokenizer.get_vocab()
    found = logps(model, folder)
    torch.testing.assert_close(found, logps(adapted, folder), rtol=1e-5, atol=1e-4)


def test_adapters_that_cannot_be_loaded_say_why(foreign, tmp_path):
    folder, _ = foreign
    weights = load_file(folder / "adapter_model.safetensors")
    some = dict(list(weights.items())[1:])
    save_file(some, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lacks"):
        load_model(find_model(str(folder)), torch.float32)
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be put into its model"):
        load_model(find_model(str(folder)), torch.float32)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never read"):
        find_model(str(folder))
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    said = json.loads((folder / "adapter_config.json").read_text())
    for name, says in ((None, "does not say"), (str(folder), "an adapter of an adapter")):
        config = said | {"base_model_name_or_path": name}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=says):
            find_model(str(folder))
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(ModelError, match="cannot be read"):
        find_model(str(folder))


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"lora_r": 8}, "lora_r: of adapters.*set use_peft"),
        ({"use_dora": True, "merge": True}, "use_dora, merge: of adapters"),
        ({"use_peft": True, "lora_dropout": 0.1}, "must be 0"),
        ({"lora_dropout": 0.1}, "must be 0"),
        ({"use_peft": True, "freeze": ["norms"]}, "freeze is of the weights themselves"),
        ({"use_peft": True, "train": ["norms"]}, "train is of the weights themselves"),
        ({"use_peft": True, "sync_ref_model": True}, "sync_ref_model moves a reference"),
        ({"use_peft": True, "freeze_layers": "auto", "budget": "9m"}, "give a number of layers"),
        ({"use_peft": True, "lora_r": 0}, "lora_r is 0"),
        ({"use_peft": True, "lora_alpha": 0}, "lora_alpha is 0"),
    ],
)
def test_settings_that_contradict_each_other(settings, says):
    with pytest.raises(ConfigError, match=says):
        build_config(settings)


def test_settings_that_go_together():
    build_config({"use_peft": True, "train_layers": ["last:4"], "use_dora": True, "merge": True})
    build_config({"use_peft": True, "freeze_layers": 20, "lora_target_modules": ["q_proj"]})


def test_the_disk_is_asked_for_the_adapter_alone(tiny_folder):
    from smoldpo.engine.precision import master_dtype
    from smoldpo.training.setup import choose_trainable

    for merge in (False, True):
        config = build_config({"use_peft": True, "lora_r": 2, "merge": merge})
        model = load_model(find_model(str(tiny_folder)), master_dtype(torch.float32))
        start = weights_sha256(model)
        whole = sum(p.numel() for p in model.parameters())
        trainable = choose_trainable(config, model, torch.float32)
        assert weights_sha256(model) != start
        # q and o: 32 + 32; k and v: 32 + 16; gate and up: 32 + 64; down: 64 + 32
        adapters = 4 * 2 * (2 * 64 + 2 * 48 + 3 * 96)
        assert trainable.saved_bytes == 4 * (adapters + whole * merge)


def test_the_plan_of_a_run_with_adapters(train, cli, tiny_folder, tmp_path):
    """One depth, the configured one, with what trains and what is saved."""
    run = train("mine", dtype="float32", save_steps=2)
    told = ["--model", tiny_folder, "--data", tmp_path / "pairs.jsonl", "--freeze-layers", 1]
    told += ["--use-peft", "--lora-r", 4, "--max-steps", 4, "--save-steps", 2, "--dtype", "float32"]
    told += ["--generate-prompts", 0, "--sample-prompt", "none", "--json"]
    result = cli("plan", *told)
    assert result.code == 0, result.err
    found = json.loads(result.out)["run"]
    weights = load_file(run / "checkpoints" / "step-4" / "weights.safetensors")
    assert found["trainable_parameters"] == sum(t.numel() for t in weights.values())
    saved = load_file(run / "model" / "adapter_model.safetensors")
    assert found["disk"]["model"] == sum(t.numel() * t.element_size() for t in saved.values())
