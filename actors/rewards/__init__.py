"""Reward functions run in a child process that a deadline kills; actors/reward.py is the actor that owns it.

functions.py   load and check a function    child.py   the child process
process.py     start, call and kill it      pipe.py    the wire between the two
classifier.py  a reward model as a reward function
"""
