"""Tokens and passwords are kept out of everything that is said or written."""

from __future__ import annotations

import os
import re

HIDDEN = "[secret]"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN")
PATTERNS = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user:password@ in a URL
    re.compile(r"(?<=[?&])((?:access_)?token|api_?key|password|secret)=[^&\s'\"]+", re.IGNORECASE),
)


def redact(text: str) -> str:
    """The text, with the tokens of the environment and whatever looks like one hidden."""
    for name in VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:
            text = text.replace(value, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(HIDDEN, text)
    return text


def holds_secret(value: object) -> bool:
    """Whether a setting holds one; a list, or text."""
    return redact(str(value)) != str(value)
