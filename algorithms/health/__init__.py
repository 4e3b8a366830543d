"""What a healthy run looks like from its metrics, and what to do when it does not.

config.py     the rules of a recipe, and how often what they do may be done
rules.py      what each rule measures of a step, and when it finds something wrong
"""
