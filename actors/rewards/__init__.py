"""Reward functions run in a child process that a deadline kills; actors/reward.py is the actor that owns it.

functions.py   load and check a function    child.py   the child process
process.py     start, call and kill it      pipe.py    the wire between the two
judge.py       a function that compares two completions as a reward function
classifier.py  a reward model as a reward function
"""
