"""From prompts to pairs: answers drawn, ranked, and written with all that made them.

prompts.py  the prompts of a text file, of rows, or of pairs
checks.py   what an answer must be, without a model: json, max_words=50, regex=..., module:function
journal.py  answers and verdicts on the disk as they come, so that nothing is made twice
sample.py   n answers to each prompt, by one model or several
rank.py     judges and checks, weighted, to one score an answer; which two make a pair
make.py     `smoldpo pairs make`
merge.py    `smoldpo pairs merge`: pairs of several origins, each with its source
"""
