"""One weight version, from the policy ranks to every rollout replica, whole or not at all. Knows no Ray.

config.py     what a recipe may say about it
layout.py     parameters -> fixed buckets; names, shapes and offsets, computed once and sent ahead; pure
gloo.py       the wire: broadcast over TCP from rank 0 to every receiver, each call with a deadline
sender.py     policy side: gather, pack and stream the buckets of one version
receiver.py   replica side, inside vLLM's worker: receive into staging, verify, swap
"""
