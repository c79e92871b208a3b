"""`import smoldpo` changes nothing in the program that imports it, and neither does a run."""

import json
import subprocess
import sys

import pytest

from conftest import rows

SCRIPT = """
import importlib, json, os, pathlib, pkgutil, signal, sys, types, warnings

LIBRARIES = ("transformers", "tokenizers", "torch", "peft", "jinja2", "safetensors", "datasets",
             "huggingface_hub", "accelerate", "tqdm", "numpy", "pydantic", "rich", "typer")
MODULES = [
    *LIBRARIES, "jinja2.sandbox", "jinja2.ext", "torch.nn.functional", "torch.utils.checkpoint",
    "torch.nn.attention.flex_attention", "torch._dynamo", "torch.optim", "peft.tuners.lora.layer",
    "peft.tuners.lora.dora", "transformers.utils.chat_template_utils", "transformers.utils.logging",
    "transformers.modeling_utils", "transformers.modeling_gguf_pytorch_utils", "datasets.config",
    "transformers.masking_utils", "transformers.modeling_rope_utils", "tqdm.auto", "warnings",
    "transformers.tokenization_utils_base", "transformers.generation.utils", "logging", "builtins",
    *(f"transformers.models.{name}.modeling_{name}"
      for name in ("llama", "smollm3", "qwen2", "qwen3", "mistral")),
]
for name in MODULES:
    importlib.import_module(name)

def inside(value):
    return value if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType
                               | types.ModuleType | property | staticmethod | classmethod) else None

def members():
    # Functions and classes of all modules and classes; objects are kept, so that ids stay unique.
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in (*LIBRARIES, "warnings", "logging", "builtins") and module:
            for key, value in list(vars(module).items()):
                if inside(value) is not None:
                    found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    for part, held in list(vars(value).items()):
                        if inside(held) is not None:
                            found[name, key, part] = held
    return found

def settings():
    import logging, torch, transformers
    from transformers.utils import logging as theirs
    return {
        "environment": dict(os.environ), "signals": [signal.getsignal(n) for n in (2, 14, 15)],
        "hooks": (sys.excepthook, sys.stdout, sys.stderr, sys.getrecursionlimit()),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled(),
                  torch.get_float32_matmul_precision()),
        "verbosity": (theirs.get_verbosity(), theirs.is_progress_bar_enabled()),
        "logging": (logging.root.level, list(logging.root.handlers)), "cwd": os.getcwd(),
        "attention": set(transformers.AttentionInterface._global_mapping),
        "masks": set(transformers.AttentionMaskInterface._global_mapping),
    }

def compare(when):
    for key, value in before.items():
        module = sys.modules[key[0]]
        owner = module if len(key) == 2 else vars(module)[key[1]]
        if vars(owner).get(key[-1]) is not value:
            changed.append(f"{when}: {'.'.join(key)}")
    for key, value in settings().items():
        allowed = {"smoldpo_shared_prefix"} if key in ("attention", "masks") else set()
        same = value - allowed == known[key] if isinstance(value, set) else value == known[key]
        if not same:
            changed.append(f"{when}: {key}")

before, known, changed = members(), settings(), []
filters = list(warnings.filters)
import smoldpo
folder = pathlib.Path(smoldpo.__file__).parent
for path in sorted(folder.rglob("*.py")):
    if path.name != "__main__.py":
        parts = path.relative_to(folder.parent).with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
compare("import")
if warnings.filters != filters:
    changed.append("import: warnings.filters")
result = smoldpo.train(
    model=sys.argv[1], data=sys.argv[2], output_dir="run", max_steps=2, device="cpu",
    dtype="float32", compile="off", freeze_layers=2, per_device_train_batch_size=4,
    eval_fraction=0.2, generate_prompts=2, max_new_tokens=4, use_peft=False,
)
compare("run")
found, changed = changed, []
exec(PATCHES)
compare("plant")
print("CHANGED", json.dumps([found, changed, len(before)]))
"""


PATCHES = """
import torch, transformers
transformers.models.llama.modeling_llama.apply_rotary_pos_emb = print
transformers.utils.chat_template_utils.ImmutableSandboxedEnvironment = object
transformers.PreTrainedModel.tie_weights = lambda *_, **__: None
torch.set_num_threads(7)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory, tiny_folder):
    """What was changed by import and run, what by the patches, and how much was looked at."""
    place = tmp_path_factory.mktemp("place")
    pairs = place / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    script = SCRIPT.replace("PATCHES", repr(PATCHES))
    words = [sys.executable, "-c", script, str(tiny_folder), str(pairs)]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("CHANGED ")[1])


def test_modules_and_settings_are_what_they_were(said):
    changed, _, count = said
    assert changed == []
    assert count > 10_000, "nothing was looked at"


def test_a_patch_would_be_seen(said):
    for name in ("apply_rotary_pos_emb", "ImmutableSandboxedEnvironment", "tie_weights", "torch"):
        assert any(line.startswith("plant: ") and line.endswith(name) for line in said[1]), name
