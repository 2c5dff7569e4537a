"""Export of trained networks for use without this code."""
