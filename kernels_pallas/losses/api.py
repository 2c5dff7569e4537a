"""The public function `linear_cross_entropy` and the table of its implementations."""

import jax
from jaxtyping import Array, Float, Int

from ..op import Kernel, Op
from . import cost, reference, triton
from .blocks import BACKWARD, FORWARD, candidates
from .cases import CASES


LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    reference=reference.linear_cross_entropy,
    kernels={
        "triton": Kernel(
            triton.forward,
            triton.backward,
            triton.unsupported,
            candidates={f"{name}.triton": candidates for name in (FORWARD, BACKWARD)},
        )
    },
    cost={"forward": cost.forward, "backward": cost.backward},
    cases=CASES,
)


def linear_cross_entropy(
    x: Float[Array, "R D"],
    w: Float[Array, "D V"],
    labels: Int[Array, " R"],
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Fused linear layer and cross-entropy, without the R x V logits in memory: (loss, lse) of each row.

        logits = x w, or softcap * tanh(x w / softcap)
        lse = log sum exp(logits)
        loss = lse - logits[label] + z_loss * lse**2

    Both are float32; the caller takes the mean over rows. A row whose label is `ignore_index` has loss 0, and an lse.
    All other labels must be in [0, V); the loss for a label outside this range is undefined. `lse` is differentiable
    too.

    Raises:
      ValueError: the shapes do not fit together, labels are not integers, an option is out of range, or
        `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: Cut Cross-Entropy, arXiv 2411.09009; z-loss arXiv 2204.02311, section 5; soft cap arXiv 2408.00118.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: x {x.shape}, w {w.shape} and labels {labels.shape} do not fit; give x as (R, D), "
            "w as (D, V), labels as (R,)."
        )
    if not jax.numpy.issubdtype(labels.dtype, jax.numpy.integer):
        raise ValueError(f"linear_cross_entropy: labels are {labels.dtype}; give class indices as int32.")
    if z_loss < 0 or (logit_softcap is not None and logit_softcap <= 0):
        raise ValueError(
            f"linear_cross_entropy: {z_loss=} and {logit_softcap=}; give a z_loss of 0 or more, and a positive "
            "soft cap or None."
        )
    static = {"ignore_index": ignore_index, "z_loss": z_loss, "logit_softcap": logit_softcap}
    return LINEAR_CROSS_ENTROPY(x, w, labels, implementation=implementation, **static)
