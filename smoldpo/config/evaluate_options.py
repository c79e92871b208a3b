"""The options of `smoldpo evaluate` and `smoldpo.evaluate`, checked the same in both. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from smoldpo.config.field_types import (
    Day,
    Device,
    Dtype,
    EngineName,
    Judges,
    Names,
    PositiveInt,
    Score,
    Truncate,
    arguments,
    beta_in_range,
)
from smoldpo.config.load import read_fields
from smoldpo.utils.errors import ConfigError


def _above_zero(value: float) -> float:
    if not value > 0:
        raise ValueError("must be above 0")
    return value


class EvaluateOptions(BaseModel):
    """Everything besides models and data; each means what it does in `smoldpo evaluate --help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    reference: str | None = None
    beta: Annotated[float, AfterValidator(_above_zero), AfterValidator(beta_in_range)] = 0.1
    seed: Annotated[int, Field(ge=0)] = 42
    subset: str | None = None
    split: str | None = None
    max_samples: PositiveInt | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    batch_size: PositiveInt = 8
    dtype: Dtype = "float32"
    device: Device = "auto"
    engine: EngineName = "auto"
    threads: PositiveInt | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    generate_prompts: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_new_tokens: PositiveInt = 128
    judges: Judges = []
    fail_under: Names = []
    chat_template: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(arguments)] = None
    tools: str | None = None
    documents: str | None = None
    template_date: Day = None
    truncation: Truncate | None = None
    score: Score | None = None
    """Those that are None are the run's, where the last model is one, and else train's defaults."""


def evaluate_options(given: Mapping[str, Any]) -> EvaluateOptions:
    """Checked options from plain values.

    Raises:
        ConfigError: with every problem at once: unknown options (and the nearest known one), and
            values of the wrong type or out of range.
    """
    options, problems = read_fields(EvaluateOptions, given, noun="option")
    if problems or options is None:
        raise ConfigError(problems)
    return options
