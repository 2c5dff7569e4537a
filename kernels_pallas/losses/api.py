"""The public function `linear_cross_entropy` and the table of its implementations."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import arguments
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
    If it holds NaN or inf, its lse is NaN, and it has no gradient and no influence on other rows. All other labels must
    be in [0, V). Under jit, where labels are not known, a label outside this range counts as `ignore_index`. `lse` is
    differentiable too. `z_loss` and `logit_softcap` are numbers known before jit.

    Raises:
      ValueError: the shapes or dtypes do not fit together, labels are not integers or known and out of range, an option
        is out of range, or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: Cut Cross-Entropy, arXiv 2411.09009; z-loss arXiv 2204.02311, section 5; soft cap arXiv 2408.00118.
    """
    name = "linear_cross_entropy"
    x, w = arguments.floats(name, x=x, w=w)
    [labels] = arguments.arrays(name, labels=labels)
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: x {x.shape}, w {w.shape} and labels {labels.shape} do not fit; give x as (R, D), "
            "w as (D, V), labels as (R,)."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"linear_cross_entropy: labels are {labels.dtype}; give class indices as int32.")
    z_loss = arguments.number(name, "z_loss", z_loss, "add its product with lse**2 to the loss", low=0)
    if logit_softcap is not None:
        logit_softcap = arguments.number(
            name, "logit_softcap", logit_softcap, "a learned cap is not supported", above=0
        )
    ignore_index = arguments.whole_number(name, "ignore_index", ignore_index, -arguments.LARGEST, arguments.LARGEST)
    labels = _labels(labels, w.shape[1], ignore_index)
    dead = (labels == ignore_index) & ~jnp.all(jnp.isfinite(x), axis=1)
    x = jnp.where(dead[:, None], jnp.zeros((), x.dtype), x)
    static = {"ignore_index": ignore_index, "z_loss": z_loss, "logit_softcap": logit_softcap}
    loss, lse = LINEAR_CROSS_ENTROPY(x, w, labels, implementation=implementation, **static)
    return loss, jnp.where(dead, jnp.nan, lse)


def _labels(labels, classes: int, ignore_index: int):
    """The labels as int32; `ignore_index` in place of those that are not known and out of range."""
    name, wanted = "linear_cross_entropy", f"0 to {classes - 1} or ignore_index = {ignore_index}"
    low, high = min(ignore_index, 0), max(ignore_index, classes - 1)
    labels = arguments.int32(name, "labels", labels, low, high, outside=ignore_index, wanted=wanted)
    if arguments.known(labels):
        ignored = np.asarray(labels) == ignore_index
        arguments.int32(name, "labels", np.where(ignored, 0, labels), 0, classes - 1, wanted=wanted)
        return labels
    return jnp.where((labels < 0) | (labels >= classes), jnp.int32(ignore_index), labels)
