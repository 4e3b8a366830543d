"""A recipe is the whole configuration of one run.

schema.py    what may be said: the kinds of recipe; their parts in model.py, data.py, rewards.py, rollout.py, policy.py,
             critic.py and upkeep.py; what all kinds share in base.py and closed.py; dpo, kto, orpo, cpo and reward in
             preference.py; what methods with a loss of their own refuse in methods.py
file.py      read, override, check, write (plain_yaml.py, errors.py)          pools.py     which pools a recipe uses
named.py     the files, folders and names of the hub that a recipe names
deadlines.py deadlines that follow from others
"""
