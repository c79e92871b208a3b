"""`smoldpo plan`: what a run will take, from a few real steps of it.

depths.py        what each freeze depth means
workload.py      how much a run computes; cache_lookup.py what earlier runs left for it
trial.py         the run's parts, loaded and tried; dry_run.py passes and steps; measure.py the rest
cost_model.py    seconds, and memory.py bytes, at every depth
planner.py       the forecast, and `freeze_layers: auto`; table.py the forecast as text
"""
