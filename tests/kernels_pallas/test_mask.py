"""Attention masks: each constructor against its definition in words, what it refuses, and the tiles a mask leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionMask, flash_attention
from kernels_pallas.attention import tiles


pytestmark = pytest.mark.recorded


def truth(rule, T, S, M=1):
    """bool (M, T, S) by asking `rule(m, t, s)` of each pair."""
    return np.array([[[bool(rule(m, t, s)) for s in range(S)] for t in range(T)] for m in range(M)])


DOCUMENTS = np.array([[0, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, -1, -1]])
SPANS = np.array([[-1, 0, 0, 0, -1, -1, 1, 1, 1, 2, 2, 2, -1, -1, -1, -1]])
NOISE = SPANS == 1
TOKENS = DOCUMENTS.shape[1]


def same_document(t, s):
    return DOCUMENTS[0, t] == DOCUMENTS[0, s] >= 0


def same_span(t, s):
    return SPANS[0, t] == SPANS[0, s] >= 0


def hidden(t, s):
    return NOISE[0, s] and SPANS[0, t] != SPANS[0, s]


CONSTRUCTED = {
    "full": (AttentionMask.full(5, 7), lambda m, t, s: True),
    "causal": (AttentionMask.causal(7), lambda m, t, s: s <= t),
    "causal, more keys": (AttentionMask.causal(5, 9), lambda m, t, s: s <= t + 4),
    "causal, fewer keys": (AttentionMask.causal(9, 5), lambda m, t, s: s <= t - 4),
    "left window": (AttentionMask.sliding_window(9, left=2), lambda m, t, s: t - 2 <= s <= t),
    "centred window": (AttentionMask.sliding_window(9, left=2, right=2), lambda m, t, s: abs(t - s) <= 2),
    "window, fewer keys": (AttentionMask.sliding_window(9, 5, left=1), lambda m, t, s: t - 5 <= s <= t - 4),
    "padding": (AttentionMask.padding(np.array([3, 0, 6]), 4, 6), lambda m, t, s: s < (3, 0, 6)[m]),
    "padding of both": (
        AttentionMask.padding(np.array([3, 5]), 4, 6, query_lengths=np.array([4, 1])),
        lambda m, t, s: s < (3, 5)[m] and t < (4, 1)[m],
    ),
    "packed": (AttentionMask.packed(DOCUMENTS), lambda m, t, s: same_document(t, s)),
    "packed, causal": (AttentionMask.packed(DOCUMENTS, causal=True), lambda m, t, s: same_document(t, s) and s <= t),
    "mixed": (AttentionMask.mixed(SPANS), lambda m, t, s: s <= t or same_span(t, s)),
    "unified": (
        AttentionMask.unified(DOCUMENTS, SPANS, NOISE),
        lambda m, t, s: same_document(t, s) and (s <= t or same_span(t, s)) and not hidden(t, s),
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_constructor_says_who_sees_whom(name):
    mask, rule = CONSTRUCTED[name]
    M, T = mask.start.shape
    np.testing.assert_array_equal(mask.dense(), truth(rule, T, mask.num_keys, M))


@pytest.mark.parametrize("build", [AttentionMask.packed, AttentionMask.mixed], ids=["packed", "mixed"])
def test_constructors_can_be_traced(build):
    ids = jnp.asarray(SPANS)
    for mine, theirs in zip(jax.tree.leaves(jax.jit(build)(ids)), jax.tree.leaves(build(ids)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


REFUSED = {
    "left and right must be >= 0, got -1 and 0": lambda: AttentionMask.sliding_window(5, left=-1),
    "key_lengths must be between 0 and S = 4, got 9": lambda: AttentionMask.padding(np.array([1, 9]), 4),
    "query_lengths must be between 0 and T = 4, got -1": lambda: AttentionMask.padding(
        np.array([1]), 4, query_lengths=np.array([-1])
    ),
    "key_lengths (2,), query_lengths (1,)": lambda: AttentionMask.padding(
        np.array([1, 2]), 4, query_lengths=np.array([1])
    ),
    "key_lengths must be integers (B,), got float32 (1,)": lambda: AttentionMask.padding(np.ones(1, np.float32), 4),
    "documents must be integers (1 or B, T), got int32 (16,)": lambda: AttentionMask.packed(DOCUMENTS[0]),
    "documents must have each id in one contiguous run, got 3 in 2": lambda: AttentionMask.packed([[3, 1, 3]]),
    "spans must have each id in one contiguous run, got 0 in 2": lambda: AttentionMask.mixed([[0, -1, 0]]),
    "spans must be >= 0 where noise is true, got -1": lambda: AttentionMask.unified(DOCUMENTS, SPANS, SPANS == -1),
    "documents must be constant inside each span": lambda: AttentionMask.unified(
        [[0, 0, 1]], [[0, 0, 0]], [[False] * 3]
    ),
    "noise must be constant inside each span": lambda: AttentionMask.unified(
        [[0] * 3], [[0] * 3], [[True, True, False]]
    ),
    "documents (1, 3), spans (1, 16), noise (1, 16)": lambda: AttentionMask.unified([[0, 0, 0]], SPANS, NOISE),
}


@pytest.mark.parametrize("message", REFUSED)
def test_constructors_refuse_in_one_line(message):
    with pytest.raises(ValueError) as refused:
        REFUSED[message]()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def mask_of(start, end, q_private=None, k_private=None, num_keys=5):
    vectors = [None if x is None else np.asarray([x], np.int32) for x in (start, end, q_private, k_private)]
    return AttentionMask(*vectors, num_keys=num_keys)


MISFITS = {
    "mask.start must be <= mask.end": mask_of([0, 3, 0, 0], [5, 2, 5, 5]),
    "mask.start and mask.end must lie between 0 and S = 5": mask_of([0] * 4, [6] * 4),
    "mask.end must be (1 or 2, 4), got (1, 3)": mask_of([0] * 4, [5] * 3),
    "mask.k_private must be (1 or 2, 5), got (1, 4)": mask_of([0] * 4, [5] * 4, [0] * 4, [0] * 4),
    "mask.q_private and mask.k_private must both be given, or neither": mask_of([0] * 4, [5] * 4, [0] * 4),
    "the mask has num_keys = 6, but k has S = 5 keys": AttentionMask.full(4, 6),
    "mask.start must be integers, got float32": AttentionMask(
        np.zeros((1, 4), np.float32), np.ones((1, 4)), num_keys=5
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_mask_of_other_arrays_is_refused_in_one_line(message):
    q, k = jnp.zeros((2, 4, 1, 8)), jnp.zeros((2, 5, 1, 8))
    with pytest.raises(ValueError) as refused:
        flash_attention(q, k, k, mask=MISFITS[message])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def drawn(seed: int, M: int, T: int, S: int) -> AttentionMask:
    """Any mask at all: ranges long and short, in runs or without order, and private tokens in runs."""
    rng = np.random.default_rng(seed)
    start, end = np.sort(rng.integers(0, S + 1, (2, M, T)), axis=0)
    start, end = np.where(rng.random((M, 1)) < 0.5, 0, start), np.where(rng.random((M, 1)) < 0.5, S, end)
    if rng.random() < 0.5:  # as documents have it: long runs of one range
        start, end = (np.repeat(x[:, ::6], 6, axis=1)[:, :T] for x in (start, end))
    private = [None, None]
    if rng.random() < 0.7:
        runs = lambda n: np.repeat(rng.choice([0, 0, 1, 2], (M, n)), rng.integers(1, 7), axis=1)[:, :n]
        private = [runs(T), runs(S)]
    return AttentionMask(*(x if x is None else x.astype(np.int32) for x in (start, end, *private)), num_keys=S)


@pytest.mark.parametrize("blocks", [(2, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize("shape", [(1, 24, 24), (2, 19, 13)])
def test_tiles_seen_whole_need_no_mask_and_hidden_tiles_have_nothing(shape, blocks):
    for seed in range(60):
        check_tiles(drawn(seed, *shape), *blocks)


def check_tiles(mask, block_q, block_k):
    dense = np.asarray(mask.dense())
    by_query, by_key = (of(mask, block_q, block_k) for of in (tiles.key_tiles, tiles.query_tiles))
    classes = {}
    for lists, transposed in ((by_query, False), (by_key, True)):
        order, whole, seen = (np.asarray(x) for x in (lists.order, lists.whole, lists.seen))
        for m, row in np.ndindex(whole.shape):
            assert sorted(order[m, row]) == list(range(order.shape[2]))
            for place, column in enumerate(order[m, row]):
                i, j = (column, row) if transposed else (row, column)
                kind = "whole" if place < whole[m, row] else "part" if place < seen[m, row] else "hidden"
                assert classes.setdefault((m, i, j), kind) == kind, "rows and columns disagree"
    for (m, i, j), kind in classes.items():
        tile = dense[m, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        if kind == "whole":
            assert tile.all() and tile.shape[1] == block_k, "keys past the edge are not there to be seen"
        if kind == "hidden":
            assert not tile.any()
        if mask.k_private is None and tile.all() and tile.shape[1] == block_k:
            assert kind == "whole", "a range that covers a tile is found"


def test_tiles_of_hidden_copies_are_skipped():
    """Where it matters: text after a noised image does not walk the image's tiles."""
    spans = np.repeat([-1, 0, 1, -1], [16, 64, 64, 64])[None]
    mask = AttentionMask.unified(np.zeros_like(spans), spans, spans == 0)
    lists = tiles.key_tiles(mask, 16, 16)
    walked = np.asarray(lists.order[0, -1, : lists.seen[0, -1]])  # the last text
    assert sorted(walked) == [0, *range(5, 13)]
    assert int(lists.whole[0, 1]) == 5  # the noised copy sees the text and itself, all of it whole


def test_queries_that_see_nothing_stretch_no_range():
    """Padding at the end of a block does not make the block walk from the first key."""
    documents = np.repeat([0, 1, -1], [32, 8, 8])[None]
    lists = tiles.key_tiles(AttentionMask.packed(documents), 16, 8)
    assert [sorted(np.asarray(lists.order[0, i, : lists.seen[0, i]]).tolist()) for i in range(3)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [4],
    ]
