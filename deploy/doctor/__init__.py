"""The doctor verb: what can be known to go wrong with a run is found before it, each check in one line.

check.py      a check, and what it found: it has a deadline, and nothing that goes wrong in it goes further
versions.py   Python and the pinned packages
machine.py    what a machine offers, and whether that is enough: shared memory, limits, ports
gpus.py       driver, CUDA, NCCL and cupy
storage.py    the run folder: writable, large enough, seen by every node
cluster.py    Ray: reached or started, and whether the pools fit on its nodes
data.py       the data set, the prompts that it makes, the tokenizer
rewards.py    the reward functions, called in their child process
engines.py    an engine and the policy agree on a prompt
examination.py  which checks there are, in their order
report.py     how they are shown
"""
