"""Beginnings of recipes in each dialect, and what became of their keys; the fixture `write` imports
them.
"""

from conftest import ROOT

FOLDER = ROOT / "tests" / "recipes"


def fates(imported) -> dict[str, str]:
    return {entry.key: entry.status for entry in imported.entries}


def reasons(imported) -> dict[str, str]:
    return {entry.key: entry.reason for entry in imported.entries}


TRL = "model_name_or_path: a/model\ndataset_name: a/pairs\nbeta: 0.1\n"
FULL = "stage: dpo\nmodel_name_or_path: a/m\nfinetuning_type: full\n"


AXOLOTL = "base_model: a/m\nrl: dpo\ndatasets:\n  - path: a/pairs\nlearning_rate: 1e-6\n"
