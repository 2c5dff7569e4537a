"""Trained networks where there is none of this code."""
