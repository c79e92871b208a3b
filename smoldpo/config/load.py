"""Settings from a YAML file and from `--key value`, and the list of them for `--help`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from smoldpo.config.checks import cross_checks
from smoldpo.config.schema import SECTIONS, TrainConfig
from smoldpo.utils.errors import ConfigError, UsageError, nearest
from smoldpo.utils.text import holds_secret

Model = TypeVar("Model", bound=BaseModel)


def parse_arguments(arguments: Sequence[str]) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Split `[CONFIG.yaml] [--key value ...]` into a file, settings and complaints.

    `--key=value` works too; hyphens and underscores are alike; a boolean needs no value, and
    `--no-key` turns it off; the last of repeated keys counts, except for lists, which grow.
    """
    path: Path | None = None
    settings: dict[str, Any] = {}
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if path is None:
                path = Path(word)
            else:
                problems.append(f"unexpected argument {word!r}; settings are given as --key value")
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        if not equals and _is_switch(key):
            if rest and rest[0].lower() in ("true", "false"):
                value = rest.pop(0)
            else:
                key, value = (
                    (key, "true") if key in TrainConfig.model_fields else (key[3:], "false")
                )
        elif not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(f"--{name} needs a value{_unknown(key)}")
                continue
            value = rest.pop(0)
        if _is_list(key) and key in settings:
            settings[key] += f",{value}"
        else:
            settings[key] = value
    return path, settings, problems


def _unknown(key: str) -> str:
    known = TrainConfig.model_fields
    return "" if key in known else f", and no such setting is known{nearest(key, known)}"


def _is_switch(key: str) -> bool:
    known = TrainConfig.model_fields
    bare = key if key in known else key.removeprefix("no_")
    return bare in known and known[bare].annotation is bool


def _is_list(key: str) -> bool:
    field = TrainConfig.model_fields.get(key)
    return field is not None and get_origin(field.annotation) is list


def config_from_arguments(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of a command line: a YAML file, and settings over it.

    Raises:
        UsageError, ConfigError: as `load_yaml` and `build_config`.
    """
    path, settings, problems = parse_arguments(arguments)
    base = load_yaml(path) if path is not None else {}
    base = {str(key).replace("-", "_"): value for key, value in base.items()}
    return build_config(base | settings, extra_problems=problems)


def load_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        UsageError: no such file, not YAML, or not `key: value` lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            # A few lines of them stand for gigabytes.
            raise UsageError(f"{path}: uses YAML aliases (*name); write the values out")
        settings = yaml.safe_load(text)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The last two: a 13th month, a thousand brackets.
        mark = getattr(error, "problem_mark", None)
        where = f", row {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: holds {type(settings).__name__}, not `key: value` lines")
    return settings


def describe_options(write: Callable[[str], None]) -> None:
    """Write every option with its default and meaning, in sections."""
    names = list(TrainConfig.model_fields)
    for title, (first, last) in SECTIONS.items():
        write(f"{title}:")
        for name in names[names.index(first) : names.index(last) + 1]:
            field = TrainConfig.model_fields[name]
            value = field.default
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            default = "" if value in (None, "") else f" [default: {value}]"
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            values = " {" + ",".join(choices) + "}" if len(choices) > 1 else ""
            write(f"  --{name.replace('_', '-')}{values}\n      {field.description}{default}")


def build_config(settings: dict[str, Any], *, extra_problems: Sequence[str] = ()) -> TrainConfig:
    """A checked configuration from plain values.

    Raises:
        ConfigError: with every problem at once: unknown keys (and the nearest known one), values of
            the wrong type or out of range, and settings that contradict each other.
    """
    known = TrainConfig.model_fields
    config, found = read_fields(TrainConfig, settings)
    given = {key: value for key, value in settings.items() if key in known}
    problems = [*extra_problems, *secrets_in(given), *_not_utf8(given), *found]
    if config is not None:
        problems += cross_checks(config)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def read_fields(
    model: type[Model], settings: Mapping[str, Any], more: Iterable[str] = (), noun: str = "key"
) -> tuple[Model | None, list[str]]:
    """The model of those settings that it knows, and what is wrong with any, in words.

    Args:
        more: keys that are known besides the model's own; they are left out here.
    """
    known = [*model.model_fields, *more]
    problems = [
        f"unknown {noun} {key!r}{nearest(str(key), known)}" for key in settings if key not in known
    ]
    try:
        own = {key: value for key, value in settings.items() if key in model.model_fields}
        return model(**own), problems
    except ValidationError as error:
        return None, problems + [explain(detail) for detail in error.errors()]


def secrets_in(settings: Mapping[str, Any], files: str = "run") -> list[str]:
    """A sentence for each setting that holds a token or password."""
    return [
        f"{key} holds a token or password, which would stand in the {files}'s files; log in with "
        "huggingface-cli login, or set HF_TOKEN"
        for key, value in settings.items()
        if holds_secret(value)
    ]


def _not_utf8(settings: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting with text that UTF-8 cannot hold, such as a file name."""
    problems = []
    for key, value in settings.items():
        for text in value if isinstance(value, list) else [value]:
            shown = str(text).encode("utf-8", "backslashreplace").decode()
            if isinstance(text, str) and shown != text:
                problems.append(
                    f"{key} holds bytes that are not UTF-8 ({shown}); no file of a run could name "
                    "it: rename it"
                )
    return problems


def explain(detail: Any) -> str:
    """One of pydantic's findings in words, by the setting's name."""
    key = str(detail["loc"][0])
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    expected = detail["ctx"]["expected"] if detail["type"] == "literal_error" else ""
    near = nearest(str(detail["input"]), re.findall(r"'([^']*)'", expected))
    return f"{key} is {detail['input']!r}: {message}{near}"


def to_yaml(config: TrainConfig) -> str:
    """The complete configuration as YAML that `smoldpo train` reads back to the same values."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
