"""Who runs on which GPU: a pure plan first, then Ray placement groups.

config.py   what a recipe says about its pools
cluster.py  the nodes there are
memory/     what each GPU must hold: pure
plan.py     pools onto nodes, or exactly what is missing: pure, so a plan costs nothing
live.py     the plan of a live cluster, where others may hold a part of it
groups.py   the plan's bundles reserved on the live cluster, each on its node
seats.py    bundles that come and go one by one
shared.py   which GPUs a worker of the policy has, for those who lie with it; these four alone import Ray
home.py     a worker on shared GPUs makes sure that they are still those
elastic.py  who joins and who leaves, from what is wanted and what the cluster offers: pure
"""
