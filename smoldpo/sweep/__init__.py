"""`smoldpo sweep`: many trainings over the same pairs, and which settings are worth taking.

spec.py     a sweep file and the command line -> what every trial shares, and what differs
space.py    lists and ranges of settings, and which each trial has: grid, random, optuna
splits.py   train / validation / final pairs, apart by prompt
shared.py   what trials share: pairs, tokens, models' contents, the way of computing
trials.py   one trial: an ordinary run, which may go on from its checkpoint; the winner on the final pairs
results.py  which trials the winner is better than, corrected for looking at all; results.json and .csv
text.py     sentences; report.py report.html and its plots
run.py      the sweep from beginning to end
"""
