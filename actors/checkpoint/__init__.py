"""A run can be killed at any moment and goes on from its last cut: nothing is lost, and nothing is trained twice.

A cut is taken between two steps, at one weight version: the policy with its optimizer, what the pacer knows, and the
scored groups that wait to be trained. Groups in flight are sampled again under their ordinals.

config.py        what a recipe may say
store.py         folders that are complete or not there: staged, digested, renamed; the newest are kept
groups.py        scored groups as bytes and back
cut.py           what is in a cut besides the policy
moment.py        from the parts of a run into a cut, and back
best.py          which checkpoint is the best
checkpointer.py  takes the cuts of a run while it goes on
resume.py        whether a run folder can be gone on with, and from where
"""
