"""What is measured, by whole runs and as ratios; each prints a table and one JSON line.

demo_seeds.py        the demo on five seeds
pacing.py            the scheduler in virtual time: efficiency, staleness, and the rules of other systems beside it
rivals.py            those rules, in our own words
weight_sync.py       publication against the raw wire, the pause, changed elements (with _wire, _relay, _engine, _lora)
weight_sync_links.py a relay against one group where each process has a slow link of its own
checkpoint.py        how long a policy stands still for a checkpoint, and how slow it is while one is written
policy_step.py       packing against padding, log-probabilities without logits, the balance of ranks (with _team)
end_to_end.py        whole runs against TRL's GRPOTrainer (with _case, _sides, _trl, _model, _rewards)
control_overhead.py  the real controller on real Ray with workers that sleep
usage.py             what all of them say to --help
"""
