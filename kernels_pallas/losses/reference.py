"""Reference implementation of linear cross-entropy in jnp; also implementation="xla"."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear_cross_entropy(
    x: Float[Array, "R D"],
    w: Float[Array, "D V"],
    labels: Int[Array, " R"],
    *,
    ignore_index: int,
    z_loss: float,
    logit_softcap: float | None,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """The cross-entropy and the logsumexp of each row, in float32, with all R x V logits in memory."""
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    counts = labels != ignore_index
    label = jnp.where(counts, labels, 0)[:, None]
    loss = lse - jnp.take_along_axis(logits, label, axis=1)[:, 0] + z_loss * jnp.square(lse)
    return jnp.where(counts, loss, 0), lse
