"""Recipes that others wrote, read as smoldpo configurations, with an account of every key.

A dialect (trl.py, handbook.py, axolotl.py, llama_factory.py) is a table of rules for keys that stand
alone, `groups` for those that belong together, and the `DEFAULTS` of its tool where smoldpo's differ.
losses.py decides the loss of recipes for ORPO, CPO and SimPO, whatever the dialect.
"""

from smoldpo.config.importers.load import DIALECTS, Imported, import_recipe
from smoldpo.config.importers.mapping import Entry, one_line

__all__ = ["DIALECTS", "Entry", "Imported", "import_recipe", "one_line"]
