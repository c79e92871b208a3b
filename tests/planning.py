"""Asking for a forecast, as quickly as can be."""

import json

QUICK = [
    "--dtype", "float32", "--num-train-epochs", 2, "--generate-prompts", 0, "--sample-prompt",
    "none",
]  # fmt: skip
ANSWERS = ["--generate-prompts", 2, "--max-new-tokens", 4, "--sample-prompt", "Hello"]


def plan(cli, *arguments):
    result = cli("plan", *QUICK, *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)
