"""What became of every row that was read: the record that data.json holds. No torch here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class TouchedRow(BaseModel):
    """A row that a rule dropped, mended or warned about; texts are excerpts."""

    file: str = ""
    row: int
    rule: str
    action: str = ""
    detail: str = ""
    before: str = ""
    after: str | None = None


class SourceAccount(BaseModel):
    """The rows of one source: counts by rule, and the rows that a rule dropped or mended."""

    source: str
    format: str
    rows_read: int
    rows_kept: int
    columns_not_read: list[str] = []
    dropped: dict[str, int] = {}
    mended: dict[str, int] = {}
    warned: dict[str, int] = {}
    touched: list[TouchedRow] = []


class SplitAccount(BaseModel):
    """How pairs were held out, and how many."""

    how: str
    train_pairs: int
    eval_pairs: int
    train_pairs_dropped_for_eval_prompt: int = 0
    train_pairs_near_eval_prompt: int = 0
    train_pairs_left_by_weight: int = 0
    touched: list[TouchedRow] = []


class TokenAccount(BaseModel):
    """Lengths of the pairs in tokens, and how many were cut or noted, by reason."""

    max_length: int
    longest: int
    mean: float
    notes: dict[str, int] = {}


class DataAccount(BaseModel):
    """data.json: one source to train on and one held out where read apart, or several under `sources`."""

    train: SourceAccount | None = None
    eval: SourceAccount | None = None
    sources: list[DataAccount] = []
    split: SplitAccount | None = None
    tokens: TokenAccount | None = None

    def as_json(self) -> dict[str, Any]:
        """For JSON; what does not apply is left out."""
        return self.model_dump(exclude_unset=True)
