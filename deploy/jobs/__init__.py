"""Runs on a Ray cluster: submitted as jobs, watched, and stopped in order."""
