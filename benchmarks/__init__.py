"""What is measured, by whole runs and as ratios; each prints a table and one JSON line.

demo_seeds.py   the demo on five seeds
"""
