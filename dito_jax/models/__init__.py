"""Models: one a file, each with its config, its size table and its flops."""
