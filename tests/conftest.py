"""Eight CPU devices, and array annotations checked: what every test runs under."""

import contextlib
import os


os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a GPU host says JAX_PLATFORMS=cuda, as `make gpu` does
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax


jax.config.update("jax_num_cpu_devices", 8)

with contextlib.suppress(ImportError):  # a GPU host need not have beartype
    import beartype  # noqa: F401
    import jaxtyping

    jaxtyping.install_import_hook(["dito_jax", "kernels_pallas"], "beartype.beartype")
