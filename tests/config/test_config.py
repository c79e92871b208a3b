import re
import subprocess
import sys

import pytest
import yaml

from smoldpo.config.load import build_config, config_from_arguments, describe_options, to_yaml
from smoldpo.config.losses import FACTS
from smoldpo.config.schema import SECTIONS, TrainConfig
from smoldpo.utils.errors import ConfigError, UsageError


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
        (["--train-layers", "0,5,20-29"], "train_layers", ["0", "5", "20-29"]),
        (["--train-layers", "last:4"], "train_layers", ["last:4"]),
        (["--train", "norms,*.mlp.*"], "train", ["norms", "*.mlp.*"]),
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
        (["--train-layers", "top:4"], "'top:4' is not a layer"),
        (["--train-layers", "last:0"], "'last:0' chooses no layer"),
        (["--train-layers", "9-2"], "write 2-9"),
        (["--train-layers", "1", "--freeze-layers", "1"], "both say which layers train"),
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


def test_layers_as_yaml_has_them(tmp_path):
    for text in ("[0, 5, 20-29]", "0,5,20-29", "['0', '5', '20-29']"):
        path = tmp_path / "c.yaml"
        path.write_text(f"train_layers: {text}\n")
        assert config_from_arguments([str(path)]).train_layers == ["0", "5", "20-29"]
    path.write_text("train_layers: 5\n")
    assert config_from_arguments([str(path)]).train_layers == ["5"]


def test_yaml_reads_back_to_the_same_values():
    config = build_config({"freeze": ["norms"], "max_grad_norm": None, "learning_rate": 3e-7})
    assert build_config(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("given", "judges"),
    [
        ("length,implicit:a", ["length", "implicit:a"]),
        ("implicit:runs/a,builtin,length", ["implicit:runs/a,builtin", "length"]),
        ("implicit:a,b,reward:c,https://h/v1#m", ["implicit:a,b", "reward:c", "https://h/v1#m"]),
        (["implicit:a,b"], ["implicit:a,b"]),
    ],
)
def test_judges_are_parted_at_the_right_commas(given, judges):
    assert build_config({"judges": given}).judges == judges


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("a.jsonl,b.jsonl", ["a.jsonl", "b.jsonl"]),
        ("pairs, v2.jsonl", ["pairs, v2.jsonl"]),
        ("a.jsonl,pairs, v2.jsonl,b.jsonl", ["a.jsonl", "pairs, v2.jsonl", "b.jsonl"]),
        ("1,2,3.jsonl", ["1,2,3.jsonl"]),
        ("none, v2.jsonl", ["none", "v2.jsonl"]),
        ("x" * 300 + ",b.jsonl", ["x" * 300, "b.jsonl"]),
        (["none, v2.jsonl"], ["none, v2.jsonl"]),
    ],
)
def test_a_comma_in_the_name_of_a_file_that_is_there(tmp_path, monkeypatch, given, names):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "pairs, v2.jsonl", "1,2,3.jsonl"):
        (tmp_path / name).write_text("")
    assert build_config({"data": given}).data == names


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("prompt=question, chosen = better", {"prompt": "question", "chosen": "better"}),
        ("prompt=prompt, text", {"prompt": "prompt, text"}),
        ("prompt=a,b,c,chosen=d", {"prompt": "a,b,c", "chosen": "d"}),
        (["prompt=prompt, text", "chosen=a=b"], {"prompt": "prompt, text", "chosen": "a=b"}),
    ],
)
def test_a_comma_in_the_name_of_a_column(given, names):
    assert build_config({"columns": given}).column_names == names


def test_help_shows_every_option_with_its_meaning():
    lines: list[str] = []
    describe_options(lines.append)
    text = "\n".join(lines)
    for name, field in TrainConfig.model_fields.items():
        assert re.search(rf"^  --{name.replace('_', '-')}( {{.*}})?$", text, re.MULTILINE), name
        assert field.description and field.description in text
    assert (
        "--lr-scheduler-type {constant,linear,cosine,cosine_with_min_lr,warmup_stable_decay}"
        in text
    )
    assert list(TrainConfig.model_fields)[-1] == SECTIONS["Output"][1]


@pytest.mark.parametrize(
    "arguments, names",
    [
        ([], ["sigmoid"]),
        (["--loss-type", "ipo"], ["ipo"]),
        (["--loss-type", "sigmoid,sft"], ["sigmoid", "sft"]),
        (["--loss-type", "sigmoid", "--loss-type", "sft"], ["sigmoid", "sft"]),
    ],
)
def test_a_loss_is_a_name_or_several(arguments, names):
    assert config_from_arguments(arguments).loss_type == names


def test_yaml_may_have_a_string_or_a_list(tmp_path):
    path = tmp_path / "c.yaml"
    for text in ("loss_type: apo_zero\n", "loss_type: [apo_zero]\n", "loss-type:\n- apo_zero\n"):
        path.write_text(text)
        assert config_from_arguments([str(path)]).loss_type == ["apo_zero"]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"loss_type": "sigmod"}, "no loss 'sigmod' (did you mean sigmoid?)"),
        ({"loss_type": "aot_pair"}, "'aot_pair' (now called aot_unpaired)"),
        ({"loss_type": []}, "loss_type"),
        ({"loss_type": "sigmoid,sigmoid"}, "names a loss twice"),
        ({"loss_type": "sigmoid,sft", "loss_weights": "1"}, "1 numbers for 2 losses"),
        ({"loss_type": "sigmoid,sft", "loss_weights": "1,0"}, "must be positive"),
        ({"loss_type": "sft", "rpo_alpha": 1}, "sft and rpo_alpha each add"),
        ({"loss_type": "cpo,sft"}, "cpo and sft each add"),
        ({"loss_type": "apo_zero,apo_down"}, "choose one"),
        ({"loss_type": "simpo,sigmoid"}, "simpo cannot be added to sigmoid"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing is read by sigmoid, "),
        ({"discopop_tau": 0.1}, "discopop_tau is read by discopop, not by sigmoid"),
        ({"simpo_gamma": 1.0, "loss_type": "cpo"}, "simpo_gamma is read by simpo, not by cpo"),
        ({"cpo_alpha": 0.5}, "cpo_alpha is read by cpo"),
        ({"dpop_lambda": 5, "loss_type": "ipo,hinge"}, "dpop, not by ipo and hinge"),
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ({"beta": 0.2, "loss_type": "sft"}, "beta has no part in sft"),
        ({"beta_end": 0.2, "loss_type": "sft"}, "beta_end has no part in sft"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "no meaning for apo_zero"),
        ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, "no part in sft"),
        ({"f_divergence_type": "forward"}, "f_divergence_type is 'forward'"),
        ({"f_alpha_divergence_coef": 0.3}, "read with f_divergence_type alpha_divergence"),
        ({"loss_type": "orpo", "reference": "builtin"}, "orpo compares with no reference"),
        ({"loss_type": "simpo", "fail_under": "reward=0.5"}, "no implicit reward for fail_under"),
        ({"columns": "prompt"}, "columns: 'prompt' is not name=column"),
        ({"loss_type": "aot", "columns": "weight=w"}, "weight cannot be a pair's own with aot"),
        ({"loss_type": "apo_zero", "columns": "margin=m"}, "margin has no part in apo_zero"),
        ({"loss_type": "sft", "columns": "beta=b"}, "columns: beta has no part in sft"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, "ld_alpha has no meaning for simpo"),
        ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha has no part in sft"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5"),
        ({"loss_type": "sft", "use_weighting": True}, "use_weighting has no part in sft"),
        (
            {"loss_type": "aot", "use_weighting": True},
            "use_weighting weighs pairs, and the terms of aot",
        ),
        (
            {
                "loss_type": "aot",
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
            },
            "aot sorts the pairs of a step",
        ),
    ],
)
def test_settings_of_the_loss_that_make_no_sense(settings, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        build_config(settings)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sigmoid,bco_pair,sft", "loss_weights": "0.8,0.2,1"},
        {"loss_type": "sigmoid,sft", "f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4, "fail_under": "logp=0.5"},
        {"loss_type": "simpo,sft", "loss_weights": "1,0.1"},
        {"loss_type": "apo_zero", "beta": 0.05, "rpo_alpha": 0.5, "beta_end": 0.2},
        {"loss_type": "exo_pair", "label_smoothing": 0.001},
        {"loss_type": "sigmoid,sft", "columns": "weight=w,margin=m,beta=b"},
        {"loss_type": "orpo", "per_device_train_batch_size": 1},
        {"ld_alpha": 0, "use_weighting": True, "loss_type": "sigmoid,sft"},
        {"ld_alpha": "none"},
        {"loss_type": "cpo", "ld_alpha": 0.5},
        {"loss_type": "aot", "ld_alpha": 1},
        {"loss_type": "simpo", "use_weighting": True},
    ],
)
def test_settings_of_the_loss_that_go_together(settings):
    config = build_config(settings)
    assert build_config(yaml.safe_load(to_yaml(config))) == config


def test_settings_are_checked_without_torch():
    code = (
        "import sys, smoldpo.config.load as load; load.build_config({}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_every_loss():
    lines: list[str] = []
    describe_options(lines.append)
    text = "\n".join(lines)
    assert all(name in text for name in FACTS)
