"""Which implementation computes what, where a user wants another than the fastest one measured."""

import dataclasses

from kernels_pallas import DENSE_MLP, FLASH_ATTENTION, GATED_MLP, GATED_RESIDUAL_NORM, QK_NORM_ROPE


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """A name for each part of a model: "xla" is the plain definition, None the fastest that results/ knows here."""

    attention: str | None = None
    norm: str | None = None  # modulated_norm and gated_residual_norm
    qk_norm_rope: str | None = None
    mlp: str | None = (
        None  # gated_mlp and dense_mlp; None is another thing here: products of XLA's in the model's dtype
    )

    def problems(self, mlp: str) -> list[str]:
        """The names that no implementation has, for a model with MLPs of this make, a line each."""
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
                found.append(f"kernels.{field} {name!r} is no implementation; choose from {', '.join(known)}, or None")
        return found
