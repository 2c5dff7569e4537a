"""Evaluation: what the samples of a run are worth, in figures and in pictures."""
