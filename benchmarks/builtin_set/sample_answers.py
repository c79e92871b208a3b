"""Sample SmolLM2-135M-Instruct's own answers to prompts, as the built-in set's rejected sides were.

    python benchmarks/builtin_set/sample_answers.py ROWS.jsonl ANSWERS.jsonl [--ids a-1 b-2]

ROWS.jsonl needs `id` and `prompt` (a list of messages) in each row, as smoldpo/data/builtin has.
Every answer has a random stream of its own, seeded by (seed, row id, draw), and the model runs in
float32 on the CPU, so an answer does not depend on the rows that share its batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from smoldpo.models.load import find_model, load_model, load_tokenizer

SEED = 20251123
TEMPERATURES = (0.7, 0.5, 0.5)  # of draws 0, 1 and 2
TOP_K, TOP_P, MAX_NEW_TOKENS = 1000, 0.9, 200


def stream(row_id: str, draw: int) -> torch.Generator:
    """The random stream of one answer."""
    digest = hashlib.sha256(f"{SEED}/{row_id}/{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def pick(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row by inverse CDF over the smallest set of likeliest tokens that holds TOP_P."""
    logits, order = (logits.double() / temperature[:, None]).topk(TOP_K)
    probs = logits.softmax(-1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > TOP_P, 0.0)
    cdf = probs.cumsum(-1)
    place = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    return order.gather(-1, place.clamp(max=TOP_K - 1))[:, 0]


@torch.inference_mode()
def answers(model, tokenizer, jobs: list[dict]) -> list[tuple[str, bool]]:
    """Text of each job's answer, and whether the model ended it with its end-of-turn token."""
    batch = tokenizer(
        [j["text"] for j in jobs], padding=True, return_tensors="pt", add_special_tokens=False
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    draws = torch.stack(
        [torch.rand(MAX_NEW_TOKENS, generator=stream(j["id"], j["draw"])) for j in jobs]
    )
    heat = torch.tensor([TEMPERATURES[j["draw"]] for j in jobs], dtype=torch.float64)
    out: list[list[int]] = [[] for _ in jobs]
    ended = [False] * len(jobs)
    alive, cache = torch.arange(len(jobs)), None
    for step in range(MAX_NEW_TOKENS):
        result = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache = result.past_key_values
        token = pick(result.logits[:, -1], heat[alive], draws[alive, step])
        going = token != tokenizer.eos_token_id
        for row, value, more in zip(alive.tolist(), token.tolist(), going.tolist(), strict=True):
            if more:
                out[row].append(value)
            else:
                ended[row] = True
        if not going.any():
            break
        if not going.all():
            cache.batch_select_indices(going.nonzero()[:, 0])
            alive, token, mask, position = alive[going], token[going], mask[going], position[going]
        ids, position = token[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], -1)
    return [
        (tokenizer.decode(o, skip_special_tokens=True).strip(), e)
        for o, e in zip(out, ended, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ids", nargs="*", help="only these rows")
    parser.add_argument("--draws", type=int, nargs="*", default=[0], help="which draws of each row")
    parser.add_argument("--batch", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = find_model("builtin")
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    tokenizer.padding_side = "left"
    jobs = []
    for line in options.rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if options.ids is None or row["id"] in options.ids:
            text = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=False
            )
            jobs += [{"id": row["id"], "draw": draw, "text": text} for draw in options.draws]
    jobs.sort(key=lambda job: len(job["text"]))
    with options.out.open("w", encoding="utf-8") as out:
        for start in range(0, len(jobs), options.batch):
            part = jobs[start : start + options.batch]
            for job, (text, ended) in zip(part, answers(model, tokenizer, part), strict=True):
                row = {"id": job["id"], "draw": job["draw"], "ended": ended, "answer": text}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
