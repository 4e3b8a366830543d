"""One run, from its recipe to its run folder.

grpo.py           start the workers, live, write the summary
sft.py            a run that samples nothing; what it learns: lessons.py, preference.py (batches.py, references.py)
recovery.py       when the policy is lost, live again from the last cut     life.py   the components of one life, wired
watchdog.py       who holds up a run that stalls: what can be seen (sight.py, stacks.py), and who it is (suspect.py)
folder.py         what a run leaves behind              lineage.py   which recipes come first
machine.py        ends when Ray's own processes have died        pulse.py   ends when the driver's event loop hangs
reporter.py       metrics, samples and the summary      progress.py, plot.py, tracker.py   for those who look
signals.py        SIGTERM and Ctrl-C end a run in order
"""
