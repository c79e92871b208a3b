"""Asking for a forecast, as quickly as can be."""

import json

QUICK = [
    "--dtype", "float32", "--max-new-tokens", 4, "--generate-prompts", 2, "--num-train-epochs", 2,
]  # fmt: skip


def plan(cli, *arguments):
    result = cli("plan", *arguments, *QUICK, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)
