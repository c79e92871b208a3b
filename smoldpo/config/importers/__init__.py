"""Recipes that others wrote, read as smoldpo configurations, with an account of every key.

mapping.py holds the rules for a key, and the interpreter of tables of them. Each dialect (trl.py,
axolotl.py, llama_factory.py) is a table of rules for keys that stand alone, steps for
those that belong together, and its tool's defaults. hf_trainer.py, optimizers.py, adapters.py,
datasets.py and losses.py hold what several dialects share.
"""

from smoldpo.config.importers.load import DIALECTS, Imported, import_recipe
from smoldpo.config.importers.mapping import Entry, one_line

__all__ = ["DIALECTS", "Entry", "Imported", "import_recipe", "one_line"]
