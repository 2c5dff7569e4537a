"""The clipped sum: equal to its definition for every backend, mesh and model."""

import dataclasses

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dito_jax.errors import UserError
from dito_jax.layers.linear import linear
from dito_jax.models.dit import stacked
from dito_jax.models.kernels import KernelsConfig
from dito_jax.privacy.clipping import ClippedSum
from dito_jax.sharding import MeshConfig, make_mesh, shardings, spec
from dito_jax.training.state import split_model
from dito_jax.training.step import cast
from dito_jax.training.trainable import divided

from .conftest import EXAMPLES, MODELS, losses


pytestmark = pytest.mark.recorded


FAST = ("ghost", "bookkeeping")
BACKENDS = ("vmap", "microbatch", *FAST)
APART = [("bias", "label"), ("bias", "attention"), ("kernel",)]
MESHES = {
    "data": dict(data=8),
    "fsdp": dict(data=1, fsdp=8),
    "tensor": dict(data=2, fsdp=2, tensor=2),
    "expert": dict(data=2, expert=2, tensor=2),
}


BOUND = 2e-5  # how far the bounds of rounding are above the norms of these small networks


@dataclasses.dataclass(frozen=True)
class Definition:
    """Each example's gradient by jax.grad of its own loss, in float64: (B, ...) by leaf; and their norms."""

    gradients: list[np.ndarray]
    norm: np.ndarray

    def clipped_sum(self, norm, threshold, padding):
        """Clipped by `norm`, which the network's own ones may differ from within BOUND, and summed in float64."""
        factor = np.where(padding, 0, np.minimum(1, threshold / np.maximum(np.float64(norm), 1e-30)))
        return [np.tensordot(factor, leaf, axes=1) for leaf in self.gradients]


def by_definition(problem) -> Definition:
    made = ClippedSum(problem.graph, losses, 20.0)

    def loss(params, example):
        rows = {name: value[None] for name, value in example.items()}
        return made.example_losses(nnx.merge(problem.graph, params), rows)[0]

    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(problem.params, problem.examples)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
    return Definition(leaves, np.sqrt(sum(np.sum(leaf.reshape(EXAMPLES, -1) ** 2, axis=1) for leaf in leaves)))


def assert_same(total, wanted, tolerance=1e-6):
    for got, want in zip(jax.tree.leaves(total), wanted, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.max(np.abs(want))))


def assert_bounds(measured, norm):
    """Never below the norm, but for the rounding of the network itself, and at most BOUND above it."""
    above = np.float64(measured) / norm - 1
    assert np.all(above > -2e-6) and np.all(above < BOUND), above


@pytest.fixture(scope="module")
def definition(problem):
    made = {}

    def of(name):
        if name not in made:
            made[name] = by_definition(problem(name))
        return made[name]

    return of


# "microbatch" is vmap over fewer examples: one model is enough.
@pytest.mark.parametrize(
    ("model", "backend"),
    [*((model, backend) for model in MODELS for backend in ("vmap", *FAST)), ("modern", "microbatch")],
)
def test_every_backend_gives_the_sum_of_the_definition(problem, definition, model, backend):
    of, by_definition = problem(model), definition(model)
    kept = by_definition.norm[~np.asarray(of.padding)]
    assert np.min(kept) < 20 < np.max(kept)  # some are clipped and some are not
    clipped = of.clipped_sum(backend, microbatch=2)
    total, measured = jax.jit(clipped)(of.params, of.examples, of.padding)
    assert_same(total, by_definition.clipped_sum(measured.norm, clipped.threshold(EXAMPLES), of.padding))
    assert_bounds(measured.norm[~of.padding], kept)


# Each axis with each way to divide a matrix that it has, and with each backend.
@pytest.mark.parametrize(
    ("model", "backend", "shape"),
    [
        *(("modern", "bookkeeping", shape) for shape in ("data", "fsdp", "tensor")),
        *(("modern", "ghost", shape) for shape in ("fsdp", "tensor")),
        *(("experts", "bookkeeping", shape) for shape in ("data", "expert")),
        *(("experts", "microbatch", shape) for shape in ("fsdp", "expert")),
    ],
)
def test_eight_devices_give_the_sum_and_the_norms_of_one(problem, definition, model, backend, shape):
    """Norms are added up over what divides a matrix, and never over what divides the batch."""
    of, by_definition = problem(model), definition(model)
    mesh = make_mesh(MeshConfig(**MESHES[shape]))
    with jax.set_mesh(mesh):
        places, by_example = shardings(of.params, mesh), jax.NamedSharding(mesh, spec("B", mesh))
        arguments = jax.device_put((of.params, of.examples, of.padding), (places, by_example, by_example))
        clipped = of.clipped_sum(backend)
        run = jax.jit(clipped, out_shardings=(places, jax.NamedSharding(mesh, jax.P())))
        total, measured = jax.device_get(run(*arguments))
    assert_same(total, by_definition.clipped_sum(measured.norm, clipped.threshold(EXAMPLES), of.padding))
    assert_bounds(measured.norm[~of.padding], by_definition.norm[~of.padding])


@pytest.mark.parametrize("backend", ["vmap", *FAST])
@pytest.mark.parametrize("model", ["modern", "experts"])
def test_an_example_moves_the_sum_by_its_bound_and_nothing_else(problem, model, backend):
    """With and without example j, and with another in its place: the others' losses and norms stay to the bit."""
    of, clip_norm = problem(model), 5.0
    run = jax.jit(of.clipped_sum(backend, clip_norm))
    total, measured = run(of.params, of.examples, of.padding)
    others = np.arange(EXAMPLES) != 5
    without, told_without = run(of.params, of.examples, of.padding | ~others)
    another = jax.tree.map(lambda a: a.at[5].set(a[0] if a.dtype == jnp.int32 else 9 * a[0]), of.examples)
    replaced, told_replaced = run(of.params, another, of.padding)
    for changed in (told_without, told_replaced):
        keep = others & ~np.asarray(of.padding)
        np.testing.assert_array_equal(np.asarray(changed.norm)[keep], np.asarray(measured.norm)[keep])
        np.testing.assert_array_equal(np.asarray(changed.loss)[keep], np.asarray(measured.loss)[keep])
    distance = lambda other: np.sqrt(
        sum(np.sum(np.square(np.float64(a) - b)) for a, b in zip(*map(jax.tree.leaves, (total, other)), strict=True))
    )
    bound = of.clipped_sum(backend, clip_norm).sensitivity
    relation = dp_accounting.NeighboringRelation
    assert measured.norm[5] > clip_norm
    assert clip_norm * (1 - 1e-4) < distance(without) <= bound(relation.ADD_OR_REMOVE_ONE) * (1 + 1e-5)
    assert bound(relation.ADD_OR_REMOVE_ONE) == bound(relation.REPLACE_SPECIAL) == clip_norm
    assert bound(relation.ADD_OR_REMOVE_ONE) < distance(replaced) <= bound(relation.REPLACE_ONE) * (1 + 1e-5)
    assert bound(relation.REPLACE_ONE) == 2 * clip_norm


def test_a_balance_loss_of_the_batch_is_seen_to_couple_its_examples(problem):
    """The control: what the test above would see of a network that does not keep examples apart."""
    graph, _ = split_model(dataclasses.replace(MODELS["experts"], balance="batch"))
    of = dataclasses.replace(problem("experts"), graph=graph)
    run = jax.jit(of.clipped_sum("ghost", 5.0))
    _, measured = run(of.params, of.examples, of.padding)
    another = jax.tree.map(lambda a: a.at[5].set(a[0]), of.examples)
    _, changed = run(of.params, another, of.padding)
    assert np.any(np.asarray(measured.norm)[6:] != np.asarray(changed.norm)[6:])


def test_experts_that_choose_among_several_images_are_refused(problem):
    graph, _ = split_model(dataclasses.replace(MODELS["experts"], pool=2, balance="batch"))
    of = dataclasses.replace(problem("experts"), graph=graph)
    with pytest.raises(ValueError, match="needs model.pool 1, .* got 2"):
        of.clipped_sum("bookkeeping")(of.params, of.examples, of.padding)


@pytest.mark.parametrize("backend", ["vmap", *FAST])
def test_what_is_not_finite_counts_as_zero_and_poisons_nothing(problem, backend):
    of = problem("modern")
    run = jax.jit(of.clipped_sum(backend))
    bad = dict(of.examples, image=of.examples["image"].at[1].set(jnp.nan).at[3].set(jnp.inf))  # 3 is padding
    total, _ = run(of.params, bad, of.padding)
    without, _ = run(of.params, of.examples, of.padding.at[1].set(True))
    for got, want in zip(jax.tree.leaves(total), jax.tree.leaves(without), strict=True):
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_padding_is_exactly_zero(problem, backend):
    """Whatever is in it."""
    of = problem("modern")
    bad = dict(of.examples, image=of.examples["image"].at[1].set(jnp.nan).at[3].set(jnp.inf))
    total, _ = jax.jit(of.clipped_sum(backend))(of.params, bad, jnp.ones(EXAMPLES, bool))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(total))


@pytest.mark.parametrize("backend", ["vmap", *FAST])
def test_bfloat16_keeps_to_the_bound(problem, backend):
    """Measured on what leaves the clipping, one example alone: its rounding comes after its norm."""
    of = problem("modern")
    run = jax.jit(of.clipped_sum(backend, 5.0, cast=lambda params: cast(params, "bfloat16"), narrow=True))
    for example in (0, 1, 5):
        total, _ = run(of.params, of.examples, jnp.arange(EXAMPLES) != example)
        length = np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(total)))
        assert 4.8 < length <= 5.0 * (1 + 1e-6)


@pytest.mark.parametrize("names", [("attention",), ("lora_a", "lora_b", "table"), *APART], ids=str)
def test_frozen_parameters_have_no_part_in_norms_or_sum(problem, definition, names):
    of, whole = problem("modern"), definition("modern").norm
    trained, frozen = divided(of.params, names)
    wanted = None
    for backend in BACKENDS if names == ("attention",) else ("vmap", *FAST):  # microbatches are vmap over fewer
        total, measured = jax.jit(of.clipped_sum(backend, 10.0, microbatch=2))(trained, of.examples, of.padding, frozen)
        assert jax.tree.structure(total) == jax.tree.structure(trained)
        if wanted is None:
            wanted = total, measured.norm
            assert np.all((np.asarray(measured.norm) < whole)[~of.padding])
            assert np.min(measured.norm[~of.padding]) < 10 < np.max(measured.norm)  # some are clipped and some are not
        assert_same(total, [np.asarray(leaf) for leaf in jax.tree.leaves(wanted[0])], BOUND)
        assert_bounds(measured.norm[~of.padding], wanted[1][~of.padding])


@pytest.mark.parametrize("names", [("bias", "label"), ("kernel",)], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_eight_devices_see_biases_and_kernels_without_each_other(problem, backend, names):
    of = problem("modern")
    clipped, mesh = of.clipped_sum(backend, 5.0), make_mesh(MeshConfig(**MESHES["tensor"]))
    trained, frozen = divided(of.params, names)
    wanted, of_one = jax.jit(of.clipped_sum("vmap", 5.0))(trained, of.examples, of.padding, frozen)
    with jax.set_mesh(mesh):
        by_example = jax.NamedSharding(mesh, spec("B", mesh))
        places = shardings(trained, mesh), by_example, by_example, shardings(frozen, mesh)
        arguments = jax.device_put((trained, of.examples, of.padding, frozen), places)
        total, measured = jax.device_get(jax.jit(clipped)(*arguments))
    assert_same(total, [np.asarray(leaf) for leaf in jax.tree.leaves(wanted)], BOUND)
    assert_bounds(measured.norm[~of.padding], of_one.norm[~of.padding])


def test_a_routers_bias_has_no_gradient(problem):
    config = dataclasses.replace(MODELS["experts"], router="sigmoid", bias_rate=0.0, depth=1)
    graph, _ = split_model(config)
    params = nnx.state(config.build(nnx.Rngs(0)), nnx.Param)
    of = dataclasses.replace(problem("experts"), graph=graph, params=jax.tree.map(lambda a: a + 0.1, params))
    total, _ = jax.jit(of.clipped_sum("bookkeeping"))(of.params, of.examples, of.padding)
    assert jax.tree.structure(total) == jax.tree.structure(of.params)
    assert not np.any(total["blocks"]["moe"]["mlp"]["bias"][...])


def test_the_threshold_leaves_room_for_rounding(problem):
    """2^-24 for each example of the whole batch, though a call may get a part of it, and 64 for the parameters."""
    whole = problem("modern").clipped_sum("vmap", 1.0)
    assert whole.threshold(4096) == 1 - 4160 * 2**-24
    part = dataclasses.replace(whole, batch=4096)
    assert part.threshold(1024) == 1 - 4160 * 2**-24
    narrow = dataclasses.replace(part, backend="ghost", narrow=True)
    assert narrow.threshold(1024) == pytest.approx(0.98 - 4160 * 2**-24)


class Cancels(nnx.Module):
    """A layer whose gradient is the small rest of large terms: rows alike, whose output gradients sum to little."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = linear(64, 64, ". .", bias=False, rngs=rngs)

    def __call__(self, x, d_y):
        return jnp.sum(d_y * self.first(x), axis=(1, 2))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_terms_that_cancel_do_not_let_an_example_exceed_its_bound(backend, dtype):
    """The norms that are measured are too small there, or zero: what is summed has to be clipped by a bound of them."""
    graph, params = nnx.split(Cancels(rngs=nnx.Rngs(0)), nnx.Param)
    x, d_y = (jax.random.normal(key, (40, 1, 16, 64)) for key in jax.random.split(jax.random.key(0)))
    x = x[:, :, :1] + 1e-4 * x
    d_y = d_y - (1 - 1e-4) * jnp.mean(d_y, axis=2, keepdims=True)
    rows = dict(x=x.astype(dtype), d_y=d_y.astype(dtype), weight=jnp.ones((40, 1)))
    losses = lambda network, rows: network(rows["x"], rows["d_y"]).astype(jnp.float32)
    narrow = dict(cast=lambda params: cast(params, "bfloat16"), narrow=True) if dtype == "bfloat16" else {}
    run = jax.jit(ClippedSum(graph, losses, 1e-3, backend, **narrow))
    lengths = []
    for example in range(40):
        total, _ = run(params, rows, jnp.arange(40) != example)
        lengths.append(np.linalg.norm(np.float64(total["first"]["kernel"][...])))
    assert np.max(lengths) <= 1e-3 * (1 + 1e-6) and np.min(lengths) > 1e-6


ALIGNED = 1000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_of_a_thousand_equal_examples_moves_the_sum_by_its_bound(problem, backend, dtype):
    """Their sum is a thousand times as long as each, so what rounds the sum moves it by more than one of them may."""
    of, clip_norm = problem("modern"), 5.0
    equal = jax.tree.map(lambda a: jnp.repeat(a[:1, :1], ALIGNED, axis=0), of.examples)
    narrow = dict(cast=lambda params: cast(params, "bfloat16"), narrow=True) if dtype == "bfloat16" else {}
    run = jax.jit(of.clipped_sum(backend, clip_norm, microbatch=100, **narrow))
    sums = [run(of.params, equal, jnp.arange(ALIGNED) < left_out)[0] for left_out in (0, 1)]
    moved = [np.float64(a) - np.float64(b) for a, b in zip(*map(jax.tree.leaves, sums), strict=True)]
    length = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in moved))
    assert 0.97 * clip_norm < length <= clip_norm * (1 + 1e-4)


class Uses(nnx.Module):
    """Uses one matrix several times, each time in another way, or one that no hook sees."""

    def __init__(self, how: str, *, rngs: nnx.Rngs):
        self.how, self.first = how, linear(4, 4, ". .", bias=False, rngs=rngs)
        self.second = linear(4, 4, ". .", rngs=rngs)
        self.layers = stacked(lambda rngs: linear(4, 4, ". .", rngs=rngs), 3, rngs)

    def __call__(self, x):
        first, kernel = self.first, self.first.kernel
        again = lambda x, _=None: (first(x), None)
        x = self.second(jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)[0])
        match self.how:
            case "once":
                return first(x)
            case "twice":
                return first(first(x))
            case "scan":
                return jax.lax.scan(again, x, length=5)[0]
            case "remat scan":
                return jax.lax.scan(jax.checkpoint(again), x, length=5)[0]
            case "loop":
                return jax.lax.fori_loop(0, 5, lambda _, x: first(x), x)
            case "map":
                return jax.lax.map(first, x)
            case "tied output":
                return jnp.tanh(first(x)) @ kernel[...].T
            case "tied input":
                return first(x @ kernel[...].T)
            case "weight decay":
                return first(x) + jnp.sum(jnp.square(kernel[...]))
            case "of the data":
                return jax.lax.cond(jnp.sum(x) > 0, first, lambda x: first(first(x)), x)
            case "hidden":
                return x @ kernel[...]


VECTORS = {"x": jax.random.normal(jax.random.key(0), (4, 1, 4)), "weight": jnp.ones((4, 1))}


def row_losses(network, rows):
    return jnp.sum(jnp.square(network(rows["x"])), axis=1)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("once", None),
        ("twice", "hook of first.kernel 2 times"),
        ("scan", "hook of first.kernel 5 times"),
        ("remat scan", "hook of first.kernel 5 times"),
        ("loop", "hook of first.kernel 5 times"),
        ("map", "hook of first.kernel 4 times"),
        ("tied output", "first.kernel beside its gradient hook"),
        ("tied input", "first.kernel beside its gradient hook"),
        ("weight decay", "first.kernel beside its gradient hook"),
        ("of the data", "hook of first.kernel a number of times that depends on the data"),
        ("hidden", "hook of first.kernel 0 times"),
    ],
)
def test_a_parameter_is_used_once_and_by_its_hook_or_is_an_error(how, told):
    """In layers one after the other, in the layers of a scan, and in no other way; by microbatch in every way."""
    graph, params = nnx.split(Uses(how, rngs=nnx.Rngs(0)), nnx.Param)
    padding, made = jnp.zeros(4, bool), {}
    for backend in ("microbatch", *FAST):
        run = ClippedSum(graph, row_losses, 0.5, backend)
        if told and backend in FAST:
            with pytest.raises(ValueError, match=f"{told}.*wanted .*'microbatch'"):
                run(params, VECTORS, padding)
        else:
            made[backend] = run(params, VECTORS, padding)
    for total, measured in made.values():
        assert np.min(measured.norm) > 0 and np.max(measured.norm) > 0.5
        assert_same(total, [np.asarray(leaf) for leaf in jax.tree.leaves(made["microbatch"][0])])


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_rows_are_computed_whatever_was_drawn(backend):
    """By one compiled program, which counts them as it comes by."""
    graph, params = nnx.split(Uses("once", rngs=nnx.Rngs(0)), nnx.Param)
    passed = []

    def counted(network, rows):
        jax.debug.callback(lambda x: passed.append(x.shape[0]), rows["x"])
        return row_losses(network, rows)

    clipped = jax.jit(ClippedSum(graph, counted, 1.0, backend, microbatch=1))
    run, found = clipped.lower(params, VECTORS, jnp.ones(4, bool)).compile(), []
    for drawn in ([], [0], [0, 1, 2], [3], range(4)):
        passed.clear()
        jax.block_until_ready(run(params, VECTORS, jnp.ones(4, bool).at[jnp.array(drawn, int)].set(False)))
        jax.effects_barrier()
        found.append(sum(passed))
    assert found[0] >= 4 and len(set(found)) == 1, found


def test_a_fused_mlp_is_an_error_that_names_the_cure(problem):
    config = dataclasses.replace(MODELS["modern"], kernels=KernelsConfig(mlp="xla"))
    graph, _ = split_model(config)
    of = dataclasses.replace(problem("modern"), graph=graph)
    with pytest.raises(ValueError, match=r"mlp.*kernel 0 times.*model.kernels.mlp to None"):
        of.clipped_sum("ghost")(of.params, of.examples, of.padding)


@pytest.mark.parametrize("backend", FAST)
def test_one_of_two_scales_that_are_seen_together_is_one_line(problem, backend):
    of = problem("modern")
    trained, frozen = divided(of.params, ("q_norm", "label"))
    with pytest.raises(UserError, match=r"names some of q_norm, k_norm of one layer,.*'microbatch'"):
        of.clipped_sum(backend, 5.0)(trained, of.examples, of.padding, frozen)
