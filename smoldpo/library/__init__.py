"""smoldpo from Python: what `import smoldpo` offers. docs/library.md has an example of each name.

training.py   train: a run, as `smoldpo train` does it
measuring.py  evaluate: what a model, or two, are worth on pairs
pairs.py      load_pairs: clean pairs from any source, with the account of what was dropped
loss.py       dpo_loss: every loss as a function of log-probabilities
logps.py      sequence_logps: the engine's log-probabilities, with gradients, for loops of one's own
given.py      pairs that are handed over in memory become a file that a run can read, and read again
guest.py      manners inside somebody else's program: quiet if asked, and everything put back

Nothing here prints to standard output or ends the process. What goes wrong is raised: a SmoldpoError whose
text says what to do, an InterruptedRunError (a KeyboardInterrupt) after a signal, and Python's own OSError
and MemoryError where disk or memory ran out.
"""
