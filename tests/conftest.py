"""Small random models for the many tests, the real weights for the few."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for each other's cores slow all down
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items) -> None:
    """What calls commands is marked `runs`, but for what looks at runs that are made once."""
    for item in items:
        asked = set(item.fixturenames)
        if asked & {"cli", "often", "place"} and not asked & {"golden", "swept"}:
            item.add_marker("runs")


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "How do I boil an egg? Put it in boiling water for eight minutes.",
    "user assistant system question answer yes no maybe 0123456789",
]


CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_bpe(split=None, texts=(), ignore_merges=False, post_processor=None, **more):
    """A byte-level BPE with SmolLM2's control tokens and a chat template like its own.

    Args:
        split: a pre-tokenizer of `tokenizers`; GPT-2's by default.
        texts: that it learns merges from, beside TEXTS.
        more: of PreTrainedTokenizerFast.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*TEXTS, *texts] * 4, trainer)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        **more,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return byte_level_bpe()


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


@pytest.fixture
def tiny_model(tiny_config):
    """A random Llama of four layers in float64."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config).double().eval()


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Once:
    """`once(name, make)`: a folder that is made once a test run, by the worker that first needs it.

    Tests look at it, or take a copy.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / f"once-{name}"
        with FileLock(f"{folder}.lock"):
            if not (folder / ".made").exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failure left of it
                folder.mkdir()
                make(folder)
                (folder / ".made").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_folder(once, tiny_tokenizer, tiny_config) -> Path:
    """A model folder as users have them: config, safetensors, tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    def make(folder):
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)

    return once("tiny-model", make)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    from browser import ARGUMENTS, BROWSER

    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def start_web():
    """`start_web(folder, *arguments)`: a running `smoldpo web` in this folder."""
    from webserver import Servers

    servers = Servers()
    yield servers
    servers.end()


def make_tiny(folder, **config):
    """A model folder of one layer and eight words, with these settings of its configuration."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        **config,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate("abcdefgh")}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), eos_token="h"
    ).save_pretrained(folder)


def keep_entry(kind, key, size, used, about='{"what": "a test"}'):
    """An entry of the cache of so many bytes, last used so many seconds after 1970."""
    from smoldpo.engine.cache import folder as cache

    folder = cache.entry_folder(kind, key)
    folder.mkdir(parents=True)
    (folder / "some.states").write_bytes(bytes(size - len(about)))
    (folder / "about.json").write_text(about)
    os.utime(folder, (used, used))
    return folder


def rows(count: int) -> list[dict]:
    """Pairs that a tiny model can learn from: chosen says yes, rejected says no."""
    return [
        {
            "prompt": f"Question {number}: is the number {number} a number?",
            "chosen": f"Yes, {number} is a number." + " Really." * (number % 3),
            "rejected": f"No, {number} is a fox." + " Lazy dog." * (number % 4),
        }
        for number in range(count)
    ]


def noisy_rows(count):
    """Of every third pair the sides are swapped, so that no trial gets all of them right."""
    found = rows(count)
    for row in found[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return found


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., Path]:
    """Write rows as JSONL and return the file."""

    def write(items: list, name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    return write


@pytest.fixture
def pairs_file(write_rows) -> Path:
    return write_rows(rows(40))


@dataclass
class Result:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        assert "Traceback" not in self.out + self.err


@functools.cache
def commands():
    """The command line, parsed from its functions once."""
    import typer

    from smoldpo.cli import main

    return typer.main.get_command(main.app)


def command(*arguments: object) -> Result:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            commands()([str(argument) for argument in arguments], standalone_mode=True)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def cli(monkeypatch, tmp_path, tmp_path_factory, request) -> Iterator[Callable]:
    """Run the command line in this process, in an empty folder; returns code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    if "real" not in request.keywords:  # those need the unpacked model of the real cache
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield command


DRAWN = []
"""What draws a plot, before tests go without."""


@contextlib.contextmanager
def _alone(folder: Path, pictures: bool) -> Iterator[None]:
    """In this folder, with a cache in it; for what is made for many tests."""
    with pytest.MonkeyPatch.context() as patch:
        if pictures:
            patch.setattr("smoldpo.reports.plots._drawn", DRAWN[0])
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr("smoldpo.engine.autotune.SHAPE", (64, 64, 64))
        patch.setattr("smoldpo.engine.autotune.SECONDS", 0.002)
        yield


def _copied(folder: Path, name: str, place: Path) -> tuple[Result, Path]:
    """What was said while `name` was made in `folder`, and a copy of it in `place`."""
    copy = Path(shutil.copytree(folder / name, place / name))
    said = json.loads((folder / "said.json").read_text())
    moved = {key: text.replace(str(folder / name), str(copy)) for key, text in said.items()}
    return Result(0, **moved), copy


Golden = Callable[..., tuple[Result, Path]]


@pytest.fixture(scope="session")
def golden(once, tiny_folder) -> Golden:
    """`golden(name, place, *settings)`: what `train` said over forty pairs, and a copy of its run.

    The run is made once a test run; the copy is `place`/run.
    """

    def run(name: str, place: Path, *settings: object, pictures: bool = False):
        def make(folder: Path) -> None:
            pairs = folder / "pairs.jsonl"
            pairs.write_text(jsonl(rows(40)))
            words = ("--model", tiny_folder, "--data", pairs, "--output-dir", folder / "run")
            with _alone(folder, pictures):
                result = command("train", *words, *settings)
            assert result.code == 0, result.err
            (folder / "said.json").write_text(json.dumps({"out": result.out, "err": result.err}))

        return _copied(once(f"run-{name}", make), "run", place)

    return run


def jsonl(items: list) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


SWEEP = {
    "data": "pairs.jsonl", "eval_fraction": 0.5, "max_steps": 5, "dtype": "float32",
    "device": "cpu", "compile": "off", "freeze_layers": 2, "warmup_ratio": 0,
    "per_device_train_batch_size": 4, "sample_prompt": "none", "generate_prompts": 0,
    "learning_rate": 3e-3, "output_dir": "out",
}  # fmt: skip


def _sweep(folder: Path, model: Path, tried: dict, *more: object, code: int, **settings) -> Result:
    import yaml

    common = {"model": str(model)} | SWEEP
    plain = {k: v for k, v in common.items() if k not in tried} | settings | {"sweep": tried}
    (folder / "mine.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    result = command("sweep", "mine.yaml", *more)
    assert result.code == code, result.err + result.out
    return result


@pytest.fixture
def sweep(cli, write_rows, tiny_folder, tmp_path):
    """Run a sweep in the folder out, of short trials."""
    write_rows(noisy_rows(66))

    def run(tried, *more, code=0, **settings):
        return _sweep(tmp_path, tiny_folder, tried, *more, code=code, **settings)

    return run


@pytest.fixture
def swept(sweep, once, tiny_folder, tmp_path):
    """The same, finished; it is made once a test run, and copied."""

    def run(tried, pictures=False):
        def make(folder):
            (folder / "pairs.jsonl").write_text(jsonl(noisy_rows(66)))
            with _alone(folder, pictures):
                result = _sweep(folder, tiny_folder, tried, code=0)
            (folder / "said.json").write_text(json.dumps({"out": result.out, "err": result.err}))

        name = re.sub(r"\W+", "-", json.dumps(tried))
        folder = once(f"sweep{name}", make)
        shutil.copy(folder / "mine.yaml", tmp_path)
        return _copied(folder, "out", tmp_path)[0]

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    """Where `sweep` leaves what it finds."""
    return tmp_path / "out"


@pytest.fixture(scope="session")
def real():
    """The built-in SmolLM2-135M-Instruct: its source, ready to load."""
    from smoldpo.models.load import find_model

    return find_model("builtin")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real preference pairs, which lie beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no real pairs at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def same_kernels():
    """Which kernel is faster is measured: beside other work now one, now the other, rounding
    otherwise.
    """
    from smoldpo.engine import build
    from smoldpo.engine.autotune import KernelChoice
    from smoldpo.reports import plots

    DRAWN.append(plots._drawn)
    measured = build.choose_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            build,
            "choose_kernels",
            lambda dtype, device, asked="auto": (
                KernelChoice() if device == "cpu" else measured(dtype, device, asked)
            ),
        )
        patch.setattr("smoldpo.engine.autotune._fused_is_faster", lambda way, before: True)
        patch.setattr("smoldpo.engine.autotune._reason_for_torch", lambda name: "not measured")
        patch.setattr("smoldpo.engine.autotune.store_choice", lambda name, choice: None)
        patch.setattr("smoldpo.engine.autotune.store_rate", lambda name, rate: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def versions_read_once():
    """Those of ten libraries, by each run, are a twentieth of a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("training.fingerprint", "training.run_folder", "engine.cache.keys"):
            patch.setattr(f"smoldpo.{module}.version", functools.cache(metadata.version))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_disks():
    """No test cuts the power: what a kill leaves does not depend on fsync, of which a run has
    twenty.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Products are padded to whole blocks of rows: of few tokens and a wide model, nine tenths."""
    monkeypatch.setattr("smoldpo.engine.logprobs.ROWS", 128)
    monkeypatch.setattr("smoldpo.engine.logprobs.TRUNK_ROWS", 128)


@pytest.fixture(autouse=True)
def quick_rates(request, monkeypatch):
    """Measuring the machine takes as long as all that a tiny model computes."""
    if "real" not in request.keywords:
        monkeypatch.setattr("smoldpo.engine.autotune.SHAPE", (64, 64, 64))
        monkeypatch.setattr("smoldpo.engine.autotune.SECONDS", 0.002)


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """matplotlib takes more than half of a tiny run: it draws where a test looks, marked
    `pictures`.
    """
    if not {"pictures", "real"} & set(request.keywords):
        monkeypatch.setattr("smoldpo.reports.plots._drawn", lambda draw, size: "<svg ></svg>")


@pytest.fixture(autouse=True)
def threads(request):
    """Tiny models run best on one thread; the real weights get all of them."""
    import torch

    everything = torch.get_num_threads()
    torch.set_num_threads(everything if "real" in request.keywords else 1)
    yield
    torch.set_num_threads(everything)


@pytest.fixture
def write(tmp_path):
    """Write a recipe of another trainer and import it."""
    from smoldpo.config.importers import import_recipe

    def run(text: str, dialect: str | None = None, name: str = "recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return import_recipe(path, dialect)

    return run


@pytest.fixture(autouse=True, scope="module")
def frozen_libraries():
    """plan, sweeps and failed steps look for garbage: a third of a second through all libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def planted(monkeypatch):
    """Times that are far above those of this machine: a step's rows take hours, the rest next to
    nothing.
    """
    from smoldpo.plan import trial
    from smoldpo.plan.cost_model import Rates

    rates = Rates(step_row=2.0)
    monkeypatch.setattr(trial, "fit_rates", lambda *_: rates)
    return rates
