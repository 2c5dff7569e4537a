"""The rotation angles of RoPE for each token: `Rotation`, with constructors for 1D, 2D and 3D positions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from .. import arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """The cosine and sine of the angle of each pair of a head's elements, float32 (B, T, H/2), or (1, T, H/2) if all
    examples share them.

    The argument `interleaved` of `qk_norm_rope` decides which two elements form a pair.
    """

    cos: Any
    sin: Any

    @classmethod
    def of(cls, positions: Num[Array, "M T A"], widths: Sequence[int], *, theta: float = 1e4) -> "Rotation":
        """Axial RoPE from positions on A axes: the first widths[0] elements of a head rotate with axis 0, and so on.

        Pair i of an axis with n pairs rotates by the angle position * theta^(-i / n). A token at position 0 on all axes
        is not rotated; that is used for text and class tokens before an image.

        Raises:
          ValueError: a width is odd, the number of widths is not the number of axes, or an argument is of another kind.

        Source: RoPE, arXiv 2104.09864, equation 15; by axes, arXiv 2403.13298, section 3.2.
        """
        [positions], name = arguments.arrays("Rotation.of", positions=positions), "Rotation.of"
        widths = arguments.shape(name, "widths", tuple(widths) if isinstance(widths, np.ndarray) else widths)
        theta = arguments.number(name, "theta", theta, "a learned base is not supported", above=0)
        if positions.ndim != 3 or positions.dtype.kind not in "iuf":
            raise ValueError(
                f"{name}: positions must be numbers (1 or B, T, axes), got {positions.dtype} {positions.shape}."
            )
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
        """RoPE of the tokens of a sequence, an image or a video, row-major: `sides` (T,), (h, w) or (frames, h, w).

        Every axis gets the same number of elements; the first axis also gets the remainder. `prefix` tokens before them
        are not rotated.

        Raises:
          ValueError: the head width is odd or too small for the number of axes, or an argument is no such integer.
        """
        name = "Rotation.grid"
        sides = tuple(arguments.whole_number(name, "sides", side, 1) for side in arguments.shape(name, "sides", sides))
        head_width = arguments.whole_number(name, "head_width", head_width, 1)
        theta = arguments.number(name, "theta", theta, "a learned base is not supported", above=0)
        prefix = arguments.whole_number(name, "prefix", prefix, 0)
        if not sides:
            raise ValueError(f"{name}: sides must have one number per axis, got ().")
        each = head_width // (2 * len(sides)) * 2
        if each == 0 or head_width % 2:
            raise ValueError(
                f"Rotation: {len(sides)} axes need an even head of {2 * len(sides)} or more, got {head_width}."
            )
        positions = np.stack(np.unravel_index(np.arange(np.prod(sides)), tuple(sides)), axis=-1)
        positions = np.pad(positions, [(prefix, 0), (0, 0)])
        first = head_width - each * (len(sides) - 1)
        return cls.of(jnp.asarray(positions[None]), (first, *[each] * (len(sides) - 1)), theta=theta)
