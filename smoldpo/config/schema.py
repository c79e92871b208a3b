"""The configuration: one typed model, every error at once.

A setting is documented once, in its `Field` here; `--help`, the JSON schema and docs read it from
this file. Names are those of TRL and Hugging Face wherever they have one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from smoldpo.config.field_types import (
    Arguments,
    Beta,
    Columns,
    Day,
    Device,
    Dtype,
    Duration,
    EngineName,
    Judges,
    Layers,
    LayerWords,
    LoggerNames,
    LossNames,
    Names,
    Numbers,
    OptimizerName,
    OrNone,
    Positive,
    PositiveInt,
    ScheduleName,
    Score,
    Sources,
    Truncate,
)
from smoldpo.config.losses import FACTS


class TrainConfig(BaseModel):
    """Everything that `smoldpo train` can be told. Without arguments it is the demo."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    # Model
    model: str = Field(
        "builtin",
        description="policy to start from: builtin (SmolLM2-135M-Instruct), a folder, a run, "
        "a .gguf file, or a hub id",
    )
    reference: OrNone[str] = Field(
        None, description="reference model; by default a frozen copy of the policy's start"
    )
    freeze_layers: Layers = Field(
        None,
        description="freeze the first N layers and the embeddings; 0 freezes none; by default "
        "five sixths of the layers (25 of SmolLM2-135M's 30), or none where train, train_layers "
        "or use_peft says what trains; auto: the fewest that fit budget (docs/plan.md)",
    )
    budget: OrNone[Duration] = Field(
        None,
        description="for freeze_layers auto: how long the whole run may take, such as 90s, 20m or "
        "1h30m",
    )
    freeze: Names = Field(
        [],
        description="freeze these too: embeddings, norms, biases, or patterns of parameter names "
        "such as '*.mlp.*' (comma-separated)",
    )
    train_layers: LayerWords = Field(
        [],
        description="train these decoder layers and nothing else, instead of freeze_layers: "
        "last:4, first:4, every:3, numbers from 0 and ranges such as 0,5,20-29 "
        "(docs/training.md)",
    )
    train: Names = Field(
        [],
        description="of what would train, train these alone: embeddings, norms, biases, or "
        "patterns of parameter names such as '*.mlp.*' (comma-separated)",
    )

    # Adapters
    use_peft: bool = Field(
        False,
        description="train low-rank adapters (LoRA) instead of the weights themselves, on all "
        "layers or those that freeze_layers or train_layers leaves; with a higher "
        "learning_rate (docs/training.md)",
    )
    lora_r: PositiveInt = Field(16, description="rank of the adapters")
    lora_alpha: float = Field(
        32.0, gt=0, description="adapters count lora_alpha / lora_r times (use_rslora: / √lora_r)"
    )
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="must be 0: DPO's log-probabilities are computed without dropout",
    )
    lora_target_modules: Names = Field(
        [],
        description="linear layers that get adapters: names such as q_proj,v_proj, or patterns "
        "such as '*.mlp.*'; by default (or all-linear) all of the decoder's",
    )
    use_dora: bool = Field(
        False, description="adapters with magnitudes of their own (DoRA); a little slower"
    )
    use_rslora: bool = Field(
        False, description="scale adapters by lora_alpha / √lora_r, for high ranks (rsLoRA)"
    )
    merge: bool = Field(
        False,
        description="save the whole model with the adapters in its weights as model/, which plain "
        "transformers loads; the adapters themselves as adapter/",
    )

    # Data
    data: Sources = Field(
        ["builtin"],
        min_length=1,
        description="preference pairs: builtin, a file (.jsonl, .json, .csv, .parquet, ...), a "
        "folder, or a hub id; several, comma-separated, are mixed",
    )
    data_weights: Numbers = Field(
        [], description="how much of each source a mix has, such as 2,1; by default by their sizes"
    )
    format: OrNone[str] = Field(
        None,
        description="the rows' schema (docs/data-reading.md); found by looking at them by default",
    )
    columns: Columns = Field(
        [], description="other names of the schema's columns: prompt=question,chosen=better"
    )
    rules_off: Names = Field(
        [], description="cleaning rules to leave out (docs/data.md), such as near_identical"
    )
    data_subset: OrNone[str] = Field(None, description="subset (configuration) of a hub dataset")
    data_split: OrNone[str] = Field(
        None, description="split of a hub dataset or folder to train on"
    )
    eval_data: OrNone[str] = Field(
        None,
        description="held-out pairs; by default the data's own test split, or a share of the data",
    )
    eval_fraction: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of prompts held out where the data has no test split; 0: no evaluation",
    )
    max_train_samples: OrNone[PositiveInt] = Field(
        None, description="train on the first N pairs only"
    )
    max_eval_samples: OrNone[PositiveInt] = Field(
        None, description="evaluate on the first N held-out pairs only"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        1024, description="tokens of prompt and completion together"
    )
    truncation: Truncate = Field(
        "turns",
        description="of what is longer: turns, a dialogue's oldest turns go, then the prompt's "
        "oldest tokens; tokens, the prompt's oldest tokens; drop, the pair is left out",
    )

    # Chat template
    chat_template: OrNone[str] = Field(
        None, description="a file with a chat template (Jinja) to use in place of the model's"
    )
    chat_template_kwargs: Arguments = Field(
        {},
        description="arguments for the chat template, such as enable_thinking=false "
        "(docs/conversations.md), comma-separated",
    )
    tools: OrNone[str] = Field(
        None, description="a JSON file with the tools of every prompt; rows may have their own"
    )
    documents: OrNone[str] = Field(
        None, description="a JSON file with documents that every prompt may use"
    )
    template_date: Day = Field(
        None,
        description="the day that a chat template takes for today, as YYYY-MM-DD; by default the "
        "day on which the run begins",
    )
    score: Score = Field(
        "assistant",
        description="what is scored of a side of several messages: all turns of the assistant, or "
        "the last",
    )
    allow_template_mismatch: bool = Field(
        False,
        description="train even where what is scored is not what the model would write in use "
        "(docs/conversations.md)",
    )

    # Loss
    loss_type: LossNames = Field(
        ["sigmoid"],
        min_length=1,
        description=f"{', '.join(FACTS)} (docs/losses.md); sigmoid is DPO; several, "
        "comma-separated, are added up",
    )
    loss_weights: Numbers = Field(
        [], description="weight of each of several losses, such as 1,0.2; by default 1 each"
    )
    beta: Beta = Field(0.1, description="β: how strongly the policy is held to the reference")
    beta_end: OrNone[Beta] = Field(
        None, description="β goes from beta to this in equal steps; by default it stays"
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of labels taken to be wrong (conservative DPO, robust); exo_pair's ε",
    )
    rpo_alpha: OrNone[Positive] = Field(
        None,
        description="weight of the chosen answers' negative log-likelihood per token, if any (RPO)",
    )
    ld_alpha: OrNone[Annotated[float, Field(ge=0, le=1)]] = Field(
        None,
        description="weight of the tokens by which the longer answer of a pair is longer, in "
        "policy and reference (LD-DPO); by default they count in full, as with 1",
    )
    use_weighting: bool = Field(
        False,
        description="weigh each pair by how likely the policy itself would give its answers (WPO)",
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        Field("reverse_kl", description="what holds the policy to the reference (f-DPO)")
    )
    f_alpha_divergence_coef: float = Field(0.5, description="alpha_divergence's α")
    discopop_tau: float = Field(0.05, gt=0, description="discopop's temperature τ")
    dpop_lambda: float = Field(
        50.0, gt=0, description="dpop's λ: the price of a chosen answer that becomes less likely"
    )
    simpo_gamma: float = Field(0.5, ge=0, description="simpo's margin γ")
    cpo_alpha: float = Field(1.0, ge=0, description="cpo's weight of the negative log-likelihood")
    desirable_weight: float = Field(
        1.0, gt=0, description="kto's and apo_zero_unpaired's weight of answers that people liked"
    )
    undesirable_weight: float = Field(
        1.0, gt=0, description="and of those that they did not; with few of a kind, more"
    )

    # Training
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate")
    learning_rates: Names = Field(
        [],
        description="peak rates of their own for some of what trains: pattern=rate, such as "
        "norms=1e-4,*.mlp.*=1e-5, with patterns as for freeze; the first that fits counts",
    )
    optim: OptimizerName = Field(
        "adamw_torch_fused",
        description="optimizer (docs/optimization.md): AdamW; adafactor and sgd keep less memory; "
        "adamw_8bit needs bitsandbytes",
    )
    sgd_momentum: float = Field(0.0, ge=0, lt=1, description="sgd's momentum; 0 keeps no state")
    lr_scheduler_type: ScheduleName = Field(
        "cosine", description="shape of the learning rate after warm-up (docs/optimization.md)"
    )
    min_lr_rate: OrNone[Annotated[float, Field(gt=0, lt=1)]] = Field(
        None,
        description="share of the peak rate at which cosine_with_min_lr (0.1 by default) and "
        "warmup_stable_decay (0 by default) end",
    )
    lr_decay_ratio: float = Field(
        0.2, gt=0, le=1, description="share of the steps in which warmup_stable_decay decays"
    )
    lr_decay_steps: OrNone[PositiveInt] = Field(
        None, description="steps in which warmup_stable_decay decays; overrides lr_decay_ratio"
    )
    lr_decay_type: Literal["cosine", "linear", "1-sqrt"] = Field(
        "cosine", description="shape of warmup_stable_decay's decay"
    )
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up")
    warmup_steps: OrNone[Annotated[int, Field(ge=0)]] = Field(
        None, description="steps that warm up; overrides warmup_ratio"
    )
    per_device_train_batch_size: PositiveInt = Field(4, description="pairs to a micro-batch")
    gradient_accumulation_steps: PositiveInt = Field(
        2, description="micro-batches to one optimizer step"
    )
    num_train_epochs: float = Field(2.0, gt=0, description="passes over the training pairs")
    max_steps: OrNone[PositiveInt] = Field(
        None, description="optimizer steps; overrides num_train_epochs"
    )
    weight_decay: float = Field(0.0, ge=0, description="decay of weights, on matrices only")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: OrNone[Positive] = Field(
        1.0, description="clip the gradient to this norm; none: do not clip"
    )
    ema_decay: OrNone[Annotated[float, Field(gt=0, lt=1)]] = Field(
        None,
        description="evaluate and save an exponential moving average of the weights with this "
        "decay a step, such as 0.98; by default the weights themselves",
    )
    sync_ref_model: bool = Field(
        False, description="move the reference towards the policy during training (TR-DPO)"
    )
    ref_model_mixup_alpha: float = Field(
        0.6, gt=0, le=1, description="share of the way that it goes each time; 1 copies the policy"
    )
    ref_model_sync_steps: PositiveInt = Field(512, description="it moves every N steps")
    seed: Annotated[int, Field(ge=0)] = Field(42, description="decides the order of the pairs")

    # Evaluation
    per_device_eval_batch_size: PositiveInt = Field(8, description="pairs at once in evaluation")
    eval_steps: OrNone[PositiveInt] = Field(
        None, description="evaluate every N steps too, not only before and after"
    )
    early_stopping_patience: OrNone[PositiveInt] = Field(
        None,
        description="stop after N evaluations (eval_steps) in a row without a better "
        "metric_for_best_model",
    )
    metric_for_best_model: Literal[
        "eval_loss",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
        "eval_accuracy/logp",
        "eval_accuracy/logp_per_token",
    ] = Field(
        "eval_loss", description="what says which evaluation is the best; of losses the lowest is"
    )
    load_best_model_at_end: bool = Field(
        False, description="save the policy of the best evaluation (eval_steps), not the last one"
    )
    sample_prompt: OrNone[Annotated[str, Field(min_length=1)]] = Field(
        "Give me one tip for sleeping better.",
        description="a prompt that reference and policy both answer at the end; none: skip",
    )
    generate_prompts: Annotated[int, Field(ge=0)] = Field(
        32,
        description="held-out prompts that reference and policy both answer at the end, for "
        "samples, drift (KL), judges, and alarms where answers no longer end or repeat "
        "themselves; 8 are too few for an alarm; 0: none",
    )
    temperature: float = Field(
        1.0,
        ge=0,
        description="of those answers; 1 draws from the model's own distribution, which the KL "
        "estimate needs; 0: the likeliest token each time",
    )
    max_new_tokens: PositiveInt = Field(128, description="length limit of an answer, in tokens")
    judges: Judges = Field(
        ["length"],
        description="who compares the answers of policy and reference: length, reward:MODEL, "
        "implicit:MODEL[,REFERENCE], or the URL of an OpenAI-compatible endpoint "
        "(docs/evaluation.md); several, comma-separated",
    )
    fail_under: Names = Field(
        [],
        description="exit with 1 when a figure is lower: reward=0.55, change/reward=0.02, "
        "balanced=0.5, win_rate=0.5 (docs/evaluation.md)",
    )

    # Machine
    dtype: Dtype = Field(
        "auto",
        description="compute precision; auto measures whether bfloat16 is faster here. "
        "What trains is kept in float32 (float64 with float64)",
    )
    device: Device = Field("auto", description="auto takes cuda, then mps, then cpu")
    engine: EngineName = Field(
        "auto",
        description="fast: nothing computed twice; plain: two models, padded batches, full logits; "
        "auto: fast wherever it is proven exact for the model",
    )

    threads: OrNone[PositiveInt] = Field(
        None,
        description="threads of the CPU, each of which computes a stream of pairs; no result "
        "depends on it; unset: OMP_NUM_THREADS, or the physical cores that the process may use",
    )
    nice: Annotated[int, Field(ge=0, le=19)] = Field(
        0, description="how far other programs go before this one (nice(2)): 0 not at all, 19 most"
    )
    stream_tokens: PositiveInt = Field(
        1920,
        description="tokens of a stream of pairs, which the fast engine computes in one thread (in "
        "training two thirds of them); fewer take less memory and keep more threads busy",
    )
    ordered_sum: bool = Field(
        True,
        description="on several ranks (docs/scale.md): add gradients in the streams' order, so "
        "that any number of ranks gives the same bits; off: in any order, with less to send where "
        "a step has more streams than ranks",
    )
    fsdp: bool = Field(
        False,
        description="on several ranks: each keeps a share of every weight, gradient and optimizer "
        "state (torch's fully_shard), for models that one cannot hold; with the plain engine",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compile what lies between matrix products; auto: on CUDA, and on a CPU for "
        "runs long enough to save more than compiling takes",
    )
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="native: kernels of smoldpo's own, compiled at their first use, for bfloat16 "
        "on a CPU with AMX or with AVX-512 and bfloat16; torch: torch's functions; auto: native "
        "where they are measured faster and their results are right",
    )
    cache: Literal["auto", "off", "memory", "disk"] = Field(
        "auto",
        description="where the frozen layers' output and the reference's log-probabilities are "
        "kept: disk serves later runs too (smoldpo cache list); off computes the "
        "former anew in every epoch; auto: disk",
    )
    cache_limit: float = Field(
        20.0, gt=0, description="gigabytes that may be kept on disk; what was used longest ago goes"
    )

    # Output
    output_dir: OrNone[str] = Field(
        None, description="run folder; by default runs/<model>-<data>-<time>"
    )
    overwrite: bool = Field(False, description="replace the run that output_dir holds")
    save_steps: OrNone[PositiveInt] = Field(
        None,
        description="save a checkpoint (for smoldpo resume) every N steps, and at the end; the "
        "final model is always saved",
    )
    save_minutes: OrNone[Positive] = Field(
        10.0, description="save a checkpoint every N minutes, too; none: do not"
    )
    keep_checkpoints: PositiveInt = Field(
        2, description="keep the newest N checkpoints; and the best one, where one is asked for"
    )
    report_to: LoggerNames = Field(
        [],
        description="send the metrics there too: tensorboard, trackio, wandb, mlflow "
        "(docs/loggers.md), comma-separated; metrics.jsonl is always written",
    )
    logging_steps: PositiveInt = Field(1, description="write metrics every N steps")

    @property
    def last_beta(self) -> float:
        """β at the end of training, at which before and after are evaluated."""
        return self.beta if self.beta_end is None else self.beta_end

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` as a mapping from the schema's name to the row's."""
        pairs = (item.partition("=") for item in self.columns)
        return {name.strip(): column.strip() for name, _, column in pairs}


SECTIONS = {
    "Model": ("model", "train"),
    "Adapters": ("use_peft", "merge"),
    "Data": ("data", "truncation"),
    "Chat template": ("chat_template", "allow_template_mismatch"),
    "Loss": ("loss_type", "undesirable_weight"),
    "Training": ("learning_rate", "seed"),
    "Evaluation": ("per_device_eval_batch_size", "fail_under"),
    "Machine": ("dtype", "cache_limit"),
    "Output": ("output_dir", "logging_steps"),
}
"""First and last field of each section of `--help`, in the order of the fields above."""
