"""A recipe as a Kubernetes manifest for KubeRay: `python -m deploy manifest`.

verb.py      its options on the command line
options.py   what is asked for beside the recipe
inputs.py    what can be known to be wrong before anything is rendered: names, and paths that the pods would not see
groups.py    pools as groups of equal pods, and the nodes that Ray will then see
pods.py      the pods themselves
render.py    the RayJob or RayCluster
rules.py     what KubeRay refuses although its schema takes it: the manifest is held to it before it is shown
"""
