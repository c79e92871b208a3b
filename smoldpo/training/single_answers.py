"""What a run of KTO or unpaired APO trains and evaluates on."""

from __future__ import annotations

from dataclasses import replace

from smoldpo.config.schema import TrainConfig
from smoldpo.data.load import TrainingData
from smoldpo.data.thumbs import as_thumbs, held_out, with_partners
from smoldpo.utils import progress
from smoldpo.utils.errors import UsageError


def single_answers(config: TrainConfig, data: TrainingData) -> TrainingData:
    """The data of a loss that takes single answers: pairs are split, and that is said.

    Raises:
        UsageError: too few answers, or of one kind alone.
    """
    pairs = sum(pair.numbers.liked is None for pair in data.train)
    answers = as_thumbs(data.train)
    liked = sum(bool(answer.numbers.liked) for answer in answers)
    names = ", ".join(config.loss_type)
    if not 0 < liked < len(answers):
        raise UsageError(
            f"{names}: all {len(answers):,} answers to train on are of one kind; give answers that "
            "people liked and others that they did not"
        )
    split = f"; {pairs:,} pairs were split into two answers each" if pairs else ""
    progress.say(
        f"{names}: {len(answers):,} single answers to train on, {liked:,} of them liked{split}"
    )
    group = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return replace(data, train=with_partners(answers, group), eval=held_out(data.eval, group))
