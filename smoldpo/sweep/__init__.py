"""`smoldpo sweep`: many trainings over the same pairs, and which settings are worth taking.

spec.py     a sweep file and the command line -> what every trial shares, and what differs
space.py    lists and ranges of settings, and which each trial has: grid, random, optuna
splits.py   train / validation / final pairs, apart by prompt
shared.py   what trials share: pairs, tokens, models' contents, the way of computing
trials.py   the trials, ordinary runs that may be resumed, and the winner on the final pairs
results.py  the records, the ranking corrected for looking at all trials; results.json and .csv
report.py   report.html and its plots
run.py      the sweep from beginning to end
"""
