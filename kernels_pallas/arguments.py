"""Checks of the arguments of public functions: arrays, integers with a range, and numbers; each error is one line.

A value that breaks a contract is an error where it is known. Under jit it is not known; then `int32` replaces it by one
that is safe, before an implementation is chosen, so that all implementations agree.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer


ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
LARGEST = 2**31 - 1


def known(array) -> bool:
    """Whether the values of an array are known: false while tracing and for arrays in another host's memory."""
    return not isinstance(array, Tracer | jax.ShapeDtypeStruct) and getattr(array, "is_fully_addressable", True)


def arrays(function: str, *, optional: tuple[str, ...] = (), **named) -> list[Any]:
    """The arguments as JAX arrays; those named in `optional` may be None.

    Raises:
      ValueError: an argument is no array of JAX or NumPy.
    """
    found = []
    for name, x in named.items():
        if not (x is None and name in optional or isinstance(x, ARRAYS) or hasattr(x, "__jax_array__")):
            raise ValueError(f"{function}: {name} must be an array, got {kind_of(x)}; convert it with jnp.asarray.")
        host = isinstance(x, np.ndarray | np.generic) or hasattr(x, "__jax_array__")
        found.append(jnp.asarray(x) if host and not _wide(x) else x)
    return found


def kind_of(x) -> str:
    """What an argument is, for an error message: "None", "an array", "a list"."""
    return "None" if x is None else "an array" if isinstance(x, ARRAYS) else f"a {type(x).__name__}"


def floats(function: str, *, optional: tuple[str, ...] = (), **named) -> list[Any]:
    """As `arrays`; each must also be of a floating-point dtype, with no dimension of size 0.

    Raises:
      ValueError: an argument is no array of floating-point numbers, or it is empty.
    """
    found = arrays(function, optional=optional, **named)
    for name, x in zip(named, found, strict=True):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{function}: {name} must be of a floating-point dtype, got {x.dtype}; cast it.")
    nonempty(function, **dict(zip(named, found, strict=True)))
    return found


def nonempty(function: str, **named) -> None:
    """Raises ValueError if an array has a dimension of size 0."""
    for name, x in named.items():
        if x is not None and 0 in x.shape:
            raise ValueError(f"{function}: {name} is {x.shape}; it must have no dimension of size 0.")


def integers(function: str, name: str, x, *, ndim: int | None = None) -> Any:
    """The argument as an array of integers; booleans are none.

    Raises:
      ValueError: it is no array of integers, or it has another number of dimensions.
    """
    [x] = arrays(function, **{name: x})
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{function}: {name} must be integers, got {x.dtype}; cast them to int32.")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{function}: {name} must have {ndim} dimensions, got {x.shape}.")
    return x


def int32(function: str, name: str, x, low: int, high: int, *, outside: int | None = None, wanted: str = "") -> Any:
    """Integers as int32 within low, ..., high, whatever their dtype.

    Args:
      outside: replaces a value out of this range that is not known; None: the nearest value in the range does.
      wanted: says the range in the error, if its two numbers do not.

    Raises:
      ValueError: it is no array of integers, or a known value is out of range.
    """
    x = integers(function, name, x)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.int32)
    if known(x):
        values = np.asarray(x)
        wrong = np.argwhere((values < low) | (values > high))
        if len(wrong):
            place = tuple(int(i) for i in wrong[0])
            at = f" at {list(place)}" if place else ""
            raise ValueError(f"{function}: {name} must be {wanted or f'{low} to {high}'}, got {values[place]}{at}.")
        return x if isinstance(x, jax.Array) and x.dtype == jnp.int32 else jnp.asarray(values.astype(np.int32))
    x = x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
    least, most = max(low, int(jnp.iinfo(x.dtype).min)), min(high, int(jnp.iinfo(x.dtype).max))
    least, most = (np.array(bound, x.dtype) for bound in (least, most))
    clipped = jnp.clip(x, least, most).astype(jnp.int32)
    if outside is None:
        return clipped
    return jnp.where((x < least) | (x > most), jnp.int32(outside), clipped)


def sizes(function: str, name: str, x, total: int) -> Any:
    """The sizes of consecutive groups that share `total` rows, int32; not known, groups past the rows are cut short.

    Raises:
      ValueError: they are no integers, or known and negative or with a sum above `total`.
    """
    x = int32(function, name, x, 0, total)
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if known(x):
        if (given := int(np.asarray(x).sum(dtype=np.int64))) > total:
            raise ValueError(f"{function}: {name} must have a sum of at most {total}, the number of rows, got {given}.")
        return x
    if x.size * total <= LARGEST:
        ends = jnp.minimum(lax.cumsum(x), jnp.int32(total))
    else:  # a sum that stops at the total instead of overflowing
        ends = lax.associative_scan(lambda a, b: jnp.minimum(a, jnp.int32(total) - b) + b, x)
    return jnp.diff(ends, prepend=jnp.zeros((1,), jnp.int32))


def shape(function: str, name: str, value) -> tuple[int, ...]:
    """A shape as a tuple of ints. Raises ValueError if it is anything else."""
    if not isinstance(value, tuple | list):
        raise ValueError(f"{function}: {name} must be a tuple of integers, got {_short(value)}.")
    return tuple(whole_number(function, name, size, 0) for size in value)


def start(function: str, x, shard: tuple[int, ...], whole: tuple[int, ...]) -> tuple[Any, Any]:
    """(start, inside) of a shard in an array of shape `whole`; `inside` says whether it lies inside, None if it does.

    A start that is not known is cut so that the shard lies inside; then `inside` is a boolean array.

    Raises:
      ValueError: it is not one integer per dim, or a known one lets the shard reach out of the array.
    """
    if x is None:
        return jnp.zeros(len(shard), jnp.int32), None
    x = integers(function, "start", x)
    if x.shape != (len(shard),):
        raise ValueError(f"{function}: start must be one number per dim, ({len(shard)},), got {x.shape}.")
    room = np.minimum(np.subtract(whole, shard), LARGEST)
    if known(x):
        values = np.asarray(x)
        if np.any((values < 0) | (values > room)):
            raise ValueError(
                f"{function}: the shard is not inside the whole array: {shard} at start {values.tolist()} of {whole}."
            )
        return jnp.asarray(values.astype(np.int32)), None
    at = int32(function, "start", x, 0, LARGEST, outside=-1)
    inside = jnp.all((at >= 0) & (at <= jnp.asarray(room, jnp.int32)))
    return jnp.clip(at, 0, jnp.asarray(room, jnp.int32)), inside


def number(
    function: str,
    name: str,
    value: Any,
    instead: str,
    *,
    above: float | int | None = None,
    low: float | int | None = None,
) -> Any:
    """A Python number that is known when the function is traced; arrays of one known number are converted.

    Args:
      instead: what to do with a traced number, such as a learned temperature.
      above, low: exclusive and inclusive lower bounds.

    Raises:
      ValueError: it is traced, no finite number, or out of range.
    """
    if isinstance(value, Tracer):
        raise ValueError(f"{function}: {name} must be a number that is known before jit, got a traced one; {instead}.")
    given = value
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        value = value.item() if value.size == 1 else None
    bound = f" above {above:g}" if above is not None else f" of {low:g} or more" if low is not None else ""
    good = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not good or above is not None and not value > above or low is not None and not value >= low:
        said = _short(given)
        raise ValueError(f"{function}: {name} must be a finite number{bound}, got {said}.")
    return value


def whole_number(function: str, name: str, value, low: int, high: int | None = None) -> int:
    """An integer that is known when the function is traced, such as a capacity, from `low` to `high`.

    Raises:
      ValueError: it is traced, no integer, or out of range.
    """
    if isinstance(value, Tracer):
        raise ValueError(f"{function}: {name} must be an integer that is known before jit, got a traced one.")
    given = value
    try:
        value = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        value = None
    if value is None or value < low or high is not None and value > high:
        bound = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{function}: {name} must be an integer, {bound}, got {_short(given)}.")
    return value


def flag(function: str, name: str, value) -> bool:
    """A Python bool. Raises ValueError if it is anything else."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{function}: {name} must be True or False, got {_short(value)}.")
    return bool(value)


def _short(value) -> str:
    text = f"an array {value.shape}" if getattr(value, "ndim", 0) else repr(value).splitlines()[0]
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def _wide(x) -> bool:
    """Whether JAX would cut the values of a NumPy array to 32 bits: then `int32` looks at them first."""
    return isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "iu" and x.dtype.itemsize == 8
