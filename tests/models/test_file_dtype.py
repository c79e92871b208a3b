"""Models whose files hold bfloat16: frozen layers stay as they are stored, and no result tells.

Held against the same values in float32 files, to the last bit.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import smoldpo
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.load import build_config
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import EngineStores, build_engine
from smoldpo.engine.precision import master_dtype
from smoldpo.engine.trunk import boundary
from smoldpo.evaluation import evaluate
from smoldpo.losses import Objective
from smoldpo.models import save
from smoldpo.models.adapters import AdapterSettings, add_adapters
from smoldpo.models.families import FAMILIES
from smoldpo.models.freeze import freeze
from smoldpo.models.load import ModelSource, load_model
from smoldpo.models.mapped_weights import file_page_bytes
from smoldpo.models.weight_files import narrow_dtype
from smoldpo.plan.trial import Trial
from smoldpo.training.setup import load_data, load_models
from smoldpo.types import TokenizedPair
from wide import LAYERS, below, make_wide

pytestmark = pytest.mark.usefixtures("small_blocks")
PAIRS = [TokenizedPair(f"{n}", (5, 6, n), (8, 9, n, 2), (10, n, 2)) for n in range(20, 28)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are let go only there")
DATA = [{"prompt": f"Is {n}?", "chosen": "Yes, it is.", "rejected": "No, no."} for n in range(30)]


ADAPTERS = AdapterSettings(4, 8.0, (), False, False, LayerSelection(0), 3)


def both_ways(make_folder, tokenizer, tied: bool) -> list[Path]:
    """The same model stored in bfloat16 and in float32."""
    return [
        make_wide(make_folder(name), tokenizer, dtype, tied)
        for name, dtype in (("narrow", torch.bfloat16), ("full", torch.float32))
    ]


@pytest.fixture(scope="module")
def both_kinds(tmp_path_factory, tiny_tokenizer) -> dict[bool, list[Path]]:
    """By whether the head is tied."""
    return {
        tied: both_ways(tmp_path_factory.mktemp, tiny_tokenizer, tied) for tied in (True, False)
    }


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folders(request, both_kinds) -> list[Path]:
    return both_kinds[request.param]


@pytest.fixture
def untied(both_kinds) -> list[Path]:
    """Without a tied head embeddings stay as they are stored, too."""
    return both_kinds[False]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def engine_of(folder: Path, compute: torch.dtype, frozen: int = 3, adapters=None, names=()):
    """Loaded as a run does; with `adapters`, settings of them that differ from ADAPTERS."""
    source = ModelSource("m", str(folder))
    policy = load_model(source, master_dtype(compute), as_stored=FAMILIES)
    if adapters is None:
        freeze(policy, LayerSelection(frozen, freeze=names))
    else:
        settings = dataclasses.replace(ADAPTERS, layers=LayerSelection(frozen), **adapters)
        add_adapters(policy, settings, master_dtype(compute))
    settings = EngineSettings(compute, 8, 8, 3840, "memory", 0, compiled=False)
    return build_engine(policy, None, settings, "start").engine, settings


@torch.no_grad()
def move_adapters(engine) -> None:
    """B begins at 0: A would have no gradient."""
    engine.prepare(PAIRS)
    for name, parameter in engine.trainable_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    engine.updated()


DORA = {"use_dora": True, "use_rslora": True}
SOME = {"lora_target_modules": ("q_proj", "up_proj")}


@pytest.mark.parametrize(
    ("folders", "compute", "frozen", "more"),
    [
        (True, torch.float32, 0, {}),
        (False, torch.float32, 1, {}),
        (True, torch.float32, 3, {}),
        (False, torch.float64, 3, {}),
        (True, torch.bfloat16, 3, {}),
        (False, torch.bfloat16, 3, {}),
        (True, torch.float32, 1, {"names": ["*.mlp.*"]}),  # frozen parts above the boundary
        (True, torch.float32, 0, {"names": ["embeddings", "*.self_attn.*"]}),
        (False, torch.float32, 0, {"names": ["embeddings", "*.self_attn.*"]}),
        (True, torch.float32, 0, {"adapters": {}}),
        (False, torch.float32, 0, {"adapters": DORA}),
        (True, torch.float32, 1, {"adapters": DORA | SOME}),
        (False, torch.float64, 1, {"adapters": SOME}),
        (True, torch.bfloat16, 1, {"adapters": DORA}),
    ],
    ids=str,
    indirect=["folders"],
)
def test_results_are_those_of_full_files(folders, compute, frozen, more):
    found, keys = [], []
    for folder in folders:
        engine, settings = engine_of(folder, compute, frozen, **more)
        at = boundary(engine.policy)
        settings = dataclasses.replace(settings, kernels=engine.kernels)
        keys.append(
            EngineStores(engine.policy, None, settings, "start")._trunk_key(at) if at else ""
        )
        move_adapters(engine)
        result = engine.accumulate_gradients(PAIRS, Objective.of(beta=0.3))
        masters = [parameter for _, parameter in engine.trainable_parameters()]
        full = torch.float64 if compute == torch.float64 else torch.float32
        assert {master.dtype for master in masters} == {full}
        found.append(
            [result.losses, result.policy.chosen, result.reference.rejected, *masters]
            + [master.grad for master in masters]
        )
        engine.drop_gradients()
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert keys[0] == keys[1], "what one of them kept serves the other"


def test_float16_files_are_read_as_exactly(tmp_path, tiny_tokenizer):
    narrow, full = (
        make_wide(tmp_path / str(dtype), tiny_tokenizer, dtype)
        for dtype in (torch.float16, torch.float32)
    )
    # What bfloat16 holds and float16 does not is rounded in the file, so both start from the file's
    # values.
    weights = {name: w.float() for name, w in load_file(narrow / "model.safetensors").items()}
    save_file(weights, full / "model.safetensors", metadata={"format": "pt"})
    for compute in (torch.float32, torch.bfloat16):
        found = [engine_of(folder, compute)[0].policy_logps(PAIRS) for folder in (narrow, full)]
        assert torch.equal(found[0].chosen, found[1].chosen)


def test_hashes_do_not_tell_how_it_was_loaded(folders, write_rows):
    """Else neither the trials of a sweep nor runs of two formats would share a reference."""
    given = {"model": str(folders[0]), "data": str(write_rows(DATA)), "dtype": "float32"}
    found = []
    for more in ({}, {"use_peft": True}, {"model": str(folders[1])}, {"engine": "plain"}):
        config = build_config(given | {"reference": str(folders[0])} | more)
        found.append(load_models(config, load_data(config)).facts.hashes)
    assert found.count(found[0]) == 4 and len(set(found[0].values())) == 1


@linux
@pytest.mark.parametrize("more", [{"adapters": {}}, {"names": ["*_proj*", "embeddings"]}], ids=str)
def test_so_are_matrices_between_what_trains(folders, more):
    engine, _ = engine_of(folders[0], torch.float32, 0, **more)
    layers = engine.policy.model.layers.named_parameters()
    frozen = [w for name, w in layers if w.dim() == 2 and not w.requires_grad]
    assert len(frozen) == 7 * LAYERS and {weight.dtype for weight in frozen} == {torch.bfloat16}
    assert file_page_bytes(frozen) > 0.98 * sum(2 * weight.numel() for weight in frozen)
    engine.prepare(PAIRS)
    assert engine.release_frozen() == 0, "each step reads them"


def test_a_reference_of_its_own_stays_as_it_is_stored(folders):
    source = ModelSource("m", str(folders[0]))
    policy, reference = (load_model(source, torch.float32, as_stored=FAMILIES) for _ in "ab")
    freeze(policy, LayerSelection(3))
    settings = EngineSettings(torch.float32, 8, 8, 3840, "memory", 0, compiled=False)
    build_engine(policy, reference, settings, "start")
    matrices = [w for w in reference.model.layers.parameters() if w.dim() == 2]
    assert {weight.dtype for weight in matrices} == {torch.bfloat16}


@linux
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_frozen_matrices_are_their_file(folders, compute):
    engine, _ = engine_of(folders[0], compute)
    frozen = [weight for weight in below(engine.policy, 3) if weight.dim() == 2]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    bytes_of_them = sum(2 * weight.numel() for weight in frozen)
    assert file_page_bytes(frozen) > 0.98 * bytes_of_them
    others = {id(p) for p in engine.policy.parameters()} - {id(p) for p in frozen}
    assert {p.dtype for p in engine.policy.parameters() if id(p) in others} == {compute}
    engine.prepare(PAIRS)
    assert engine.release_frozen() > 0.98 * bytes_of_them


def test_what_the_compute_dtype_does_not_hold_is_converted_once(folders):
    engine, _ = engine_of(folders[1], torch.bfloat16)
    assert {parameter.dtype for parameter in engine.policy.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_evaluate_finds_the_same(untied, engine, monkeypatch):
    seen, score = [], evaluate.score

    def watched(model, *given):
        seen.append({w.dtype for w in model.model.layers.parameters() if w.dim() == 2})
        return score(model, *given)

    monkeypatch.setattr(evaluate, "score", watched)
    settings = {"engine": engine, "dtype": "float32", "verbose": False}
    ours, theirs = (smoldpo.evaluate(str(folder), DATA, **settings) for folder in untied)
    assert ours.pairs == theirs.pairs and len(ours.pairs) == len(DATA)
    assert seen == ([{torch.bfloat16}, {torch.float32}] if engine == "fast" else [])


def everything_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w for path in folder.glob("*.safetensors") for name, w in load_file(path).items()}


def run(folder: Path, output: Path, **more):
    given = {"model": str(folder), "data": DATA, "output_dir": str(output), "max_steps": 2}
    given |= {"learning_rate": 1e-3, "freeze_layers": 2, "dtype": "float32", "max_new_tokens": 3}
    given |= {"generate_prompts": 1, "sample_prompt": None}
    smoldpo.train(**given | more)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clocks = {"seconds", "time", "pairs_per_second", "memory_mb", "tokens_per_second", "peak_mb"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


@pytest.mark.runs
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"engine": "plain"},
        {"use_peft": True, "merge": True},
        {"use_peft": True, "use_dora": True, "freeze_layers": 0},
        {"use_peft": True, "engine": "plain"},
        {"freeze": ["*.mlp.*"]},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"cache": "off"},
    ],
    ids=str,
)
def test_a_run_is_that_of_full_files(untied, tmp_path, more):
    both = [run(folder, tmp_path / folder.name, **more) for folder in untied]
    assert both[0] == both[1] and any("loss" in row for row in both[0])
    saved = [tmp_path / folder.name / "model" for folder in untied]
    ours, theirs = (everything_in(folder) for folder in saved)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, theirs[name]), name
    if more.get("use_peft") and not more.get("merge"):
        assert not (saved[0] / "config.json").exists()
    else:
        configs = [json.loads((folder / "config.json").read_text()) for folder in saved]
        assert configs[0] == configs[1] and configs[0]["dtype"] == "float32"
    start = load_file(untied[1] / "model.safetensors")
    if ours.keys() == start.keys():
        assert any(not torch.equal(ours[name], weight) for name, weight in start.items())
    else:
        assert all(bool(ours[name].any()) for name in ours if "lora_B" in name)
    evaluations = [(folder.parent / "evaluation.json").read_text() for folder in saved]
    assert evaluations[0] == evaluations[1]


@pytest.mark.runs
def test_a_reference_of_its_own(untied, tmp_path, tiny_tokenizer):
    policy = run(untied[1], tmp_path / "policy") and tmp_path / "policy" / "model"
    both = [run(policy, tmp_path / folder.name, reference=str(folder)) for folder in untied]
    assert both[0] == both[1]
    assert next(row["loss"] for row in both[0] if "loss" in row) < 0.69, "not away from its start"


@pytest.mark.parametrize("shard", [1 << 30, 4 << 20])
def test_what_is_saved_is_what_transformers_saves(folders, tmp_path, monkeypatch, shard):
    """In full precision, though parts of it lie in another; in files of a size that memory has room
    for.
    """
    monkeypatch.setattr(save, "SHARD_BYTES", shard)
    narrow, full = (LlamaForCausalLM.from_pretrained(f, dtype="auto") for f in folders)
    for model in (narrow, full):
        weight = model.model.layers[3].mlp.up_proj.weight
        weight.data = weight.float() + 2**-20
    (tmp_path / "ours").mkdir()
    save.save_in_full(tmp_path / "ours", narrow, torch.float32)
    full.save_pretrained(tmp_path / "theirs")
    ours, theirs = (everything_in(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(w.dtype == torch.float32 and torch.equal(w, theirs[n]) for n, w in ours.items())
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert all(path.stat().st_size < shard + 10_000 for path in files) and (len(files) > 2) == (
        shard < 1 << 30
    )
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert all(
        torch.equal(p, q) for p, q in zip(again.parameters(), full.parameters(), strict=True)
    )


def test_what_files_hold(tmp_path, tiny_tokenizer):
    def told(folder, types=FAMILIES):
        return narrow_dtype(str(folder), types)

    assert told(tmp_path) is None
    for name, dtype, more in (
        ("bf16", torch.bfloat16, {}), ("f16", torch.float16, {}),
        ("shards", torch.bfloat16, {"max_shard_size": "1MB"}),
    ):  # fmt: skip
        assert told(make_wide(tmp_path / name, tiny_tokenizer, dtype, **more)) == dtype
    assert told(tmp_path / "bf16", FAMILIES - {"llama"}) is None
    shards = tmp_path / "shards"
    assert len(list(shards.glob("*.safetensors"))) > 3
    full = make_wide(tmp_path / "f32", tiny_tokenizer)
    assert told(full) is None
    shutil.copy(full / "model.safetensors", shards)  # transformers opens that, and no index
    assert told(shards) is None
    mixed = tmp_path / "bf16" / "model.safetensors"
    weights = load_file(mixed)
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 2**-20
    save_file(weights, mixed, metadata={"format": "pt"})
    assert told(mixed.parent) is None  # its norm would be rounded
    mixed.write_bytes(b"nothing")
    assert told(mixed.parent) is None


@pytest.mark.runs
@linux
@pytest.mark.parametrize(
    ("folders", "dtype", "more"),
    [
        (True, "float32", {}),
        (False, "bfloat16", {}),
        (True, "bfloat16", {"use_peft": True}),
        (False, "float32", {"use_peft": True}),
        (True, "bfloat16", {"freeze": ["*.mlp.*"]}),
        (False, "float32", {"freeze": ["*.mlp.*"]}),
    ],
    ids=str,
    indirect=["folders"],
)
def test_the_forecast_counts_weights_as_they_lie(folders, write_rows, dtype, more):
    given = {"model": str(folders[0]), "data": str(write_rows(DATA)), "dtype": dtype}
    given |= {"generate_prompts": 0, "sample_prompt": None}
    config = build_config(given | {"freeze_layers": 2} | more)
    trial = Trial(config, 0.0)
    assert trial.sizes.loaded == trial.models.trainable.policy_bytes / 2
    raw = load_data(config)
    for depth in trial.depths:
        at = load_models(config.model_copy(update={"freeze_layers": depth.frozen}), raw)
        there = sum(p.numel() * p.element_size() for p in at.engine.policy.parameters())
        assert trial.sizes.weights - depth.unconverted_bytes == pytest.approx(there, rel=0.001)
        frozen = sum(2 * w.numel() for w in below(at.engine.policy, depth.frozen) if w.dim() == 2)
        assert depth.released_bytes == (frozen if depth.frozen else 0)
    depths = [2] if more.get("use_peft") else list(range(LAYERS))
    assert [depth.frozen for depth in trial.depths] == depths
