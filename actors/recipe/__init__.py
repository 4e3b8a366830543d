"""A recipe is the whole configuration of one run.

schema.py    what may be said           file.py        read, override, check, write (plain_yaml.py, errors.py)
pools.py     which pools a recipe uses
"""
