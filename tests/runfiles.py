"""Run folders made up for tests: seeded numbers that agree with each other, texts of the built-in
set.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from conftest import ROOT
from smoldpo.config.schema import TrainConfig

BUILTIN = ROOT / "smoldpo" / "data" / "builtin" / "test.jsonl"
METRICS = ("logp", "logp_per_token", "reward")


def wilson(value: float, n: int) -> dict[str, float]:
    """A 95% interval of a share."""
    z = 1.96
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return {"value": value, "low": middle - half, "high": middle + half}


def builtin_rows(count: int) -> list[dict[str, Any]]:
    lines = BUILTIN.read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[index % len(lines)]) for index in range(count)]


def tokens_of(text: str, rng: Any, lean: float = 0.0) -> list[list[Any]]:
    """Words with the space before them, and a log-ratio each: most near 0, a few far from it."""
    words = text.split(" ")
    pieces = [words[0], *(f" {word}" for word in words[1:])]
    return [[piece, round(float(rng.laplace(lean, 0.35)), 4)] for piece in pieces]


def evaluation(rng: Any, n: int = 509, after: float = 0.612) -> dict[str, Any]:
    """evaluation.json without what needs texts."""
    headline = (
        f"The tuned model prefers the human-preferred answer in {after:.1%} of {n} held-out pairs, "
        "before 50.0%; very unlikely to be chance: p = 0.0004."
    )
    before = {"logp": 0.533, "logp_per_token": 0.497, "reward": 0.5}
    later = {"logp": 0.5461, "logp_per_token": 0.5285, "reward": after}
    return {
        "n": n, "beta": 0.1, "prompts": n - 11, "kind": "run", "metric": "reward",
        "names": {"before": "before", "after": "after"},
        "headline": headline, "explanations": ["What it rests on, in a sentence."],
        "verdict": "change", "level": 0.95, "comparisons": 3,
        "correction": "Holm",
        "before": {"accuracy": before}, "after": {"accuracy": later},
        "accuracy": {name: _accuracy(name, before[name], later[name], n) for name in METRICS},
        "baselines": {"longer": 0.5521, "shorter": 0.4479, "coin": 0.5},
        "by_length": _by_length(n, after),
        "by_length_difference": _length_bins(rng, n),
        "slices": {
            "source": [_group("helpful-base", 0.6 * n, 0.63), _group("helpful-online", 0.4 * n,
             0.58)],
            "category": [_group(f"category {k}", n / 7, 0.5 + 0.03 * k) for k in range(7)],
        },
        "calibration": _calibration(rng, n),
        "drift": {
            "chosen": _drift(-210.13, -215.04), "rejected": _drift(-198.42, -209.9),
            "perplexity_chosen": {"before": 8.12, "after": 8.61}, "alarm": None, "advice": [],
        },
        "margins": _margins(rng, n),
        "logp_margins": _margins(rng, n, before=-0.2, reach=60),
        "generation": {
            "prompts": 16, "temperature": 1.0, "max_new_tokens": 96,
            "reference": _answers(60.2), "policy": _answers(71.9),
            "kl_per_token": {"value": 0.0213, "low": 0.0151, "high": 0.0284},
        },
        "judges": [
            {"judge": "length", "n": 16, "wins": 9, "losses": 6, "ties": 1, "p": 0.607,
             "win_rate": wilson(0.59375, 16), "disagreement": None, "failed": 0},
            {"judge": "http://127.0.0.1:8000/v1", "n": 15, "wins": 10, "losses": 5, "ties": 0,
             "p": 0.302, "win_rate": wilson(10 / 15, 15), "disagreement": 0.125, "failed": 1},
        ],
    }  # fmt: skip


def _accuracy(name: str, before: float, after: float, n: int) -> dict[str, Any]:
    tied = name == "reward"
    change = after - before
    return {
        "before": {"value": before, "low": None, "high": None} if tied else wilson(before, n),
        "after": wilson(after, n),
        "change": {"value": change, "low": change - 0.0413, "high": change + 0.0427},
        "improved": round(n * after) if tied else 41,
        "worsened": n - round(n * after) if tied else 34,
        "test": "exact McNemar",
        "p": 0.000134 if tied else 0.4889,
        "p_corrected": 0.000402 if tied else 0.9778,
        "words": "very unlikely to be chance" if tied else "may well be chance",
    }


def _group(name: str, n: float, after: float) -> dict[str, Any]:
    return {"name": name, "n": round(n), "before": 0.5, "after": wilson(after, round(n))}


def _by_length(n: int, after: float) -> dict[str, Any]:
    return {
        "metric": "reward",
        "chosen_shorter": _group("", 0.43 * n, after - 0.031),
        "chosen_longer": _group("", 0.53 * n, after + 0.024),
        "equal": _group("", 0.04 * n, after),
        "balanced": {"before": 0.5, "after": after - 0.0035},
    }


def _length_bins(rng: Any, n: int) -> list[dict[str, Any]]:
    edges = [-182, -71, -38, -19, -6, 3, 14, 32, 55, 96, 240]
    bins = []
    for low, high in itertools.pairwise(edges):
        part = wilson(float(np.clip(rng.normal(0.61, 0.06), 0, 1)), n // 10)
        bins.append({"low": low, "high": high, "n": n // 10, "before": 0.5, "value": part["value"],
                     "low_ci": part["low"], "high_ci": part["high"]})  # fmt: skip
    return bins


def _calibration(rng: Any, n: int) -> dict[str, Any]:
    bins = []
    for margin in np.linspace(0.01, 1.2, 10):
        predicted = 1 / (1 + math.exp(-margin))
        part = wilson(float(np.clip(predicted - 0.03 + rng.normal(0, 0.03), 0, 1)), n // 10)
        bins.append({"n": n // 10, "margin": float(margin), "predicted": predicted,
                     "observed": part["value"], "low": part["low"],
                     "high": part["high"]})  # fmt: skip
    return {"error": 0.0412, "bins": bins}


def _drift(before: float, after: float) -> dict[str, Any]:
    change = after - before
    return {
        "before": before, "after": after,
        "change": {"value": change, "low": change - 1.1, "high": change + 1.2},
        "per_token": {"value": change / 60, "low": change / 60 - 0.02, "high": change / 60 + 0.02},
    }  # fmt: skip


def _margins(rng: Any, n: int, before: float | None = None, reach: float = 2) -> dict[str, Any]:
    """Without `before` all pairs tie at first, as an untrained policy's implicit rewards do."""
    edges = np.linspace(-reach, reach, 42)
    noise = rng.normal(0, 0.25, n)
    first = np.zeros(n) if before is None else (before + noise) * reach
    before = np.histogram(first.clip(-reach, reach), edges)[0]
    after = np.histogram((0.15 + noise * 1.1).clip(-1, 1) * reach, edges)[0]
    both = {"before": before, "after": after}
    return {k: {"edges": edges.tolist(), "counts": v.tolist()} for k, v in both.items()}


def _answers(tokens: float) -> dict[str, float]:
    return {"tokens": tokens, "words": tokens * 0.68, "ended": 0.875, "distinct_1": 0.712,
            "distinct_2": 0.941, "distinct_3": 0.983, "repetition": 0.0421}  # fmt: skip


def notable(rng: Any) -> dict[str, Any]:
    rows = iter(builtin_rows(9))

    def pair(before: float, after: float) -> dict[str, Any]:
        row = next(rows)
        return {
            "id": row.get("id", "pair"), "prompt": row["prompt"],
            "chosen": _text(row["chosen"]), "rejected": _text(row["rejected"]),
            "margin_before": before, "margin_after": after,
            "chosen_tokens": tokens_of(_text(row["chosen"]), rng, 0.1),
            "rejected_tokens": tokens_of(_text(row["rejected"]), rng, -0.15),
        }  # fmt: skip

    return {
        "changed": [pair(-0.21, 0.84), pair(0.1, -0.32), pair(-0.4, 0.2)],
        "best": [pair(0.0, 3.12), pair(0.0, 2.57)],
        "worst": [pair(0.0, -1.93), pair(0.0, -1.2)],
    }


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def samples(rng: Any, count: int = 4) -> list[dict[str, Any]]:
    found = []
    for row in builtin_rows(count):
        reference, policy = _text(row["rejected"]), _text(row["chosen"])
        found.append({
            "id": row.get("id", "sample"), "prompt": row["prompt"], "reference": reference,
            "policy": policy, "reference_ended": False, "policy_ended": True,
            "reference_tokens": tokens_of(reference, rng, -0.1),
            "policy_tokens": tokens_of(policy, rng, 0.15),
        })  # fmt: skip
    found[-1] |= {"id": "sample_prompt", "prompt": "Give me one tip for sleeping better."}
    return found


def metrics(rng: Any, steps: int = 128, speed: float = 1.0) -> list[dict[str, Any]]:
    """metrics.jsonl of a run that learns."""
    rows = []
    for step in range(steps + 1):
        learned = 1 - math.exp(-speed * 3 * step / steps)
        judged = step in (0, steps // 2, steps)
        noise = rng.normal(0, 0.0 if step == 0 else 0.2 if judged else 1.0, 4)
        values = {
            "loss": math.log(2) - 0.25 * learned + 0.05 * noise[0],
            "rewards/chosen": -0.2 * learned, "rewards/rejected": -1.1 * learned,
            "rewards/accuracies": float(np.clip(0.5 + 0.2 * learned + 0.12 * noise[1], 0, 1)),
            "rewards/margins": 0.9 * learned + 0.2 * noise[2],
            "logps/chosen": -210 - 4 * learned + 9 * noise[3],
            "logps/rejected": -198 - 11 * learned + 9 * noise[0],
        }  # fmt: skip
        if judged:
            rows.append({"step": step} | {f"eval_{k}": v for k, v in values.items()})
        if step:
            rate = 5e-5 * min(step / 13, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            rows.append({"step": step, "epoch": 2 * step / steps} | values | {
                "grad_norm": 4 + abs(noise[1]), "learning_rate": rate, "pairs": 8, "seconds": 0.4,
            })  # fmt: skip
    return rows


def data(n: int = 509) -> dict[str, Any]:
    touched = [
        {"file": "train.jsonl", "row": 17, "rule": "identical", "action": "drop",
         "detail": "both answers are the same", "before": "I'm not sure what you mean.",
         "after": None},
    ]  # fmt: skip
    return {
        "train": {"source": "hh_helpful_train.jsonl", "format": "transcript", "rows_read": 2050,
                  "rows_kept": 2012, "columns_not_read": [],
                  "dropped": {"identical": 35, "empty_rejected": 3},
                  "mended": {"transcript_residue": 4}, "warned": {"cut_off": 61},
                  "touched": touched},
        "eval": {"source": "hh_helpful_dev.jsonl", "format": "transcript", "rows_read": n,
         "rows_kept": n,
                 "columns_not_read": [], "dropped": {}, "mended": {}, "warned": {}, "touched": []},
        "split": {"how": "pairs of hh_helpful_dev.jsonl", "train_pairs": 2004, "eval_pairs": n,
                  "train_pairs_dropped_for_eval_prompt": 8, "touched": []},
        "tokens": {"max_length": 1024, "longest": 901, "mean": 231.4,
         "notes": {"prompt_truncated": 3}},
    }  # fmt: skip


ENVIRONMENT = {
    "smoldpo": "0.1.0", "python": "3.11.7",
    "libraries": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"},
    "platform": "Linux-6.1-x86_64", "processor": "A processor", "cores": 2, "threads": 2,
    "device": "cpu", "dtype": "bfloat16", "command": ["smoldpo", "train", "--data",
     "my pairs.jsonl"],
    "started": "2026-11-24T21:57:58+0000",
    "sha256": {"policy_start": "427a38a6" * 8, "reference": "427a38a6" * 8}, "engine": "fast",
}  # fmt: skip
TIMINGS = {
    "loading": {"seconds": 4.1, "peak_mb": 611.0, "units": 1, "unit": "models"},
    "trunk and reference": {"seconds": 34.85, "peak_mb": 1210.0, "units": 2513, "unit": "pairs"},
    "training": {"seconds": 149.34, "peak_mb": 2012.4, "units": 4008, "unit": "pairs"},
    "evaluating after": {"seconds": 12.58, "peak_mb": 1404.0, "units": 509, "unit": "pairs"},
    "samples": {"seconds": 16.65, "peak_mb": 1333.0, "units": 32, "unit": "answers"},
}


def write_run(folder: Path, seed: int = 0, *, after: float = 0.612, **settings: Any) -> Path:
    """A whole run folder, as `smoldpo train` leaves it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = TrainConfig(**({"data": ["my pairs.jsonl"], "freeze_layers": 25} | settings))
    judged = evaluation(rng, after=after) | {"notable": notable(rng)}
    judged["pairs"] = [{"id": f"pair-{index}"} for index in range(judged["n"])]
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    files = {"environment": ENVIRONMENT, "data": data(), "evaluation": judged, "timings": TIMINGS}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2))
    write_lines(folder / "metrics.jsonl", metrics(rng, speed=after))
    write_lines(folder / "samples.jsonl", samples(rng))
    (folder / "model").mkdir()
    return folder


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(folder: Path, name: str, **values: Any) -> None:
    """Set top-level keys of one of the folder's JSON files."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
