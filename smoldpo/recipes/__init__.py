"""Recipes that others wrote, read as smoldpo configurations, with an account of every key.

A dialect (`trl`, `handbook`, `axolotl`, `llamafactory`) is a table of rules for keys that stand alone,
`groups` for those that hang together, and the `DEFAULTS` of its tool where smoldpo's are others.
`reference_free` decides the loss of recipes for ORPO, CPO and SimPO, whatever the dialect.
"""

from smoldpo.recipes.account import Entry, one_line
from smoldpo.recipes.importing import DIALECTS, Imported, import_recipe

__all__ = ["DIALECTS", "Entry", "Imported", "import_recipe", "one_line"]
