"""Named cases of the MoE operations, with balanced, skewed and degenerate expert loads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..op import Case
from .routing import Assignments, Routing


def group_sizes(load: str, num_rows: int, num_experts: int) -> np.ndarray:
    """The number of rows of each expert for a named load distribution.

    "even"; "random": each row has a random expert; "zipf": probabilities 1 / i, in random order; "one": one expert has
    all rows; "none": no expert has rows; "half": half of the experts, chosen at random, have no rows, and a quarter of
    the rows are padding.
    """
    rng = np.random.default_rng(num_rows + num_experts)
    even = np.full(num_experts, 1 / num_experts)
    zipf = 1 / np.arange(1, num_experts + 1)
    half = rng.permutation(num_experts) < (num_experts + 1) // 2
    match load:
        case "even":
            return np.diff(np.arange(num_experts + 1) * num_rows // num_experts).astype(np.int32)
        case "random":
            return rng.multinomial(num_rows, even).astype(np.int32)
        case "zipf":
            return rng.multinomial(num_rows, rng.permutation(zipf / zipf.sum())).astype(np.int32)
        case "one":
            return (num_rows * (np.arange(num_experts) == num_experts // 2)).astype(np.int32)
        case "none":
            return np.zeros(num_experts, np.int32)
        case "half":
            return rng.multinomial(num_rows * 3 // 4, half / half.sum()).astype(np.int32)
    raise ValueError(f"no load {load!r}.")


def routing_of(load: str, num_tokens: int, num_experts: int, active: int) -> Routing:
    """A routing of T A rows with a load distribution. Tokens are random: one may have an expert twice, or none."""
    num_rows = num_tokens * active
    rng = np.random.default_rng(num_rows)
    sizes = group_sizes(load, num_rows, num_experts)
    expert = np.repeat(np.arange(num_experts), sizes)
    expert = np.pad(expert, (0, num_rows - len(expert)), constant_values=num_experts)
    token = rng.permutation(np.arange(num_rows) % num_tokens)
    weight = rng.uniform(0.1, 1.0, num_rows)
    order = np.argsort(token, kind="stable")
    lists = [jnp.asarray(a[order], t) for a, t in ((token, jnp.int32), (expert, jnp.int32), (weight, jnp.float32))]
    return Assignments(*lists, num_tokens=num_tokens, num_experts=num_experts).route()


def _shapes(dtype, *shapes) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def _normal(key, shape, dtype):
    """Standard normal numbers; matrices of experts are scaled so that their products are standard normal too."""
    scale = 1.0 if len(shape) == 2 else shape[1] ** -0.5
    return (scale * jax.random.normal(key, shape)).astype(dtype)


def _matmul(R, D, F, E, load, dtype=jnp.bfloat16, *, origin="", tiny=False, huge=False) -> Case:
    def make(key):
        sizes = group_sizes(load, R, E)
        key_x, key_w = jax.random.split(key)
        x, w = _normal(key_x, (R, D), dtype), _normal(key_w, (E, D, F), dtype)
        return x.at[sizes.sum() :].set(jnp.nan), w, jnp.asarray(sizes)  # padding rows are NaN

    arrays = (*_shapes(dtype, (R, D), (E, D, F)), *_shapes(jnp.int32, (E,)))
    return Case(arrays, {}, origin, tiny, make, huge)


def _mlp(T, D, F, E, A, load, dtype=jnp.bfloat16, *, origin="", tiny=False, huge=False) -> Case:
    matrices = (E, D, 2 * F), (E, F, D)

    def make(key):
        key_x, *keys = jax.random.split(key, 3)
        x, (w_gate_up, w_down) = _normal(key_x, (T, D), dtype), map(_normal, keys, matrices, (dtype, dtype))
        return x, routing_of(load, T, E, A), w_gate_up, w_down

    [x, *weights] = _shapes(dtype, (T, D), *matrices)
    return Case((x, _routing(T, E, A), *weights), {}, origin, tiny, make, huge)


def _rows(T, D, E, A, load, dtype=jnp.bfloat16, *, of_rows: bool, origin="", tiny=False) -> Case:
    """An array and a routing: T tokens for dispatch, or T A rows for combine (`of_rows`)."""
    shape = (T * A if of_rows else T, D)

    def make(key):
        routing = routing_of(load, T, E, A)
        x = _normal(key, shape, dtype)
        return x.at[routing.group_sizes.sum() :].set(jnp.nan) if of_rows else x, routing

    return Case((*_shapes(dtype, shape), _routing(T, E, A)), {}, origin, tiny, make)


def _routing(T, E, A) -> Routing:
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return Routing(ints((T * A,)), ints((E,)), jax.ShapeDtypeStruct((T * A,), jnp.float32), ints((T * A,)), ints((T,)))


ROWS = {
    "tiny_even": (24, 48, 4, 2, "even", jnp.float32),
    "tiny_random_bf16": (37, 72, 5, 3, "random"),
    "tiny_half": (24, 40, 4, 2, "half", jnp.float32),
    "tiny_one": (9, 24, 3, 1, "one", jnp.float32),
    "tiny_none": (9, 24, 3, 2, "none", jnp.float32),
    "dit_moe_xl": (8192, 1152, 8, 2, "random"),
    "dsmoe_l_e48": (16384, 1024, 48, 5, "zipf"),
}
ORIGINS = {
    "dit_moe_b": "DiT-MoE-B/2-8E2A, 32 images of 256 px: https://arxiv.org/abs/2407.11633",
    "dit_moe_xl": "DiT-MoE-XL/2-8E2A, 32 images of 256 px: https://arxiv.org/abs/2407.11633",
    "dit_moe_g": "DiT-MoE-G/2-16E2A, 32 images of 256 px: https://arxiv.org/abs/2407.11633",
    "dsmoe_l_e48": "DSMoE-L-E48, 64 images of 256 px: https://arxiv.org/abs/2512.01252",
    "sonic_1536": "SonicMoE's 7B, fine-grained: https://arxiv.org/abs/2512.14080, figure 14",
}
DISPATCH = {
    name: _rows(*sizes, of_rows=False, origin=ORIGINS.get(name, ""), tiny=name.startswith("tiny"))
    for name, sizes in ROWS.items()
}
COMBINE = {
    name: _rows(*sizes, of_rows=True, origin=ORIGINS.get(name, ""), tiny=name.startswith("tiny"))
    for name, sizes in ROWS.items()
}

GROUPED_MATMUL = {
    "tiny_even": _matmul(64, 32, 48, 4, "even", jnp.float32, tiny=True),
    "tiny_random": _matmul(77, 40, 24, 5, "random", jnp.float32, tiny=True, origin="sizes that no tile divides"),
    "tiny_half": _matmul(61, 24, 40, 6, "half", jnp.float32, tiny=True, origin="empty experts and padding rows"),
    "tiny_one": _matmul(50, 32, 16, 7, "one", jnp.float32, tiny=True, origin="one of seven experts has all rows"),
    "tiny_none": _matmul(20, 16, 32, 3, "none", jnp.float32, tiny=True, origin="every expert is empty"),
    "tiny_short": _matmul(5, 72, 56, 3, "random", jnp.float32, tiny=True, origin="fewer rows than a tile"),
    "tiny_many": _matmul(700, 24, 80, 3, "zipf", jnp.float32, tiny=True, origin="more row tiles than SUPER_ROWS"),
    "tiny_split": _matmul(
        2100, 24, 40, 2, "random", jnp.float32, tiny=True, origin="several programs per weight gradient"
    ),
    "tiny_bf16": _matmul(300, 72, 264, 5, "zipf", tiny=True),
    "tiny_half_bf16": _matmul(200, 152, 40, 3, "half", tiny=True),
    "tiny_f16": _matmul(90, 64, 64, 2, "random", jnp.float16, tiny=True),
    "dit_moe_xl_up": _matmul(16384, 1152, 9216, 8, "even", origin=ORIGINS["dit_moe_xl"]),
    "dit_moe_xl_down_zipf": _matmul(16384, 4608, 1152, 8, "zipf", origin=ORIGINS["dit_moe_xl"]),
    "dit_moe_g_down": _matmul(16384, 5632, 1408, 16, "random", origin=ORIGINS["dit_moe_g"]),
    "dsmoe_l_e48_down": _matmul(81920, 448, 1024, 48, "random", origin=ORIGINS["dsmoe_l_e48"]),
    "dit_moe_b_f32": _matmul(4096, 768, 3072, 8, "random", jnp.float32, origin=ORIGINS["dit_moe_b"]),
}
EXPERT_MLP = {
    "tiny_even": _mlp(24, 32, 48, 4, 2, "even", jnp.float32, tiny=True),
    "tiny_random": _mlp(37, 40, 24, 5, 3, "random", jnp.float32, tiny=True, origin="sizes that no tile divides"),
    "tiny_half": _mlp(
        24, 24, 40, 6, 2, "half", jnp.float32, tiny=True, origin="empty experts, padding, unrouted tokens"
    ),
    "tiny_one": _mlp(19, 16, 24, 3, 1, "one", jnp.float32, tiny=True, origin="all tokens at one expert"),
    "tiny_none": _mlp(9, 16, 16, 3, 2, "none", jnp.float32, tiny=True, origin="every expert is empty"),
    "tiny_halves": _mlp(20, 24, 96, 3, 2, "zipf", jnp.float32, tiny=True, origin="the last column tile is half empty"),
    "tiny_bf16": _mlp(100, 72, 192, 5, 2, "zipf", tiny=True, origin="the last column tile is half empty"),
    "dit_moe_b_zipf": _mlp(8192, 768, 3072, 8, 2, "zipf", origin=ORIGINS["dit_moe_b"]),
    "dit_moe_xl": _mlp(8192, 1152, 4608, 8, 2, "random", origin=ORIGINS["dit_moe_xl"]),
    "dsmoe_l_e48": _mlp(16384, 1024, 448, 48, 5, "random", origin=ORIGINS["dsmoe_l_e48"]),
    "dit_moe_b_f32": _mlp(2048, 768, 3072, 8, 2, "random", jnp.float32, origin=ORIGINS["dit_moe_b"]),
}


def _loads(case, *sizes, origin) -> dict[str, Case]:
    """One size with a balanced and with a skewed load."""
    return {load: case(*sizes, load, origin=origin, huge=True) for load in ("even", "zipf")}


GROUPED_MATMUL_SWEEP = {
    f"{name}_{load}": case
    for name, sizes in {
        "d768_f256_e128": (327680, 768, 512, 128),
        "d1024_f1024_e8": (65536, 1024, 1024, 8),
        "d1152_f4608_e8": (65536, 1152, 9216, 8),
        "d1408_f5632_e16": (65536, 1408, 11264, 16),
        "d4096_f14336_e8": (8192, 4096, 14336, 8),
        "d256_f7168_e256": (262144, 256, 7168, 256),
    }.items()
    for load, case in _loads(_matmul, *sizes, origin="sizes of diffusion and language models").items()
}
EXPERT_MLP_SWEEP = {
    f"{name}_{load}": case
    for name, sizes in {
        "sonic_768_f256": (40960, 768, 256, 128, 8),
        "sonic_1536_f256": (24576, 1536, 256, 128, 8),
        "sonic_1536_f1024": (24576, 1536, 1024, 32, 2),
        "sonic_4096_f1024": (32768, 4096, 1024, 64, 4),
        "dit_moe_xl": (65536, 1152, 4608, 8, 2),
        "dit_moe_g": (65536, 1408, 5632, 16, 2),
        "diffmoe_l": (65536, 1024, 4096, 16, 1),
        "dsmoe_l_e48": (65536, 1024, 448, 48, 5),
    }.items()
    for load, case in _loads(_mlp, *sizes, origin=f"{ORIGINS['sonic_1536']}; diffusion MoE").items()
}
