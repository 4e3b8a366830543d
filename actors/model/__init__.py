"""The language model.

load.py   weights and tokenizer     tiny.py   make a small one from a config
size.py   how large it is, from its files
files.py  a folder that others load as it is
forward.py   log-probabilities of a packed row     lora.py   adapters: what is trained, travels and is saved
"""
