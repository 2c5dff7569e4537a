"""Operations as PyTorch functions, where PyTorch is installed: `from kernels_pallas import torch as kernels`."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .functions import expert_mlp, flash_attention, modulated_norm, to_jax


__all__ = ["expert_mlp", "flash_attention", "modulated_norm", "to_jax"]


def __getattr__(name: str) -> Any:
    """PyTorch is imported with the first function that is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; choose from {', '.join(__all__)}.")
    from . import functions

    return getattr(functions, name)
