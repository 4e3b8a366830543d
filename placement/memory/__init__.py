"""What each GPU of a pool must hold, told from the model's shape before anything is started: pure.

shape.py         a model's shape, from its config.json
footprint.py     bytes on one GPU of each pool, part by part
host.py          bytes in a node's own memory
fit.py           whether they fit, and which knob makes them fit
shared.py        the same of a GPU that pools share
accelerators.py  the memory of a live cluster's GPUs
"""
