"""`smoldpo plan`: what a run will take, from a few real steps of it.

workload.py    how much work each part of the run is
trial.py       the real run, built and timed: dry_run.py its steps, depths.py which depths
cost_model.py  seconds a unit of work
memory.py, cache_lookup.py  memory at every depth; what the cache holds already
planner.py     all of it together, and `freeze_layers: auto`; table.py the answer as text
"""
