"""Whether a model has a row for every token id that it is given.

A tokenizer may know more ids than its model, as long as none of them comes up.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.types import TokenizedPair
from smoldpo.utils.errors import ModelError


def token_rows(model: PreTrainedModel) -> int:
    """Ids that the model takes and gives: rows of its embeddings, and of its LM head if any."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return min(len(end.weight) for end in ends if end is not None)


def require_rows(
    tokenizer: PreTrainedTokenizerBase, rows: int, sequences: Iterable[Iterable[int]]
) -> None:
    """Refuse ids for which the model has no row.

    Args:
        rows: as `token_rows` counts them; of several models the fewest.
        sequences: of token ids.

    Raises:
        ModelError: there is such an id; the token is named.
    """
    highest = max((max(ids, default=-1) for ids in sequences), default=-1)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} ids, but the model rows for {rows:,} only, and "
            f"none for {token!r} (id {highest}), which is in what it would read; give the "
            "tokenizer that belongs to this model, or one whose chat template leaves that token out"
        )


def require_rows_of_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: int, pairs: Iterable[TokenizedPair]
) -> None:
    """As `require_rows`, for prompts and answers of tokenised pairs."""
    parts = ((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs)
    require_rows(tokenizer, rows, (ids for part in parts for ids in part))
