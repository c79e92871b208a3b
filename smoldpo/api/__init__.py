"""smoldpo from Python: what `import smoldpo` offers. docs/library.md has an example of each name.

train.py     train: a run, as `smoldpo train` does it
evaluate.py  evaluate: what a model, or two, are worth on pairs
pairs.py     load_pairs: clean pairs from any source, with the account of what was dropped
losses.py    dpo_loss: every loss as a function of log-probabilities
logps.py     sequence_logps: the engine's log-probabilities, with gradients, for loops of one's own

Nothing here prints to standard output or ends the process. What goes wrong is raised: a
SmoldpoError whose text says what to do, an InterruptedRunError (a KeyboardInterrupt) after a
signal, and Python's own OSError and MemoryError where disk or memory ran out.
"""
