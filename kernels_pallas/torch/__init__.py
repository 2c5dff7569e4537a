"""PyTorch bindings (zero-copy via DLPack, with autograd): `from kernels_pallas import torch as kernels`."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .functions import expert_mlp, flash_attention, modulated_norm, to_jax


__all__ = ["expert_mlp", "flash_attention", "modulated_norm", "to_jax"]


def __getattr__(name: str) -> Any:
    """Imports PyTorch on the first access to one of the functions."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; choose from {', '.join(__all__)}.")
    from . import functions

    return getattr(functions, name)
