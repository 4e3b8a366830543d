"""Losses on what somebody preferred: each is a function of one number per sequence, over the whole global batch.

The number is the log-probability of the completion, summed over its tokens, or the score that a reward model gives.
batch.py     those numbers, in pairs or one by one
weigh.py     the loss, and what each sequence weighs in its gradient
config.py    what a recipe says about the losses
online.py    pairs of samples from their rewards
dpo.py, kto.py, orpo.py, cpo.py, bradley_terry.py      one loss, or one family of losses, each
"""
