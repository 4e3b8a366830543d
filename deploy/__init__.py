"""The edge, where people and clusters meet Paceline: `python -m deploy`.

__main__.py   the command line; user errors end here with one message and exit code 2
command.py    what the verbs share
plan.py       what a recipe would do and where, shown before anything is started
memory.py     what each pool would take of its GPUs' memory; host_memory.py of its nodes' own;
              shapes.py reads how large the models are
ledger.py     what a run's journal proves          scale.py   more or fewer replicas, while it trains
doctor/       what can be known to go wrong with a run, found before it
simulate/     a recipe in virtual time
manifest/     a recipe as a KubeRay manifest
jobs/         runs on a cluster, submitted as jobs, watched and stopped
drain.py      what a pod runs before it ends
train.py      one recipe trained on a Ray cluster, or on a Ray that is started on this machine (session.py, stopping.py)
knock.py      whether a cluster lets us in, before Ray tries
joined.py     a cluster that was joined has room for a run, and its nodes see the run's files (nodes.py)
columns.py    what a recipe reads of its rows      trust.py   whose code runs beside ours
"""
