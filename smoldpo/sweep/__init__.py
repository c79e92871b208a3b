"""`smoldpo sweep`: many trainings over the same pairs, and which settings are worth taking.

spec.py      a sweep file and the command line -> what every trial shares, and what differs
space.py     lists and ranges of settings
methods.py   which settings each trial has: grid, random, optuna
pairs.py     train / validation / final pairs, apart by prompt
shared.py    what trials share: pairs, tokens, models' contents, the way of computing
trials.py    one trial: an ordinary run, which may go on from its checkpoint
final.py     the winner on the final pairs: an ordinary run folder
winner.py    which trials the winner is better than, corrected for looking at all of them
results.py   results.json and results.csv;  words.py, wording.py  sentences;  show.py  the terminal
page.py      report.html;  figures.py  its pictures
conduct.py   the sweep from beginning to end
"""
