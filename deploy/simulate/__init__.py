"""The simulate verb: a recipe in virtual time, before its GPUs are paid for.

verb.py       runs the recipe's numbers and prints what came of it, and what other splits and depths would give
setup.py      a recipe as the simulator sees it: algorithms/simulation/setup.py
options.py    the splits of the GPUs and the depths that are compared
plot.py       the same as a picture
calibrate.py  how long things take, fitted to a finished run
record.py     what a run folder tells of its groups and steps
"""
