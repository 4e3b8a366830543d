"""A run in virtual time: the pacer and the router of real runs, with replicas and a policy that only take time.

config.py      what a recipe may say about how long things take
setup.py       the numbers of a recipe that matter here: counts, limits and the staleness rule
lengths.py     how long the completions of a prompt are: drawn, or taken from a run
replicas.py    decoding as processor sharing: how far every sequence is, under which weights
simulator.py   the event loop: dispatch, decode, score, take, train, publish
result.py      what a run would have done: throughput, staleness, waste, idle time
tally.py       the sums that the simulator keeps on the way to its result
"""
