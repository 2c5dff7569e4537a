"""Eight CPU devices, and array annotations checked: what every test runs under."""

import os


os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a GPU host says JAX_PLATFORMS=cuda, as `make gpu` does
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax  # noqa: E402


jax.config.update("jax_num_cpu_devices", 8)
