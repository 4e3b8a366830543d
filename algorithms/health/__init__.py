"""What a healthy run looks like from its metrics, and what to do when it does not.

config.py     the rules of a recipe, and how often a step may be skipped
"""
