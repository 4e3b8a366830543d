"""One run, from its recipe to its run folder.

grpo.py, sft.py   build the components and run them     folder.py   what a run leaves behind
lineage.py        which recipes come first
reporter.py       metrics, samples and the summary      progress.py, plot.py, tracker.py   for those who look
"""
