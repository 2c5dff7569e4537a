"""The commands that benchmark, autotune and inspect kernels."""
