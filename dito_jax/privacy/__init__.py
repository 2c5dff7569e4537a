"""Differentially private training: its gradient, its noise, its budget, its proof."""
