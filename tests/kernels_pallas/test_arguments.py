"""What public functions say of arguments that make no sense: a ValueError of one line, for each of their arguments.

The table has one valid call of each function. Every argument is replaced by wrong ones in turn.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import AttentionMask, Rotation, arguments


pytestmark = pytest.mark.usefixtures("unchecked_arrays")

Q, KV, X, U = jnp.ones((2, 4, 2, 8)), jnp.ones((2, 5, 1, 8)), jnp.ones((4, 8)), jnp.ones(8)
TOKENS = jnp.ones((2, 4, 8))
CHOICES = kp.by_index(jnp.array([0, 1, 0, 1]), num_experts=2)
ROUTING = CHOICES.route()
ATTENTION = dict(q=Q, k=KV, v=KV, mask=AttentionMask.full(4, 5), scale=0.5, softcap=30.0, sinks=jnp.zeros(2))
LSE = jnp.zeros((2, 4, 2))
CACHE = dict(scale=0.5, softcap=30.0)
PAGES, TABLE = jnp.ones((3, 16, 1, 8)), jnp.zeros((2, 1), jnp.int32)
MODULATION = dict(scale=jnp.ones((2, 8)), shift=jnp.ones((2, 8)), weight=U, kind="layer", eps=1e-6)
KEY, NONCE = jnp.arange(8, dtype=jnp.uint32), jnp.arange(3, dtype=jnp.uint32)
LOGITS = jnp.ones((4, 6))

CALLS: dict[Any, dict[str, Any]] = {
    kp.flash_attention: ATTENTION | {"return_lse": False},
    kp.flash_attention_jvp: ATTENTION,
    kp.merge_attention: dict(out_a=Q, lse_a=LSE, out_b=Q, lse_b=LSE),
    kp.decode_attention: dict(q=Q[:, 0], k_cache=KV, v_cache=KV, lengths=jnp.array([3, 5])) | CACHE,
    kp.paged_decode_attention: dict(q=Q[:, 0], k_pages=PAGES, v_pages=PAGES, block_table=TABLE,
                                    lengths=jnp.array([3, 5])) | CACHE,
    kp.modulated_norm: dict(x=TOKENS) | MODULATION,
    kp.gated_residual_norm: dict(x=TOKENS, branch=TOKENS, gate=jnp.ones((2, 8))) | MODULATION,
    kp.qk_norm_rope: dict(qkv=jnp.ones((2, 4, 1, 3, 8)), q_weight=U, k_weight=U, rotation=Rotation.grid((4,), 8),
                          interleaved=False, eps=1e-6),
    kp.gated_mlp: dict(x=X, w_gate_up=jnp.ones((8, 2, 4)), w_down=jnp.ones((4, 8)), activation="silu"),
    kp.dense_mlp: dict(x=X, w_up=jnp.ones((8, 4)), b_up=jnp.ones(4), w_down=jnp.ones((4, 8)), b_down=U,
                       activation="silu"),
    kp.dispatch: dict(x=X, routing=ROUTING),
    kp.combine: dict(y=X, routing=ROUTING),
    kp.grouped_matmul: dict(x=X, w=jnp.ones((2, 8, 3)), group_sizes=jnp.array([1, 3])),
    kp.expert_mlp: dict(x=X, routing=ROUTING, w_gate_up=jnp.ones((2, 8, 6)), w_down=jnp.ones((2, 3, 8))),
    kp.linear_cross_entropy: dict(x=X, w=jnp.ones((8, 3)), labels=jnp.array([0, 1, -100, 2]), ignore_index=-100,
                                  z_loss=0.1, logit_softcap=30.0),
    kp.ghost_norm_sq: dict(a=TOKENS, g=TOKENS, groups=jnp.zeros((2, 4), jnp.int32), bias=True),
    kp.clip_reduce: dict(a=TOKENS, g=TOKENS, c=jnp.ones(2)),
    kp.secure_normal: dict(x=X, key=KEY, nonce=NONCE, stddev=1.0, start=jnp.array([0, 0]), whole=(4, 8)),
    kp.state_digest: dict(x=X, start=jnp.array([0, 0]), whole=(4, 8)),
    kp.top_k_softmax: dict(logits=LOGITS, active=2, normalize=True),
    kp.top_k_sigmoid: dict(logits=LOGITS, bias=jnp.zeros(6), active=2, groups=2, active_groups=1, scale=1.0),
    kp.expert_choice: dict(logits=LOGITS, rows=2),
    kp.race: dict(logits=LOGITS, rows=2),
    kp.by_index: dict(index=jnp.array([0, 1, 2, 0]), num_experts=2, weight=jnp.ones(4)),
    kp.softmax_scores: dict(logits=LOGITS),
    kp.sigmoid_scores: dict(logits=LOGITS),
    kp.to_slots: dict(routing=ROUTING, capacity=2),
    kp.in_order: dict(row_index=jnp.arange(4), group_sizes=jnp.array([1, 3]), inverse=jnp.arange(4)),
    kp.expert_load: dict(assignments=CHOICES, probability=jnp.ones((4, 2)), logits=jnp.ones((4, 2))),
    kp.update_bias: dict(bias=jnp.zeros(6), rows=jnp.ones(6), rate=0.1),
    AttentionMask.full: dict(num_queries=4, num_keys=5),
    AttentionMask.causal: dict(num_queries=4, num_keys=5),
    AttentionMask.sliding_window: dict(num_queries=4, num_keys=5, left=1, right=1),
    AttentionMask.padding: dict(key_lengths=jnp.array([1, 2]), num_queries=4, num_keys=5,
                                query_lengths=jnp.array([1, 4])),
    AttentionMask.packed: dict(documents=jnp.array([[0, 0, 1]]), causal=True),
    AttentionMask.mixed: dict(spans=jnp.array([[0, 0, -1]])),
    AttentionMask.unified: dict(documents=jnp.array([[0, 0]]), spans=jnp.array([[0, 0]]), noise=jnp.ones((1, 2), bool)),
    Rotation.of: dict(positions=jnp.ones((1, 4, 1)), widths=(8,), theta=1e4),
    Rotation.grid: dict(sides=(2, 2), head_width=8, prefix=1, theta=1e4),
}  # fmt: skip
ANYTHING = (kp.state_digest, "x"), (kp.update_bias, "rows"), (Rotation.of, "positions")  # take any dtype
SAYS_SO = {AttentionMask.packed, AttentionMask.mixed, AttentionMask.unified, AttentionMask.padding}  # take lists
EMPTY_IS_FINE = {(kp.secure_normal, "x"), (kp.state_digest, "x")}


def name_of(function):
    return function.__qualname__.replace("AttentionMask.", "mask_").replace("Rotation.", "rotation_")


def wrong_ones(function, name, value):
    """Values that are wrong in place of this one, each with what is wrong with it."""
    if isinstance(value, jax.Array):
        yield "a string", "many"
        if function not in SAYS_SO:
            yield "a list", np.asarray(value).tolist()
        if (function, name) not in ANYTHING:
            cast = jnp.float32 if not jnp.issubdtype(value.dtype, jnp.floating) else jnp.int32
            yield "another dtype", value.astype(cast)
            yield "complex", value.astype(jnp.complex64)
            if value.dtype != bool:
                yield "bool", value.astype(bool)
        if (function, name) not in EMPTY_IS_FINE:
            yield "empty", value[..., :0]
        if function is not kp.gated_mlp and function is not kp.dense_mlp or name != "x":
            yield "another rank", jnp.stack([value] * 3)[..., None]
        if (function, name) not in ((kp.state_digest, "x"), (Rotation.of, "positions")):
            yield "a scalar", value.reshape(-1)[0]
    elif isinstance(value, bool):
        yield from (("a number", 2), ("None", None), ("a string", "yes"))
    elif isinstance(value, int | float):
        yield from (("a string", "1"), ("an array", jnp.ones(3)), ("nan", float("nan")), ("a list", [1]))
        if isinstance(value, int):
            yield "a fraction", 1.5
    elif isinstance(value, str):
        yield from (("unknown", "none of these"), ("a number", 3))
    else:  # a structure, or a shape
        yield from (("an array", jnp.ones((4, 4), bool)), ("a string", "full"), ("a list", [[0.5]]), ("a number", 3.5))


TABLE_OF_MISTAKES = [
    pytest.param(function, name, wrong, id=f"{name_of(function)}-{name}-{what}")
    for function, call in CALLS.items()
    for name, value in call.items()
    for what, wrong in wrong_ones(function, name, value)
]


@pytest.mark.parametrize("function", CALLS, ids=name_of)
def test_the_table_has_valid_calls_of_every_argument(function):
    function(**CALLS[function])
    parameters = inspect.signature(function).parameters
    assert set(CALLS[function]) == set(parameters) - {"implementation"}


def test_the_table_has_every_public_function():
    public = {f for n, f in vars(kp).items() if inspect.isfunction(f) and f.__module__.startswith("kernels_pallas")}
    sums = {kp.load_balance_loss, kp.z_loss, kp.profile_range}  # of a Load, and of a name
    assert public - sums <= set(CALLS)
    ops = {op.name for op in kp.OPS} - {"flash_attention_tangent"}
    assert ops <= {f.__name__ for f in CALLS}


@pytest.mark.parametrize("function, name, wrong", TABLE_OF_MISTAKES)
def test_a_wrong_argument_is_one_line(function, name, wrong):
    with pytest.raises(ValueError) as refused:
        function(**CALLS[function] | {name: wrong})
    said = str(refused.value)
    assert "\n" not in said and len(said) < 400
    assert said.partition(":")[0] in (function.__qualname__, function.__name__, "Rotation", "AttentionMask")
    assert "implementation" not in said


@pytest.mark.parametrize("function", [f for f in CALLS if "implementation" in inspect.signature(f).parameters])
@pytest.mark.parametrize("wrong", ["cuda", 3, ["xla"]], ids=str)
def test_an_unknown_implementation_is_one_line(function, wrong):
    with pytest.raises(ValueError, match=r"no implementation=.*; choose from xla"):
        function(**CALLS[function], implementation=wrong)


NUMBERS = [
    pytest.param(function, name, id=f"{name_of(function)}-{name}")
    for function, call in CALLS.items()
    for name, value in call.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
]


@pytest.mark.parametrize("function, name", NUMBERS)
def test_a_traced_number_is_one_line(function, name):
    """A learned temperature, an eps: those that every implementation needs before it is compiled."""
    call = functools.partial(function, **{k: v for k, v in CALLS[function].items() if k != name})
    with pytest.raises(ValueError, match=f"{name} must be an? (number|integer) that is known before jit") as refused:
        jax.jit(lambda x: call(**{name: x}))(1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "function, name", [each for each in NUMBERS if isinstance(CALLS[each.values[0]][each.values[1]], float)]
)
def test_a_known_number_may_be_an_array(function, name):
    call = CALLS[function]
    for array in (jnp.float32(call[name]), np.float64(call[name]), np.array([call[name]])):
        want = function(**call | {name: float(np.asarray(array).item())})
        jax.tree.map(np.testing.assert_array_equal, function(**call | {name: array}), want)


# Integers of any width.


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_integers_are_cut_in_their_own_dtype(dtype):
    """Known, or traced: -1 and 200 are out of 0, ..., 100, whatever the dtype."""
    low, high = max(jnp.iinfo(dtype).min, -1), min(jnp.iinfo(dtype).max, 200)
    x = jnp.array([low, 3, high], dtype)
    cut = jax.jit(lambda x: arguments.int32("f", "x", x, 0, 100))(x)
    marked = jax.jit(lambda x: arguments.int32("f", "x", x, 0, 100, outside=-7))(x)
    assert cut.dtype == marked.dtype == jnp.int32
    assert cut.tolist() == [max(low, 0), 3, 100]
    assert marked.tolist() == [-7 if low < 0 else 0, 3, -7]
    with pytest.raises(ValueError, match=r"f: x must be 0 to 100, got"):
        arguments.int32("f", "x", x, 0, 100)
    wide = jax.jit(lambda x: arguments.int32("f", "x", x, -5, 2**31 - 1))(x)
    assert wide.tolist() == [low, 3, high]


def test_integers_of_64_bits_do_not_wrap():
    with jax.enable_x64(True):
        x = jnp.array([2**32 + 1, -(2**40), 5])
        assert x.dtype == jnp.int64
        assert jax.jit(lambda x: arguments.int32("f", "x", x, 0, 9))(x).tolist() == [9, 0, 5]
    with pytest.raises(ValueError, match="got 4294967297"):
        arguments.int32("f", "x", np.array([2**32 + 1]), 0, 9)


@pytest.mark.parametrize("total", [10, 2**30])
def test_sizes_end_at_the_last_row(total):
    """Also where their sum is past int32."""
    given = [4, -3, 0, 5 if total == 10 else 2**30 - 6, 2**31 - 1, 7]
    got = jax.jit(lambda x: arguments.sizes("f", "x", x, total))(jnp.array(given, jnp.int32))
    assert got.tolist() == [4, 0, 0, given[3], total - 4 - given[3], 0]
    for wrong, words in (([-1, 2], "0 to 10, got -1"), ([6, 6], "a sum of at most 10, the number of rows, got 12")):
        with pytest.raises(ValueError, match=words):
            arguments.sizes("f", "x", jnp.array(wrong), 10)
