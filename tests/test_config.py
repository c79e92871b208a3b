import re

import pytest
import yaml

from smoldpo.config import (
    SECTIONS,
    TrainConfig,
    build_config,
    config_from_arguments,
    describe_options,
    to_yaml,
)
from smoldpo.errors import ConfigError, UsageError


def test_every_error_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        config_from_arguments(
            ["--beta", "0", "--lerning-rate", "1", "--max-steps", "many", "--dtype", "int8"]
        )
    text = str(error.value)
    assert len(error.value.problems) == 4
    assert "did you mean learning_rate?" in text
    for word in ("beta is '0'", "max_steps is 'many'", "dtype is 'int8'"):
        assert word in text


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning_rate=1e-5"], "learning_rate", 1e-5),
        (["--freeze", "norms,*.mlp.*"], "freeze", ["norms", "*.mlp.*"]),
        (["--freeze", "norms", "--freeze", "embeddings"], "freeze", ["norms", "embeddings"]),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "--no-overwrite"], "overwrite", False),
        (["--overwrite", "false"], "overwrite", False),
        (["--max-grad-norm", "none"], "max_grad_norm", None),
        (["--beta", "0.2", "--beta", "0.3"], "beta", 0.3),
        (["--freeze-layers", "0"], "freeze_layers", 0),
    ],
)
def test_arguments(arguments, key, value):
    assert getattr(config_from_arguments(arguments), key) == value


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--beta"], "--beta needs a value"),
        (["--betta"], "did you mean beta"),
        (["--beta", "--seed", "1"], "--beta needs a value"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
        (["--beta", "nan"], "beta is 'nan'"),
        (["--freeze-layers", "-1"], "freeze_layers is '-1'"),
        (["--eval-fraction", "0", "--eval-steps", "5"], "eval_steps needs held-out pairs"),
        (["--per-device-train-batch-size", "0"], "per_device_train_batch_size is '0'"),
    ],
)
def test_bad_arguments(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("beta: 0.1")
    with pytest.raises(UsageError, match=says):
        config_from_arguments(arguments)


def test_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("beta: 0.5\nlearning-rate: 1e-4\n")
    config = config_from_arguments([str(path), "--beta", "0.7"])
    assert (config.beta, config.learning_rate) == (0.7, 1e-4)


@pytest.mark.parametrize(
    "text, says",
    [("- a\n- b\n", "holds list"), ("a: [1\nb: 2\n", "row 2: not valid YAML"), ("\xff", "text")],
)
def test_bad_yaml_is_named(tmp_path, text, says):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=says):
        config_from_arguments([str(path)])


def test_yaml_reads_back_to_the_same_values():
    config = build_config({"freeze": ["norms"], "max_grad_norm": None, "learning_rate": 3e-7})
    assert build_config(yaml.safe_load(to_yaml(config))) == config


def test_help_shows_every_option_with_its_meaning():
    lines: list[str] = []
    describe_options(lines.append)
    text = "\n".join(lines)
    for name, field in TrainConfig.model_fields.items():
        assert re.search(rf"^  --{name.replace('_', '-')}( {{.*}})?$", text, re.MULTILINE), name
        assert field.description and field.description in text
    assert "--lr-scheduler-type {constant,linear,cosine}" in text
    assert list(TrainConfig.model_fields)[-1] == SECTIONS["Output"][1]
