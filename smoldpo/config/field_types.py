"""What a setting's value can be, as it comes from YAML or from a command line; no torch."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from smoldpo.config.losses import FACTS, known_losses
from smoldpo.config.optimizers import OPTIMIZERS, SCHEDULES
from smoldpo.utils.text import parse_duration


def _split_commas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def split_columns(value: Any) -> Any:
    """prompt=question,chosen=better as its parts; a part without = belongs to the name before."""
    if not isinstance(value, str):
        return value
    parts: list[str] = []
    for part in filter(str.strip, value.split(",")):
        if parts and "=" in parts[-1] and "=" not in part:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [part.strip() for part in parts]


def _split_sources(value: Any) -> Any:
    """Commas part sources, but for those in the name of a file that is there."""
    if not isinstance(value, str):
        return value
    parts = value.split(",")
    names: list[str] = []
    while parts:
        taken = 1
        if not _is_there(parts[0]):
            whole = (n for n in range(len(parts), 1, -1) if _is_there(",".join(parts[:n])))
            taken = next(whole, 1)
        names.append(",".join(parts[:taken]).strip())
        parts = parts[taken:]
    return [name for name in names if name]


def _is_there(name: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # longer than a name can be; a NUL
        return Path(name.strip()).exists()
    return False


def _words(value: Any) -> Any:
    """Numbers as YAML reads them are words here: `train_layers: [0, 5, 20-29]`."""
    if isinstance(value, list):
        return [_words(item) for item in value]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _split_judges(value: Any) -> Any:
    """Commas part judges, but for the one between an implicit judge's model and its reference."""
    parts: list[str] = []
    for part in _split_commas(value) if isinstance(value, str) else ():
        known = part == "length" or part.split(":", 1)[0] in ("reward", "implicit", "http", "https")
        if not known and parts and parts[-1].startswith("implicit:") and "," not in parts[-1]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts if isinstance(value, str) else value


def _none_word(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def arguments(value: Any) -> Any:
    """Arguments by name: a mapping, or name=value, the value as JSON or else as text."""
    items = _split_commas(value)
    if not isinstance(items, list):
        return value
    found = {}
    for item in items:
        name, is_given, text = str(item).partition("=")
        if not is_given or not name.strip():
            raise ValueError(f"{item!r} is not name=value, such as enable_thinking=false")
        try:
            found[name.strip()] = json.loads(text)
        except ValueError:
            found[name.strip()] = text.strip()
    return found


def _day(value: Any) -> Any:
    """A day as YYYY-MM-DD, which YAML reads as a date."""
    value = _none_word(value)
    if value is None:
        return None
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError("give a day as YYYY-MM-DD, such as 2026-01-31") from None


def _loss_names(value: Any) -> Any:
    return known_losses(_split_commas(value))


def _layers(value: Any) -> Any:
    """A number of layers from a command line, or auto."""
    value = _none_word(value)
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        number = value if value is None else int(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool | float) or (number is not None and number < 0):
        raise ValueError("give how many layers to freeze from below (0 or more), auto, or none")
    return number


def _duration(value: str) -> str:
    parse_duration(value)
    return value


LEAST_BETA, MOST_BETA = 1e-6, 1000.0
BETA_RANGE = "from 0.000001 to 1000"
"""β outside of it leaves the sigmoid flat, or a step, whatever the answers: nothing to learn."""


def beta_in_range(value: float) -> float:
    """β, unless it lies outside BETA_RANGE."""
    if not LEAST_BETA <= value <= MOST_BETA:
        raise ValueError(f"input should be {BETA_RANGE}")
    return value


def _logger_names(value: Any) -> Any:
    return [] if _none_word(value) is None else _split_commas(value)


T = TypeVar("T")
OrNone = Annotated[T | None, BeforeValidator(_none_word)]
"""A value, or the word none."""
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(gt=0), AfterValidator(beta_in_range)]
Names = Annotated[list[str], BeforeValidator(_split_commas)]
Columns = Annotated[list[str], BeforeValidator(split_columns)]
Sources = Annotated[list[str], BeforeValidator(_split_sources)]
Numbers = Annotated[list[float], BeforeValidator(_split_commas)]
Judges = Annotated[list[str], BeforeValidator(_split_judges)]
Layers = Annotated[Annotated[int, Field(ge=0)] | Literal["auto"] | None, BeforeValidator(_layers)]
LayerWords = Annotated[Names, BeforeValidator(_words)]
Duration = Annotated[str, AfterValidator(_duration)]
Arguments = Annotated[dict[str, Any], BeforeValidator(arguments)]
Day = Annotated[str | None, BeforeValidator(_day)]
Truncate = Literal["turns", "tokens", "drop"]
Score = Literal["assistant", "last"]
Dtype = Literal["auto", "float32", "bfloat16", "float64"]
Device = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["auto", "fast", "plain"]
LoggerNames = Annotated[
    list[Literal["tensorboard", "trackio", "wandb", "mlflow"]], BeforeValidator(_logger_names)
]
if TYPE_CHECKING:  # names from tables, which a type checker cannot read
    LossName = str
    OptimizerName = str
    ScheduleName = str
else:
    LossName = Literal[tuple(FACTS)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    ScheduleName = Literal[tuple(SCHEDULES)]
LossNames = Annotated[list[LossName], BeforeValidator(_loss_names)]
