"""What a sweep tries: spaces, methods, and every problem at once before anything runs."""

import importlib.util
import math

import pytest
import yaml

from conftest import ROOT
from smoldpo.config.schema import TrainConfig
from smoldpo.sweep import space
from smoldpo.sweep.space import (
    Choices,
    PastTrial,
    Range,
    at_random,
    by_optuna,
    corners,
    grid,
    read_values,
    size,
)
from smoldpo.sweep.spec import (
    SPLIT_SETTINGS,
    SweepSettings,
    build_spec,
    differences,
    spec_from_arguments,
)
from smoldpo.training.fingerprint import FREE_SETTINGS
from smoldpo.utils.errors import ConfigError, UsageError

SPACE = {
    "beta": Choices((0.05, 0.1, 0.3)),
    "learning_rate": Range(1e-5, 1e-3, log=True),
    "freeze_layers": Range(10, 29, whole=True),
}


def spec(**plain):
    return build_spec({"sweep": {"beta": [0.1, 0.2]}} | plain, "mine")


def problems(**plain):
    with pytest.raises(ConfigError) as caught:
        spec(**plain)
    return caught.value.problems


def test_a_grid_has_every_combination_once():
    found = spec(sweep={"beta": [0.1, "0.2"], "freeze_layers": {"min": 3, "max": 5}}).planned()
    assert found == [{"beta": b, "freeze_layers": f} for b in (0.1, 0.2) for f in (3, 4, 5)]


def test_points_of_a_range():
    part, _ = read_values(
        "learning_rate", {"min": "1e-5", "max": 1e-3, "scale": "log", "steps": 3}, True
    )
    assert part.values == pytest.approx((1e-5, 1e-4, 1e-3))
    part, _ = read_values("num_train_epochs", {"min": 1, "max": 2, "steps": 5}, True)
    assert part.values == (1, 1.25, 1.5, 1.75, 2)
    part, _ = read_values("freeze_layers", {"min": 10, "max": 29, "steps": 3}, False)
    assert part.values == (10, 20, 29) and all(isinstance(v, int) for v in part.values)


def test_lists_as_choices():
    found = spec(sweep={"loss_type": ["sigmoid", ["sigmoid", "sft"], "ipo,sft"]}).planned()
    assert [trial["loss_type"] for trial in found] == [
        ["sigmoid"],
        ["sigmoid", "sft"],
        ["ipo", "sft"],
    ]


def test_random_trials_are_the_same_again_and_more_begin_alike():
    first = at_random(SPACE, 20, 0)
    assert first == at_random(SPACE, 20, 0) == at_random(SPACE, 30, 0)[:20]
    assert first != at_random(SPACE, 20, 1)
    assert len({str(trial) for trial in first}) == 20


def test_random_trials_lie_in_the_space_evenly():
    drawn = at_random(SPACE, 600, 0)
    rates = [math.log10(trial["learning_rate"]) for trial in drawn]
    assert -5 <= min(rates) < -4.9 and -3.1 < max(rates) <= -3
    assert 0.45 < sum(rate < -4 for rate in rates) / 600 < 0.55, "evenly in the logarithm"
    assert {trial["freeze_layers"] for trial in drawn} == set(range(10, 30))
    for beta in (0.05, 0.1, 0.3):
        assert 150 < sum(trial["beta"] == beta for trial in drawn) < 250


def test_no_trial_is_made_twice_where_there_are_just_enough():
    space = {"beta": Choices((0.1, 0.2)), "seed": Choices(tuple(range(20)))}
    drawn = at_random(space, 40, 0)
    assert sorted(map(str, drawn)) == sorted(map(str, grid(space)))


def optuna_trials(count, seed, result):
    propose, earlier = by_optuna(SPACE, seed), []
    for _ in range(count):
        settings = propose(earlier)
        earlier.append(PastTrial(settings, result(settings)))
    return earlier


def hill(settings):
    """Best at a rate of 1e-4 and beta 0.1; a trial without freezing fails."""
    if settings["freeze_layers"] == 10:
        return None
    return -abs(math.log10(settings["learning_rate"]) + 4) - abs(settings["beta"] - 0.1)


def test_optuna_proposes_the_same_again_and_learns():
    earlier = optuna_trials(40, 0, hill)
    assert earlier == optuna_trials(40, 0, hill)
    assert earlier[:3] != optuna_trials(3, 1, hill)
    # Going on from what was kept is going on:
    assert by_optuna(SPACE, 0)(earlier[:25]) == earlier[25].settings
    assert len({str(trial.settings) for trial in earlier}) == 40
    for trial in earlier:
        assert trial.settings["beta"] in SPACE["beta"].values
        assert 1e-5 <= trial.settings["learning_rate"] <= 1e-3
        assert isinstance(trial.settings["freeze_layers"], int)
    late = [trial.value for trial in earlier[20:] if trial.value is not None]
    early = [trial.value for trial in earlier[:10] if trial.value is not None]
    assert sum(late) / len(late) > sum(early) / len(early)


def test_optuna_says_as_much_as_the_user_wants(caplog):
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    optuna.logging.enable_propagation()
    try:
        by_optuna(SPACE, 0)([])
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
        assert "study" not in caplog.text
        optuna.create_study()
        assert "study" in caplog.text
    finally:
        optuna.logging.disable_propagation()
        optuna.logging.set_verbosity(before)


def test_optuna_finds_what_is_new_in_a_small_space():
    space = {"beta": Choices((0.1, 0.2)), "seed": Choices((1, 2, 3))}
    earlier = []
    for _ in range(6):
        earlier.append(PastTrial(by_optuna(space, 0)(earlier), 0.5))
    assert len({str(trial.settings) for trial in earlier}) == 6


def test_without_optuna_the_sweep_says_so_at_its_start(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"smoldpo\[optuna\]"):
        spec(method="optuna", trials=2)
    assert space.importlib.util is importlib.util


def test_corners_reach_every_end():
    found = list(corners(SPACE))
    assert len(found) == 3 * 2 * 2
    assert {"beta": 0.3, "learning_rate": 1e-3, "freeze_layers": 10} in found


def test_all_problems_at_once():
    found = problems(
        sweep={
            "betta": [1], "beta": [0.1, -1, 0.1], "learning_rate": {"min": 1e-3, "max": 1e-5},
            "model": {"min": 1, "max": 2}, "warmup_ratio": 0.5, "max_steps": {"mix": 1, "max": 2},
            "label_smoothing": {"min": 0, "max": 0.4, "scale": "log"}, "eval_fraction": [0.1],
            "judges": ["length"], "seed": [], "weight_decay": {"min": 0, "max": 1},
            "freeze_layers": {"min": 1.5, "max": 3}, "adam_beta1": {"min": 0.5, "max": 2,
             "steps": 2},
        },
        lerning_rate=1, method="gird", metric="reward", final_fraction=2, num_train_epochs="many",
        label_smoothing=0.1,
    )  # fmt: skip
    text = "\n".join(found)
    for part in [
        "unknown key 'betta' (did you mean beta?)",
        "beta is -1",
        "beta has 0.1 twice",
        "learning_rate: min 0.001 is not below max 1e-05",
        "model is no number",
        "warmup_ratio is 0.5; give a list of values",
        "max_steps: unknown key 'mix' (did you mean min?)",
        "label_smoothing is given for all trials, and under sweep as well",
        "eval_fraction decides which pairs are held out",
        "judges has no say in what is trained",
        "seed has no values",
        "weight_decay: a grid needs points",
        "freeze_layers takes whole numbers",
        "adam_beta1 is 2",
        "unknown key 'lerning_rate' (did you mean learning_rate?)",
        "method is 'gird'",
        "final_fraction is 2",
        "num_train_epochs is 'many'",
    ]:
        assert part in text, part
    assert len(found) == 18


def test_problems_of_trials_before_anything_runs():
    """A trial that contradicts itself is named, each problem once."""
    found = problems(sweep={"loss_type": ["sigmoid", "simpo"], "beta": [0.1, 0.2]})
    assert len(found) == 1 and "metric reward needs a reference" in found[0]
    assert "loss_type simpo, beta 0.1" in found[0] and "2 trials" in found[0]
    assert spec(sweep={"loss_type": ["sigmoid", "simpo"]}, metric="logp_per_token")
    (found,) = problems(sweep={"loss_type": ["sigmoid", "kto"]})
    assert "kto takes single answers" in found
    (found,) = problems(sweep={"early_stopping_patience": ["none", 2]})
    assert "early_stopping_patience needs evaluations" in found
    (found,) = problems(early_stopping_patience=2)
    assert "with beta" not in found, "a problem of all trials is not one of a trial's"


@pytest.mark.parametrize(
    "plain, said",
    [
        ({"sweep": None}, "sweep: says nothing"),
        ({"trials": 5}, "trials is for random and optuna; this grid has 2 trials"),
        ({"trials": 5, "method": "random"}, "trials is 5, and there are 2 different ones"),
        ({"freeze_layers": "auto", "budget": "20m"}, "give a number"),
        ({"eval_fraction": 0}, "trials are ranked on held-out pairs"),
        ({"rules_off": "eval_prompt"}, "would leave prompts of the final pairs"),
        ({"sweep": {"seed": {"min": 0, "max": 2000}}}, "this grid has 2,001 trials"),
    ],
)
def test_what_cannot_be(plain, said):
    assert said in " ".join(problems(**plain))


def test_settings_that_are_not_tried_are_known_ones():
    assert set(TrainConfig.model_fields) >= SPLIT_SETTINGS
    assert not set(SweepSettings.model_fields) & set(TrainConfig.model_fields)


def test_any_other_setting_can_be_tried():
    for name, field in TrainConfig.model_fields.items():
        if name in SPLIT_SETTINGS | FREE_SETTINGS:
            continue
        default = field.get_default(call_default_factory=True)
        part, wrong = read_values(name, [default], True)
        assert wrong == [] and part.values == (default,), name


def test_the_plain_form_is_read_back_to_the_same():
    for plain in [
        {},
        {"method": "random", "trials": 3, "sweep": {"beta": {"min": 1e-5, "max": 1,
         "scale": "log"}}},
        {"sweep": {"freeze_layers": {"min": 2, "max": 4}, "loss_type": ["ipo", ["sigmoid",
         "sft"]]}},
    ]:  # fmt: skip
        once = spec(**plain)
        again = build_spec(yaml.safe_load(once.as_yaml()), "mine")
        assert again.as_plain() == once.as_plain() and again.planned() == once.planned()


def test_differences_are_named_but_for_what_has_no_say():
    then = spec(seed=1).as_plain()
    assert differences(then, spec(seed=1, cache="memory", output_dir="there").as_plain()) == []
    (found,) = differences(then, spec(seed=2).as_plain())
    assert found == "seed is 2, and was 1 when it began"
    (found,) = differences(then, spec(seed=1, sweep={"beta": [0.1]}).as_plain())
    assert found.startswith("sweep is {'beta': [0.1]}, and was {'beta': [0.1, 0.2]}")


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("sweep: {beta: [0.1, 0.2]}\nseed: 1\nfinal-fraction: 0.3\n")
    found = spec_from_arguments([str(path), "--seed", "5", "--metric", "logp"])
    assert found.common.seed == 5 and found.settings.final_fraction == 0.3 and found.name == "some"
    assert found.settings.metric == "logp"
    with pytest.raises(ConfigError, match="not on the command line"):
        spec_from_arguments([str(path), "--sweep", "beta"])
    with pytest.raises(UsageError, match=r"examples/sweep\.yaml"):
        spec_from_arguments([])


def test_the_example_is_a_sweep():
    found = spec_from_arguments([str(ROOT / "examples" / "sweep.yaml")])
    assert found.trials == 20 and len(found.planned()) == 20
    assert size(found.space) is None
