"""One training run: its command line, recipe, start, and how it is read back."""
