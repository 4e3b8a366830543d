"""Reward functions run in a child process that a deadline kills; actors/reward.py is the actor that owns it.

functions.py   load and check a function        call.py      its arguments, and what its output is worth
child.py       the child process                together.py  the same, with many calls of async functions in flight
process.py     start it, speak to it, kill it   pipe.py      the wire between the two
lane.py        whoever is to be scored by one child, and the deadline of each call
docket.py      who is next there, and who is to blame when a child ends
judge.py       a function that compares two completions as a reward function
classifier.py  a reward model as a reward function
"""
