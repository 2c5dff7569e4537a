"""Choice of kernel implementations, for users who want another one than the fastest measured."""

import dataclasses

from kernels_pallas import DENSE_MLP, FLASH_ATTENTION, GATED_MLP, GATED_RESIDUAL_NORM, QK_NORM_ROPE


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """Implementation of each kernel operation by name: "xla" is plain JAX; None is the fastest one measured."""

    attention: str | None = None
    """Implementation of attention; None: the fastest measured on this hardware."""
    norm: str | None = None
    """Implementation of modulated_norm and gated_residual_norm; None: the fastest measured on this hardware."""
    qk_norm_rope: str | None = None
    """Implementation of QK-norm with rotary embedding; None: the fastest measured on this hardware."""
    mlp: str | None = None
    """Implementation of gated_mlp or dense_mlp; None: XLA matrix products in the model's dtype."""

    def problems(self, mlp: str) -> list[str]:
        """One line for each unknown implementation name, for a model with this MLP type."""
        tables = {
            "attention": FLASH_ATTENTION,
            "norm": GATED_RESIDUAL_NORM,
            "qk_norm_rope": QK_NORM_ROPE,
            "mlp": DENSE_MLP if mlp == "gelu" else GATED_MLP,
        }
        found = []
        for field, op in tables.items():
            name, known = getattr(self, field), ["xla", *op.kernels]
            if name is not None and name not in known:
                found.append(
                    f"kernels.{field} {name!r} is not an implementation; choose from {', '.join(known)}, or None"
                )
        return found
