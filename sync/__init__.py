"""One weight version, from the policy ranks to every rollout replica, whole or not at all. Knows no Ray.

config.py     what a recipe may say about it
member.py     what a process must know to take part
layout.py     parameters -> fixed buckets; names, shapes and offsets, computed once and sent ahead; pure
transport.py  what a wire is: two implementations, one rendezvous
gloo.py       over TCP, host memory to host memory; every operation ends by its deadline
relay.py      over TCP too, handed down a tree of members
fanout.py     one group or a tree, and how long each takes; pure        simulated.py  the same in virtual time
nccl.py       GPU to GPU through cupy; has not run on a GPU yet
sender.py     policy side: gather, pack and stream the buckets of one version
changes.py    policy side, with delta: what changed since the last version
delta.py      the elements that changed, as bytes; pure        frame.py  what comes before each bucket then
receiver.py   replica side, inside vLLM's worker
staging.py    replica side: receive and verify without touching the committed version
serving.py    replica side: the staged tensors become the model that serves, in the time of a flip of pointers
reload.py     replica side: the model is loaded as from a checkpoint, tensor by tensor
adapters.py   replica side: or the adapter that serves, on a model that stays
"""
