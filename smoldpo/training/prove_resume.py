"""Whether resuming is exact on this machine: a killed and resumed run against a whole one.

Both are the real command in processes of their own, and the kills are SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smoldpo.models.hf_logging import quiet
from smoldpo.training.checkpoint import load_checkpoint, saved_steps
from smoldpo.training.fingerprint import FILE as RESUME_FILE
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.files import sha256_of

PAIRS, STEPS, KILLS = 48, 12, 3


@dataclass
class ResumeResult:
    """How a run that was killed and resumed compares with an uninterrupted run.

    Attributes:
        kills: the newest checkpoint's step at each kill.
        steps: of the whole run.
        differences: in words; none if the resume is exact.
        control: metrics that differ between the run's last two steps: the comparison can find
            something.
    """

    kills: list[int] = field(default_factory=list)
    steps: int = 0
    differences: list[str] = field(default_factory=list)
    control: list[str] = field(default_factory=list)

    @property
    def proven(self) -> bool:
        return not self.differences and bool(self.control) and bool(self.kills)

    def as_text(self) -> str:
        """For people."""
        at = ", ".join(map(str, self.kills))
        if not self.proven:
            why = self.differences or ["no kill came before the end, or nothing could be compared"]
            return "NOT proven: the resumed run differs from the whole one:\n  " + "\n  ".join(why)
        return (
            f"proven: killed {len(self.kills)} times (checkpoints of steps {at} of {self.steps}), "
            "resumed, and equal to the uninterrupted run in every bit of weights, optimizer, "
            "generators, metrics and model"
        )

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"proven": self.proven}


def prove_resume(say: Callable[[str], None], seed: int = 0) -> ResumeResult:
    """Compare runs of a small random model, made on the spot; leaves nothing behind.

    Raises:
        SmoldpoError: a training failed; the message is its own.
    """
    with tempfile.TemporaryDirectory(prefix="smoldpo-resume-") as temporary:
        folder = Path(temporary)
        make_tiny_model(folder / "model")
        rows = [
            {
                "prompt": f"Is {n} a number?",
                "chosen": f"Yes, {n} is." * (1 + n % 3),
                "rejected": f"No, {n}.",
            }
            for n in range(PAIRS)
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [
            "--model", "model", "--data", "pairs.jsonl", "--max-steps", str(STEPS),
            "--save-steps", "1", "--learning-rate", "1e-3", "--freeze-layers", "2",
            "--sample-prompt", "none", "--generate-prompts", "0", "--eval-steps", "5",
            "--warmup-ratio", "0",
        ]  # fmt: skip
        return compare_killed_run(folder, words, KILLS, say, seed)


def compare_killed_run(
    folder: Path, settings: Sequence[str], kills: int, say: Callable[[str], None], seed: int = 0
) -> ResumeResult:
    """Run `smoldpo train` with these settings in `folder`, whole and killed several times; compare.

    The settings must ask for checkpoints (save_steps), and for no output_dir. The killed run begins
    with what the whole one decided at its start, so that both compute with the same kernels.
    """
    whole, killed = folder / "whole", folder / "killed"
    say("training without interruption")
    _wait(_smoldpo(folder, "train", *settings, "--output-dir", "whole"))
    result = ResumeResult(steps=max(row["step"] for row in metrics(whole)))
    _copy_beginning(whole, killed)
    draw = random.Random(seed)
    for number in range(kills):
        step = min(result.steps - 1, 1 + number * result.steps // kills + draw.randrange(2))
        if _kill_in_or_after(_smoldpo(folder, "resume", "killed"), killed, step, draw):
            result.kills.append(max(saved_steps(killed / "checkpoints"), default=0))
            say(f"killed; its newest checkpoint is of step {result.kills[-1]} of {result.steps}")
    say("resuming to the end")
    _wait(_smoldpo(folder, "resume", "killed"))
    result.differences = differences(whole, killed)
    result.control = last_steps_differ(whole)
    return result


def _copy_beginning(whole: Path, killed: Path) -> None:
    """A run folder as it is right after a run's start."""
    killed.mkdir()
    for name in ("config.yaml", "environment.json", "data.json"):
        shutil.copy(whole / name, killed / name)
    began = json.loads((whole / RESUME_FILE).read_text(encoding="utf-8"))
    (killed / RESUME_FILE).write_text(json.dumps(began | {"finished": None}), encoding="utf-8")


def _smoldpo(folder: Path, *words: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "smoldpo", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SmoldpoError(f"the training failed ({process.returncode}):\n{errors.strip()}")


def _kill_in_or_after(
    process: subprocess.Popen[str], run: Path, step: int, draw: random.Random
) -> bool:
    """SIGKILL a random moment after the run has logged `step`; False if it was finished by then."""
    while process.poll() is None:
        path = run / "metrics.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if any(json.loads(row)["step"] >= step for row in rows if row.endswith("}")):
            time.sleep(draw.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    return process.returncode == -signal.SIGKILL


CLOCKED = {"seconds"}
"""What a row of metrics says about time."""
CHECKPOINT_STATE = ("best", "budget", "rng", "reference_sha256", "reference_syncs")


def differences(one: Path, other: Path) -> list[str]:
    """How two finished runs, each with a last checkpoint, differ, in words; empty if they do not.

    Compared are the weights that train, the optimizer's state, the random generators, every row of
    the metrics but its seconds, the evaluation, and the bytes of the saved model.
    """
    found = _checkpoints(one, other)
    first, second = metrics(one), metrics(other)
    if len(first) != len(second):
        found.append(f"metrics.jsonl has {len(first)} rows and {len(second)}")
    for number, (ours, theirs) in enumerate(zip(first, second, strict=False), 1):
        names = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        if names:
            found.append(
                f"metrics.jsonl, row {number} (step {ours.get('step')}): {', '.join(names)}"
            )
    weights = {f"model/{path.name}" for run in (one, other) for path in _weights(run)}
    if not weights:
        found.append("model: neither run has saved one")
    for name in ("evaluation.json", *sorted(weights)):
        files = one / name, other / name
        exist = [file.is_file() for file in files]
        if exist[0] != exist[1] or (all(exist) and sha256_of(files[0]) != sha256_of(files[1])):
            found.append(name)
    return found


def _weights(run: Path) -> list[Path]:
    """The saved model's files; a large one has several."""
    return sorted((run / "model").glob("*.safetensors"))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, without what the clock says."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def last_steps_differ(run: Path) -> list[str]:
    """Which metrics of a run's last two steps differ: the comparison can find a difference."""
    rows = [row for row in metrics(run) if "loss" in row][-2:]
    return [key for key in rows[0] if rows[0][key] != rows[1].get(key)]


def _checkpoints(one: Path, other: Path) -> list[str]:
    steps = [saved_steps(run / "checkpoints")[-1:] for run in (one, other)]
    if steps[0] != steps[1] or not steps[0]:
        return [f"the last checkpoint is {steps[0] or 'none'} and {steps[1] or 'none'}"]
    first, second = (
        load_checkpoint(run / "checkpoints" / f"step-{steps[0][0]}") for run in (one, other)
    )
    found = []
    for part in first.tensors | second.tensors:
        ours, theirs = first.tensors.get(part, {}), second.tensors.get(part, {})
        names = [
            name
            for name in ours | theirs
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
        ]
        if names:
            found.append(
                f"{part}: {len(names)} of {len(ours | theirs)} tensors, such as {names[0]}"
            )
    found += [
        f"state.json: {key}"
        for key in CHECKPOINT_STATE
        if first.state.get(key) != second.state.get(key)
    ]
    return found


CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_model(folder: Path, seed: int = 0) -> None:
    """Save a random Llama of four layers, with a tokenizer that reads bytes."""
    words = CONTROL + sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
