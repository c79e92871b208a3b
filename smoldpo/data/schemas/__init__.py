"""From rows to preference pairs: one reader a schema, chosen by looking at the rows.

reader.py  PairReader: finds the schema on the first row, maps columns; SplitReader: a whole split
table.py   SCHEMAS: how each schema is recognised, and its reader
paired.py  rows that say which answer is chosen
scored.py  rows that hold answers and a score, vote or label
fields.py  text, messages, numbers; Unreadable (counted) and DataError (ends the reading)
"""

from smoldpo.data.schemas.fields import Unreadable
from smoldpo.data.schemas.reader import PairReader, SplitReader
from smoldpo.data.schemas.table import SCHEMAS

__all__ = ["SCHEMAS", "PairReader", "SplitReader", "Unreadable"]
