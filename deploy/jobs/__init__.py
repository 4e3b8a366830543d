"""Runs on a Ray cluster: submitted as jobs, watched, and stopped in order.

verbs.py      submit, status, logs and stop, as they are written on the command line
submit.py     nothing is sent that cannot run             inputs.py      what can be known to be wrong before
shipment.py   the folder as an archive                    variables.py   the job's environment and command
attempts.py   the jobs of one run                         head.py        Ray's job server, asked with a deadline
watch.py      a log that is followed to its end           progress.py    what a log and a run folder say of the steps
status.py     what is known of the runs                   stop.py        one of them is stopped
address.py    where the cluster is
"""
