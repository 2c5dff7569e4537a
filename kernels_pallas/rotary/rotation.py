"""By how much the pairs of a head turn at each token: every form of rotary position is a constructor of this."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine for each pair of a head's elements, float32 (B or 1, T, H/2): one row serves all examples.

    Which two elements make a pair is the caller's `interleaved`.
    """

    cos: Any
    sin: Any

    @classmethod
    def of(cls, positions: Num[Array, "M T A"], widths: Sequence[int], *, theta: float = 1e4) -> "Rotation":
        """From a position on each of A axes: `widths[a]` of the head's elements turn with axis a, the first with 0.

        Pair i of an axis that has n turns by position * theta^(-i / n). A token at 0 on all axes is left as it is: so
        are text and class tokens before an image.

        Raises:
          ValueError: a width is odd, or there are not as many as axes.

        Source: RoPE, arXiv 2104.09864, equation 15; by axes, arXiv 2403.13298, section 3.2.
        """
        if len(widths) != positions.shape[-1] or any(width % 2 for width in widths):
            raise ValueError(
                f"Rotation: widths {tuple(widths)} do not fit positions {positions.shape}; "
                f"give an even number for each of {positions.shape[-1]} axes."
            )
        pairs = [width // 2 for width in widths]
        frequency = np.concatenate([theta ** (-np.arange(n) / n) for n in pairs])
        wide = jnp.asarray(positions, jnp.float32)
        angles = jnp.repeat(wide, np.array(pairs), axis=-1, total_repeat_length=sum(pairs)) * frequency
        return cls(jnp.cos(angles), jnp.sin(angles))

    @classmethod
    def grid(cls, sides: Sequence[int], head_width: int, *, prefix: int = 0, theta: float = 1e4) -> "Rotation":
        """Of the tokens of a line, an image or a video, row-major: `sides` (T,), (h, w) or (frames, h, w).

        Every axis has as many of the head's elements, the first one what is left over. `prefix` tokens before them
        are left as they are.

        Raises:
          ValueError: the head is too narrow for so many axes, or odd.
        """
        each = head_width // (2 * len(sides)) * 2
        if each == 0 or head_width % 2:
            raise ValueError(
                f"Rotation: {len(sides)} axes need an even head of {2 * len(sides)} or more, got {head_width}."
            )
        positions = np.stack(np.unravel_index(np.arange(np.prod(sides)), tuple(sides)), axis=-1)
        positions = np.pad(positions, [(prefix, 0), (0, 0)])
        first = head_width - each * (len(sides) - 1)
        return cls.of(jnp.asarray(positions[None]), (first, *[each] * (len(sides) - 1)), theta=theta)
