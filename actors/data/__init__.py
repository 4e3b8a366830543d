"""Rows become token ids once, by ordinal: the same ordinal is the same prompt after any restart.

dataset.py   rows of a hub data set, a file or a generated task
prompts.py   prompts for rollouts           examples.py   prompt and completion for supervised runs
chat.py      what the assistant says        preferences.py   pairs of answers, and answers that are good or bad
"""
