"""Evaluation of a run: sampling, metrics of sample quality, plots and report."""
