"""What a run is made of: the pairs, the engine with policy and reference in it, the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.losses import is_unpaired, needs_reference
from smoldpo.config.optimizers import parse_rates
from smoldpo.config.schema import TrainConfig
from smoldpo.data.account import DataAccount, TokenAccount
from smoldpo.data.load import TrainingData, load_mixture
from smoldpo.data.template_settings import replace_template, tokenization
from smoldpo.data.tokenize import PairTokenizer, require_room
from smoldpo.engine import build
from smoldpo.engine.autotune import KernelChoice, agreed_dtype
from smoldpo.engine.base import Engine, EngineSettings
from smoldpo.engine.compile import CompileChoice, Parameters, set_up_compiling
from smoldpo.engine.precision import master_dtype
from smoldpo.evaluation.gates import parse_gates
from smoldpo.evaluation.judges import parse_judge
from smoldpo.evaluation.judges.base import Judge
from smoldpo.models.adapters import AdapterSettings, add_adapters
from smoldpo.models.families import FAMILIES
from smoldpo.models.freeze import freeze, parameters_of, summarize
from smoldpo.models.load import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer,
    positions,
    require_same_tokens,
)
from smoldpo.models.mapped_weights import file_page_bytes, file_page_releaser
from smoldpo.models.save import model_bytes
from smoldpo.models.token_rows import require_rows_of_pairs, token_rows
from smoldpo.models.weights import weights_sha256
from smoldpo.training.loggers import require_loggers
from smoldpo.training.optim import require_optimizer
from smoldpo.training.policy_and_reference import (
    EngineRecord,
    ModelFacts,
    PolicyAndReference,
    Trainable,
)
from smoldpo.training.sampler import Schedule
from smoldpo.training.single_answers import single_answers
from smoldpo.types import PreferencePair, TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.devices import pick_device
from smoldpo.utils.distributed import world
from smoldpo.utils.errors import UsageError


@dataclass
class TokenizedData:
    """The pairs as the model sees them, and what to write to data.json."""

    train: list[TokenizedPair]
    eval: list[TokenizedPair]
    eval_pairs: list[PreferencePair]
    """The texts of `eval`, in its order."""
    account: DataAccount = field(default_factory=DataAccount)


def load_data(config: TrainConfig) -> TrainingData:
    """Read, clean and split the pairs, and say what was found."""
    with progress.spinner("reading the data"):
        data = load_mixture(
            config.data,
            config.data_weights,
            config.seed,
            subset=config.data_subset,
            split=config.data_split,
            eval_data=config.eval_data,
            eval_fraction=config.eval_fraction,
            max_train=config.max_train_samples,
            max_eval=config.max_eval_samples,
            format=config.format,
            columns=config.column_names,
            rules_off=config.rules_off,
            thumbs=is_unpaired(config.loss_type),
        )
    for _, source in data.account.read():
        progress.say(f"data: {source.source}, {source.format} format, {source.rows_read:,} rows")
        for action, rows in source.by_action().items():
            if rows:
                rules = ", ".join(f"{count} {rule}" for rule, count in rows.items())
                progress.say(f"  {action}: {rules}")
        for line in source.losses():
            progress.say(f"  {line}")
    split = data.account.split
    assert split is not None
    progress.say(
        f"split: {split.train_pairs:,} pairs to train on, {split.eval_pairs:,} held out "
        f"({split.how})"
    )
    return single_answers(config, data) if is_unpaired(config.loss_type) else data


CHARACTERS_TO_A_TOKEN = 4.0
"""For forecasts before tokenising."""


@dataclass(frozen=True)
class LoadedModels:
    """Policy and reference, in full precision or as they are stored; without a reference, None."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    facts: ModelFacts


@dataclass(frozen=True)
class BuiltEngine:
    """An engine with policy and reference in it, and the folders of the cache that it uses."""

    engine: Engine
    computing: EngineRecord
    cache_folders: set[Path]


def load_models(
    config: TrainConfig, data: TrainingData, kernels: dict[str, bool | str] | None = None
) -> PolicyAndReference:
    """Load policy and reference, freeze, and build the engine, saying what was chosen.

    Args:
        data: tells how long the run will be, and so whether compiling is worth it.
        kernels: as an interrupted run had them; by default whichever are faster.
    """
    loaded = load_policy_and_reference(config)
    trainable = choose_trainable(config, loaded.policy, master_dtype(loaded.facts.dtype))
    built = build_engine(config, loaded, data, kernels)
    return PolicyAndReference(
        built.engine,
        loaded.tokenizer,
        loaded.facts,
        trainable,
        built.computing,
        built.cache_folders,
    )


def load_policy_and_reference(config: TrainConfig) -> LoadedModels:
    """The models from where the configuration says.

    Raises:
        SmoldpoError: a model that is not there or cannot be read, or a reference with other tokens.
    """
    device = pick_device(config.device)
    dtype, why = agreed_dtype(config.dtype, device)
    progress.say(f"precision: {why}; {device}, {torch.get_num_threads()} threads")
    source = reference_source = find_model(config.model)
    _require_a_base(config, source)
    with progress.spinner(f"loading {config.model}"):
        tokenizer = load_tokenizer(source)
        replace_template(tokenizer, config.chat_template)
        full = master_dtype(dtype)
        policy = load_model(source, full, device, as_stored=FAMILIES)
        reference = None
        if config.reference is not None:
            reference_source = find_model(config.reference)
            require_same_tokens(tokenizer, reference_source)
            reference = load_model(reference_source, full, device, as_stored=FAMILIES)
    mapped = file_page_bytes(policy.parameters()) > 0
    start = weights_sha256(policy, full, file_page_releaser())
    other = start if reference is None else weights_sha256(reference, full, file_page_releaser())
    facts = ModelFacts(
        source=source,
        reference_source=reference_source,
        device=device,
        dtype=dtype,
        stored_dtype=next(policy.parameters()).dtype,
        mapped=mapped,
        positions=positions(policy),
        rows=min(token_rows(model) for model in (policy, reference or policy)),
        hashes={"policy_start": start, "reference": other},
        configuration_sha256=build.configuration_sha256(policy, reference or policy),
    )
    return LoadedModels(policy, reference, tokenizer, facts)


def choose_trainable(config: TrainConfig, policy: PreTrainedModel, full: torch.dtype) -> Trainable:
    """Freeze what does not train, or put adapters in, and say what trains.

    Args:
        full: the precision of what trains and of what is saved.

    Raises:
        UsageError: layers or names that the model does not have, or nothing left to train.
    """
    adapter = None
    if config.use_peft:
        adapter = add_adapters(policy, adapter_settings(config), full)
        frozen = adapter.frozen_layers
    else:
        frozen = freeze(policy, layer_selection(config))
    progress.say(describe_parameters(policy))
    whole = model_bytes(policy, full)
    saved = whole
    if config.use_peft and not config.merge:
        saved = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    return Trainable(frozen, adapter, rates_of(policy, config.learning_rates), whole, saved)


def layer_selection(config: TrainConfig) -> LayerSelection:
    """What trains; adapters go on every layer where freeze_layers is not set."""
    layers = config.freeze_layers
    assert layers != "auto", "load_inputs refuses it"
    if layers is None and config.use_peft:
        layers = 0
    return LayerSelection(layers, config.train_layers, config.train, config.freeze)


def adapter_settings(config: TrainConfig) -> AdapterSettings:
    """What adapters the configuration asks for."""
    return AdapterSettings(
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_target_modules=tuple(config.lora_target_modules),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        layers=layer_selection(config),
        seed=config.seed,
    )


def build_engine(
    config: TrainConfig,
    loaded: LoadedModels,
    data: TrainingData,
    kernels: dict[str, bool | str] | None = None,
) -> BuiltEngine:
    """The engine over models whose `requires_grad` says what trains. The arguments of load_models.

    Raises:
        UsageError: an engine that cannot run these models, or a cache that cannot be written.
    """
    policy, reference, facts = loaded.policy, loaded.reference, loaded.facts
    choice = build.EngineChoice("plain", "--fsdp shards weights in it alone")
    if not config.fsdp:
        models = [model for model in (policy, reference) if model is not None]
        choice = build.choose_engine(config.engine, *models)
    elif world().size == 1:
        progress.say("fsdp: there is one rank, which keeps everything (docs/scale.md)")
    progress.say(f"engine: {choice.name}" + (f", because {choice.reason}" if choice.reason else ""))
    compiling = CompileChoice(False, "the plain engine compiles nothing")
    chosen = KernelChoice.of(kernels) if kernels else None
    if choice.name == "fast":
        chosen = chosen or build.kernels_for(facts.dtype, facts.device, config.kernels)
        asked = config.compile
        if chosen.native and asked == "auto":
            asked = "off"  # the native kernels are compiled, and leave little between products
        operations = _operations(config, policy, data)
        with progress.spinner("compiling"):
            compiling = _agreed_compiling(asked, operations, facts.dtype, facts.device)
    if compiling.compiled or config.compile == "on":
        progress.say(f"compile: {'on' if compiling.compiled else 'off'}, {compiling.why}")
    settings = engine_settings(config, facts.dtype, compiling.compiled)
    settings = replace(settings, engine=choice.name, kernels=chosen)
    about = {"model": config.model, "reference": config.reference or "the policy's start"}
    built = build.build_engine(policy, reference, settings, facts.hashes["reference"], about)
    used = asdict(built.kernels) if built.kernels else {}
    record = EngineRecord(engine=choice.name, kernels=used, compiled=compiling.compiled)
    return BuiltEngine(built.engine, record, built.folders)


def _agreed_compiling(
    asked: str, operations: float, dtype: torch.dtype, device: str
) -> CompileChoice:
    """As set_up_compiling; of several ranks the first decides, and then the others compile."""
    ranks = world()

    def chosen() -> dict[str, Any]:
        return asdict(set_up_compiling(asked, operations, dtype, device))

    choice = CompileChoice(**ranks.of_first(chosen))
    return (
        choice
        if ranks.first
        else set_up_compiling("on" if choice.compiled else "off", operations, dtype, device)
    )


def engine_settings(config: TrainConfig, dtype: torch.dtype, compiled: bool) -> EngineSettings:
    """What the configuration tells an engine."""
    return EngineSettings(
        compute_dtype=dtype,
        train_batch_size=config.per_device_train_batch_size,
        eval_batch_size=config.per_device_eval_batch_size,
        stream_tokens=config.stream_tokens,
        cache=config.cache,
        cache_bytes=config.cache_limit * 1e9,
        compiled=compiled,
        needs_reference=needs_reference(config.loss_type),
        use_weighting=config.use_weighting,
        sync_ref_model=config.sync_ref_model,
        ordered_sum=config.ordered_sum,
        fsdp=config.fsdp and world().size > 1,
    )


def _require_a_base(config: TrainConfig, source: ModelSource) -> None:
    if config.use_peft and source.base is not None and not config.merge:
        raise UsageError(
            f"model {config.model}: is an adapter itself, and one on top of it would belong to a "
            "model that is saved nowhere; set merge, which saves the whole model, or train from a "
            "merged one"
        )


def _operations(config: TrainConfig, policy: PreTrainedModel, data: TrainingData) -> float:
    """What the run needs at the least, estimated from the texts' lengths."""
    pairs = data.train + data.eval
    prompts = sum(len(str(pair.prompt)) for pair in pairs) / CHARACTERS_TO_A_TOKEN
    answers = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs) / CHARACTERS_TO_A_TOKEN
    parameters = Parameters.of(policy)
    schedule = Schedule.of(config, max(1, len(data.train)))
    epochs = schedule.total_steps / schedule.steps_per_epoch
    return parameters.once(prompts, answers) + epochs * parameters.epoch(prompts, answers)


def describe_parameters(model: PreTrainedModel) -> str:
    """How many parameters train, in all and by group."""
    groups = summarize(model)
    total = sum(group.parameters for group in groups)
    trainable = sum(group.trainable for group in groups)
    lines = [f"trains: {trainable:,} of {total:,} parameters ({trainable / total:.1%})"]
    for group in groups:
        share = "frozen" if not group.trainable else "trains"
        if 0 < group.trainable < group.parameters:
            share = f"{group.trainable:,} train"
        lines.append(f"  {group.name:<32}{group.parameters:>14,}  {share}")
    return "\n".join(lines)


def tokenize(config: TrainConfig, models: PolicyAndReference, data: TrainingData) -> TokenizedData:
    """The pairs as the model sees them, without those that its template refuses.

    Raises:
        UsageError, DataError: pairs too long for the model, or all refused by its template.
        ModelError: a token for which a model has no row.
    """
    how = tokenization(config.max_length, config.model_dump())
    reader = PairTokenizer(models.tokenizer, how)
    with progress.bar("tokenising", len(data.train) + len(data.eval)) as advance:
        _, train_pairs = reader.select(data.train, advance)
        eval_data, eval_pairs = reader.select(data.eval, advance)
    _require_pairs(reader, len(data.train), len(train_pairs), len(data.eval), len(eval_pairs))
    require_match(reader, config.allow_template_mismatch)
    require_room(train_pairs + eval_pairs, models.facts.positions)
    require_rows_of_pairs(models.tokenizer, models.facts.rows, train_pairs + eval_pairs)
    notes = dict(reader.notes)
    lengths = [pair.longest for pair in train_pairs + eval_pairs]
    tokens = TokenAccount(
        max_length=config.max_length,
        longest=max(lengths),
        mean=sum(lengths) / len(lengths),
        notes=notes,
        left_out=dict(reader.left_out),
        template_mismatches=[str(found) for found in reader.mismatches.values()],
        template=reader.template.facts() if reader.template else {},
    )
    if reader.left_out:
        progress.say(f"left out: {reader.left_out_in_words()}")
    if notes:
        happened = ", ".join(f"{count} {note.replace('_', ' ')}" for note, count in notes.items())
        progress.say(f"tokens: {happened} (of {len(lengths):,} pairs)")
    account = data.account.model_copy(update={"tokens": tokens})
    return TokenizedData(train_pairs, eval_pairs, eval_data, account)


def _require_pairs(reader: PairTokenizer, train: int, left: int, held: int, held_left: int) -> None:
    if left and (held_left or not held):
        return
    part = "train on" if not left else "evaluate on"
    raise UsageError(
        f"no pair is left to {part} of {train + held:,} ({reader.left_out_in_words()}); give a "
        "larger --max-length, or other pairs"
    )


def require_match(reader: PairTokenizer, allowed: bool) -> None:
    """Say where what is scored is not what the model would write in use.

    Raises:
        UsageError: no setting makes both agree, and it is not allowed.
    """
    for found in reader.mismatches.values():
        if found.mismatch.setting is None and not allowed:
            raise UsageError(f"{found}, or --allow-template-mismatch")
        progress.say(f"warning: {found}")


def preflight(config: TrainConfig) -> tuple[list[Judge], dict[str, float]]:
    """The judges and the gates that a configuration names.

    All that train or forecast call this first: what can be refused before anything is read is
    refused here.

    Raises:
        UsageError: a logger or an optimizer that is not installed or cannot run here, no such
            judge, or no such gate.
        ModelError: a judge's model that is not there.
    """
    require_loggers(config.report_to)
    judges = [parse_judge(spec, config.template_date) for spec in config.judges]
    gates = parse_gates(config.fail_under)
    require_optimizer(config)
    return judges, gates


def rates_of(model: PreTrainedModel, items: Sequence[str]) -> dict[str, float]:
    """Peak rates by parameter name; parameters that no pattern fits are left out.

    Where several patterns fit a parameter, the first one counts.

    Args:
        model: with `requires_grad` set on what trains.
        items: pattern=rate, the patterns as for `freeze`.

    Raises:
        UsageError: a pattern fits nothing that trains, or nothing that an earlier one has not
            taken.
    """
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    rates: dict[str, float] = {}
    for pattern, rate in parse_rates(items).items():
        matched = parameters_of(model, "learning_rates", pattern)
        if not matched & trains:
            raise UsageError(
                f"learning_rates: {pattern!r} fits only what is frozen (what trains looks like "
                f"{sorted(trains)[0]})"
            )
        left = matched & trains - rates.keys()
        if not left:
            raise UsageError(
                f"learning_rates: patterns before {pattern!r} have taken all that it fits; put it "
                "before them"
            )
        rates |= dict.fromkeys(sorted(left), rate)
    return rates
