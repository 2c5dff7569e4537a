"""The commands that compile, time and tune kernels."""
