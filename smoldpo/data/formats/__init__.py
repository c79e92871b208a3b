"""From rows to preference pairs: one reader a schema, chosen by looking at the rows.

reader.py    PairReader: finds the schema on the first row, maps columns, reads row after row
schemas.py   SCHEMAS: how each schema is recognised, and its reader
pairs.py     rows that say which answer is chosen
judged.py    rows that hold answers and a score, vote or label
values.py    text, messages, numbers; Unreadable (counted) and DataError (ends the reading)
"""

from smoldpo.data.formats.reader import PairReader
from smoldpo.data.formats.schemas import SCHEMAS, Schema, detect
from smoldpo.data.formats.values import Unreadable, parse_transcript

__all__ = ["SCHEMAS", "PairReader", "Schema", "Unreadable", "detect", "parse_transcript"]
