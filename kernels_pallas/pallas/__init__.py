"""Shared code of the Pallas kernels: launching, tile loads and stores, and the Mosaic GPU pipeline."""
