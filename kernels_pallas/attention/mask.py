"""Attention masks (causal, sliding window, padding, packed documents, mixed) as vectors of O(T + S) memory.

    key s is visible to query t  iff  start[t] <= s < end[t]  and  (k_private[s] == 0 or k_private[s] == q_private[t])

A key range per query expresses full, causal, sliding-window and padding masks, packed documents, and causal text with
bidirectional images. Private numbers hide keys from all queries but those with the same number, for example the noised
copy of an image, which the tokens after the image must not see.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import arguments
from ..arguments import known


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """An attention mask for all heads. M is the batch size, or 1 for a mask that all examples share.

    `kind` is the name of the constructor, or "custom". It selects tuned block sizes and cuDNN's own causal mask, and
    does not change the result. `num_keys` is S.

    Values that break a rule of a constructor or of the vectors raise ValueError if they are known. Under jit they are
    not: then lengths and ranges are cut to the keys that exist; an id that returns after other ids is another document
    or image; an image ends where its document does; and a key with a private number below 0 is visible to no query.
    """

    start: Any  # int32 (M, T): the first key in the range of each query
    end: Any  # int32 (M, T): one past the last key of the range; empty if start == end
    q_private: Any = None  # int32 (M, T) >= 0, or None if no key is private
    k_private: Any = None  # int32 (M, S) >= 0; 0 means public
    num_keys: int = 0
    kind: str = "custom"

    @classmethod
    def full(cls, num_queries: int, num_keys: int | None = None) -> "AttentionMask":
        """Every key is visible to every query: the same as mask=None."""
        T, S = _lengths("full", num_queries, num_keys)
        return _ranges(np.zeros(T), np.full(T, S), S, "full")

    @classmethod
    def causal(cls, num_queries: int, num_keys: int | None = None) -> "AttentionMask":
        """Query t sees keys s <= t + S - T: the last query sees every key; if T > S, the first T - S see none."""
        T, S = _lengths("causal", num_queries, num_keys)
        return _ranges(np.zeros(T), np.arange(T) + (S - T + 1), S, "causal")

    @classmethod
    def sliding_window(
        cls, num_queries: int, num_keys: int | None = None, *, left: int, right: int = 0
    ) -> "AttentionMask":
        """Query t sees keys t' - left to t' + right, both included, where t' = t + S - T.

        right = 0 gives a causal window, left = right a centred one.
        """
        whole = -arguments.LARGEST, arguments.LARGEST
        left, right = (
            arguments.whole_number("AttentionMask.sliding_window", name, x, *whole)
            for name, x in (("left", left), ("right", right))
        )
        if left < 0 or right < 0:
            raise ValueError(f"AttentionMask.sliding_window: left and right must be >= 0, got {left} and {right}.")
        T, S = _lengths("sliding_window", num_queries, num_keys)
        position = np.arange(T) + (S - T)
        return _ranges(position - left, position + (right + 1), S, "sliding_window")

    @classmethod
    def padding(cls, key_lengths, num_queries: int, num_keys: int | None = None, *, query_lengths=None):
        """Padding mask: example b has key_lengths[b] keys; queries from query_lengths[b] on, if given, see none.

        Args:
          key_lengths, query_lengths: integers, (B,), at most S and at most T. Under jit they are cut to 0, ..., S or T.
        """
        num_queries, S = _lengths("padding", num_queries, num_keys)
        key_lengths = _integers("padding", key_lengths=key_lengths, ndim=1)
        _require(key_lengths, lambda n: (n >= 0) & (n <= S), "padding", "key_lengths", f"between 0 and S = {S}")
        key_lengths = arguments.int32("AttentionMask.padding", "key_lengths", key_lengths, 0, S)
        end = jnp.broadcast_to(key_lengths[:, None], (len(key_lengths), num_queries))
        if query_lengths is not None:
            query_lengths = _integers("padding", query_lengths=query_lengths, ndim=1)
            rule = f"between 0 and T = {num_queries}"
            _require(query_lengths, lambda n: (n >= 0) & (n <= num_queries), "padding", "query_lengths", rule)
            _same_shape("padding", key_lengths=key_lengths, query_lengths=query_lengths)
            end = jnp.where(jnp.arange(num_queries)[None] < query_lengths[:, None], end, 0)
        return cls(jnp.zeros_like(end), end, num_keys=S, kind="padding")

    @classmethod
    def packed(cls, documents, *, causal: bool = False) -> "AttentionMask":
        """Packed documents: each token sees its own document, or with `causal` the document up to itself.

        Args:
          documents: integers, (M, T): the document of each token. The tokens of a document must be contiguous. Negative
            numbers are padding tokens, which see no key and are visible to no query.
        """
        documents = _integers("packed", documents=documents, ndim=2)
        causal = arguments.flag("AttentionMask.packed", "causal", causal)
        _require_runs("packed", documents=documents)
        start, end = _runs(documents)
        end = _own(documents) + 1 if causal else end
        return cls(*_or_nothing(documents >= 0, start, end), num_keys=documents.shape[1], kind="packed")

    @classmethod
    def mixed(cls, spans) -> "AttentionMask":
        """Causal text with bidirectional images: a token of an image sees all earlier tokens and the whole image.

        Args:
          spans: integers, (M, T): the image of each token, negative for text. The tokens of an image must be
            contiguous.
        """
        spans = _integers("mixed", spans=spans, ndim=2)
        _require_runs("mixed", spans=spans)
        end = jnp.where(spans >= 0, _runs(spans)[1], _own(spans) + 1)
        return cls(jnp.zeros_like(end), end, num_keys=spans.shape[1], kind="mixed")

    @classmethod
    def unified(cls, documents, spans, noise) -> "AttentionMask":
        """`mixed` inside packed documents, where noised images are visible only to their own tokens.

        An image that is generated and used as context appears twice: as a noised copy, which only its own tokens see,
        and as a clean copy, which all later tokens of the document see.

        Args:
          documents, spans: as for `packed` and `mixed`; a span must lie in one document.
          noise: booleans, (M, T): true for the tokens of noised copies; constant inside each span.

        Source: BAGEL, https://arxiv.org/abs/2505.14683, section 2 (generalised causal attention).
        """
        documents = _integers("unified", documents=documents, ndim=2)
        spans = _integers("unified", spans=spans, ndim=2)
        noise = noise if isinstance(noise, jax.Array) else np.asarray(noise)
        if noise.dtype != bool:
            raise ValueError(f"AttentionMask.unified: noise must be booleans (1 or B, T), got {noise.dtype}.")
        _same_shape("unified", documents=documents, spans=spans, noise=noise)
        _require_runs("unified", documents=documents, spans=spans)
        _require(jnp.where(noise, spans, 0), lambda n: n >= 0, "unified", "spans", ">= 0 where noise is true")
        for name, other in (("documents", documents), ("noise", noise)):
            whole = (spans[:, 1:] < 0) | (spans[:, 1:] != spans[:, :-1]) | (other[:, 1:] == other[:, :-1])
            _require(whole, lambda same: same, "unified", name, "constant inside each span")
        start, last = _runs(documents)
        first, end = _runs(spans)
        end = jnp.where(spans >= 0, jnp.minimum(end, last), _own(spans) + 1)
        start, end = _or_nothing(documents >= 0, start, end)
        private = jnp.where(noise & (spans >= 0), first + 1, 0)
        return cls(start, end, private, private, num_keys=documents.shape[1], kind="unified")

    @property
    def num_queries(self) -> int:
        return self.start.shape[1]

    def dense(self) -> jax.Array:
        """The dense mask, bool (M, T, S): true if key s is visible to query t. For tests and other libraries."""
        key = jnp.arange(self.num_keys, dtype=jnp.int32)[None, None]
        seen = (jnp.asarray(self.start)[:, :, None] <= key) & (key < jnp.asarray(self.end)[:, :, None])
        if self.k_private is None:
            return seen
        k_private, q_private = jnp.asarray(self.k_private)[:, None, :], jnp.asarray(self.q_private)[:, :, None]
        return seen & ((k_private == 0) | (k_private == q_private))


jax.tree_util.register_dataclass(
    AttentionMask,
    data_fields=("start", "end", "q_private", "k_private"),
    meta_fields=("num_keys", "kind"),
)


def settled(mask: AttentionMask, num_keys: int) -> AttentionMask:
    """The mask with int32 vectors; those that are not known are cut to the range that `misfit` wants of known ones."""

    def vector(name: str, most: int, outside: int | None = None):
        x: Any = getattr(mask, name)
        if x is None or (known(x) and x.dtype == np.int32):
            return x
        if known(x):
            return np.asarray(x).astype(np.int32)
        return arguments.int32("AttentionMask", name, x, 0, most, outside=outside)

    most = arguments.LARGEST - 2
    return dataclasses.replace(
        mask,
        start=vector("start", num_keys),
        end=vector("end", num_keys),
        q_private=vector("q_private", most, outside=most + 1),  # sees public keys only
        k_private=vector("k_private", most, outside=most + 2),  # visible to no query
    )


def misfit(mask: Any, batch: int, num_queries: int, num_keys: int) -> str | None:
    """The reason why a mask does not fit queries (B, T) and keys (B, S), for an error message; None if it fits."""
    if not isinstance(mask, AttentionMask):
        return f"mask must be an AttentionMask, got {arguments.kind_of(mask)}; use a constructor of AttentionMask"
    if mask.num_keys != num_keys:
        return f"the mask has num_keys = {mask.num_keys}, but k has S = {num_keys} keys; make the mask for this S"
    for name in ("start", "end", "q_private", "k_private"):
        array: Any = getattr(mask, name)
        if array is None and name.endswith("private"):
            continue
        if not isinstance(array, arguments.ARRAYS):
            return f"mask.{name} must be an array of integers, got {arguments.kind_of(array)}"
        length = num_keys if name == "k_private" else num_queries
        if not jnp.issubdtype(array.dtype, jnp.integer):
            return f"mask.{name} must be integers, got {array.dtype}"
        if array.ndim != 2 or array.shape[0] not in (1, batch) or array.shape[1] != length:
            return f"mask.{name} must be (1 or {batch}, {length}), got {array.shape}"
    if (mask.q_private is None) != (mask.k_private is None):
        return "mask.q_private and mask.k_private must both be given, or neither"
    values = known(mask.start) and known(mask.end)
    if values and np.any(np.asarray(mask.start) > np.asarray(mask.end)):
        return "mask.start must be <= mask.end, got a query whose range starts after it ends"
    if values and (np.any(np.asarray(mask.start) < 0) or np.any(np.asarray(mask.end) > num_keys)):
        return f"mask.start and mask.end must lie between 0 and S = {num_keys}"
    for name in ("q_private", "k_private"):
        array = getattr(mask, name)
        if array is not None and known(array) and not 0 <= np.min(array) <= np.max(array) <= arguments.LARGEST - 2:
            return f"mask.{name} must be from 0 to {arguments.LARGEST - 2}, got {np.min(array)} to {np.max(array)}"
    return None


def row_of(array, batch):
    """The row of a mask's array for an example, in a kernel; 0 if all examples share one row."""
    return jnp.int32(0) if array.shape[0] == 1 else batch


def _ranges(start, end, num_keys: int, kind: str) -> AttentionMask:
    """A mask that all examples share, with its ranges clipped to the keys."""
    start, end = (np.clip(x, 0, num_keys).astype(np.int32)[None] for x in (start, end))
    return AttentionMask(start, end, num_keys=num_keys, kind=kind)


def _own(ids):
    """The position of each token."""
    return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)


def _runs(ids):
    """(start, end) of the run of equal ids that each token is in."""
    edge = jnp.ones_like(ids[:, :1], bool)
    changes = ids[:, 1:] != ids[:, :-1]
    first = jnp.concatenate([edge, changes], axis=1)
    last = jnp.concatenate([changes, edge], axis=1)
    start = jax.lax.cummax(jnp.where(first, _own(ids), 0), axis=1)
    end = jax.lax.cummin(jnp.where(last, _own(ids) + 1, ids.shape[1]), axis=1, reverse=True)
    return start, end


def _or_nothing(sees, start, end):
    """The range where `sees` is true, an empty range elsewhere."""
    return jnp.where(sees, start, 0), jnp.where(sees, end, 0)


# Checks of the arguments of the constructors. Values are checked if they are known, which those of a tracer are not.


def _integers(constructor: str, *, ndim: int, **named) -> Any:
    [(name, array)] = named.items()
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.ndim != ndim or not jnp.issubdtype(array.dtype, jnp.integer):
        shape, given = "(B,)" if ndim == 1 else "(1 or B, T)", jax.dtypes.canonicalize_dtype(array.dtype)
        raise ValueError(f"AttentionMask.{constructor}: {name} must be integers {shape}, got {given} {array.shape}.")
    if array.size == 0:
        raise ValueError(f"AttentionMask.{constructor}: {name} is {array.shape}; it must not be empty.")
    if known(array) or array.dtype.itemsize < 4:
        _require(array, lambda n: abs(n.astype(np.float64)) <= arguments.LARGEST, constructor, name, "within int32")
        return jnp.asarray(array, jnp.int32)
    return array


def _lengths(constructor: str, num_queries, num_keys) -> tuple[int, int]:
    """(T, S); S is T if `num_keys` is None."""
    name = f"AttentionMask.{constructor}"
    T = arguments.whole_number(name, "num_queries", num_queries, 1, arguments.LARGEST)
    return T, T if num_keys is None else arguments.whole_number(name, "num_keys", num_keys, 1, arguments.LARGEST)


def _require(array, rule: Callable, constructor: str, name: str, wanted: str) -> None:
    if known(array) and not np.all(rule(np.asarray(array))):
        wrong = np.asarray(array)[~rule(np.asarray(array))]
        got = "" if wrong.dtype == bool else f", got {wrong[0]}"
        raise ValueError(f"AttentionMask.{constructor}: {name} must be {wanted}{got}.")


def _require_runs(constructor: str, **named) -> None:
    """Raises ValueError if the tokens of an id >= 0 are not contiguous."""
    for name, ids in named.items():
        if not known(ids):
            continue
        for row in np.asarray(ids):
            heads = row[np.flatnonzero(np.diff(row, prepend=row[:1] - 1))]
            values, counts = np.unique(heads[heads >= 0], return_counts=True)
            if np.any(counts > 1):
                twice = values[counts > 1][0]
                raise ValueError(
                    f"AttentionMask.{constructor}: {name} must have each id in one contiguous run, got {twice} in "
                    f"{counts.max()} runs; sort the tokens or give each run its own id."
                )


def _same_shape(constructor: str, **named) -> None:
    shapes = {name: array.shape for name, array in named.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"AttentionMask.{constructor}: arrays must have one shape, got {listed}.")
