"""Custom calls: their bits against published vectors and a model in numpy, their pieces, and what they refuse."""

import dataclasses
import functools
import math
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kernels_pallas import (
    GROUPED_MATMUL,
    SECURE_NORMAL,
    STATE_DIGEST,
    backend,
    deviceless,
    secure_normal,
    state_digest,
)
from kernels_pallas.ffi import custom_calls, libraries
from kernels_pallas.randomness import reference, segments as segments_


KEY = jnp.arange(8, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
NONCE = jnp.array([1, 2, 3], jnp.uint32)
TINY = {op.name: [name for name, case in op.cases.items() if case.tiny] for op in (SECURE_NORMAL, STATE_DIGEST)}


@pytest.fixture(scope="module")
def built():
    """The CPU's library."""
    if libraries.compiler("cpu") is None:
        pytest.skip("no C++ compiler here")
    libraries.build("cpu")
    assert custom_calls.why_not() is None


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    "key, nonce, counter, wanted",
    [
        (  # section 2.3.2
            bytes(range(32)), "000000090000004a00000000", 1,
            "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
            "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2",
        ),
        (  # appendix A.1, vectors 1 and 2
            bytes(32), "0" * 24, 0,
            "ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b "
            "7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2",
        ),
        (
            bytes(32), "0" * 24, 1,
            "bee7079f 7a385155 7c97ba98 0d082d73 a0290fcb 6965e348 3e53c612 ed7aee32 "
            "7621b729 434ee69c b03371d5 d539d874 281fed31 45fb0a51 1f0ae1ac 6f4d794b",
        ),
    ],
)  # fmt: skip
def test_blocks_are_those_of_rfc_8439(key, nonce, counter, wanted):
    as_words = lambda raw: jnp.asarray(np.frombuffer(raw, "<u4"))
    block = reference.chacha20(as_words(key), jnp.array([counter], jnp.uint32), as_words(bytes.fromhex(nonce)))
    assert np.asarray(block)[0].tolist() == words(wanted)


def model(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The normals of 64 bits each, by Python's integers and numpy's single roundings."""
    table, out = segments_.segments(), []
    for h, l in zip(high.tolist(), low.tolist(), strict=True):
        tail = ((h << 32 | l) << 1 | 1) & (2**64 - 1)
        octave = 64 - tail.bit_length()
        rest = (tail << octave << 1) & (2**64 - 1)
        c0, c1, c2, c3 = table[octave * 16 + (rest >> 60)]
        t = np.float32((rest >> 36) & 0xFFFFFF) * np.float32(2**-24)
        x = ((c3 * t + c2) * t + c1) * t + c0
        out.append(-x if h >> 31 else x)
    return np.array(out, np.float32)


def test_bits_become_the_normals_quantiles():
    rng = np.random.default_rng(0)
    shift = np.arange(64).repeat(20).astype(np.uint64)
    bits = rng.integers(0, 2**64, shift.size, np.uint64) & ((2**63 - 1) >> shift) | rng.integers(
        0, 2, shift.size, np.uint64
    ) << np.uint64(63)
    edges = np.array([0, 1, 2**63, 2**63 - 1, 2**64 - 1, 2**32, 2**31, 2**31 - 1, 2**32 - 1, 2**63 + 1], np.uint64)
    bits = np.concatenate([bits, edges])
    high, low = (bits >> 32).astype(np.uint32), bits.astype(np.uint32)
    found, wanted = np.asarray(reference.normals(jnp.asarray(high), jnp.asarray(low))), model(high, low)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    tail = ((bits & np.uint64(2**63 - 1)).astype(np.float64) * 2 + 1) / 2.0**65
    quantile = scipy.stats.norm.isf(tail) * np.where(bits >> np.uint64(63), -1, 1)
    np.testing.assert_allclose(wanted, quantile, rtol=1.2e-7, atol=5e-7)
    assert wanted.max() > 9 and wanted.min() < -9 and len(set((high >> 27).tolist())) > 20


def test_the_table_is_what_it_is_said_to_be():
    kept, computed = segments_.segments(), segments_.computed()
    assert np.all(np.abs(kept - computed) <= np.spacing(np.abs(kept)))
    np.testing.assert_allclose(segments_.quantile(np.array([0.5, 0.25, 1e-9, 2.0**-65])),
                               scipy.stats.norm.isf([0.5, 0.25, 1e-9, 2.0**-65]), rtol=1e-12, atol=1e-12)  # fmt: skip


def expected(x, key, nonce, start, *, stddev, whole):
    """secure_normal by the model."""
    rows = np.zeros(x.shape[:-1] or (), np.int64)
    for dim, size in enumerate(x.shape[:-1]):
        shape = [1] * (x.ndim - 1)
        shape[dim] = size
        rows = rows * whole[dim] + (int(start[dim]) + np.arange(size)).reshape(shape)
    place = int(start[-1]) + np.arange(x.shape[-1])
    counters = (rows[..., None] * math.ceil(whole[-1] / 8) + place // 8).reshape(-1)
    blocks = np.asarray(reference.chacha20(key, jnp.asarray(counters, jnp.uint32), nonce))
    lane = np.broadcast_to(place % 8, x.shape).reshape(-1)
    at = np.arange(len(lane))
    drawn = model(blocks[at, 2 * lane + 1], blocks[at, 2 * lane]).reshape(x.shape)
    return np.asarray(x) + np.float32(stddev) * drawn


@pytest.mark.parametrize("case", TINY["secure_normal"])
def test_numbers_on_the_cpu_are_the_models_to_the_bit(built, case):
    case = SECURE_NORMAL.cases[case]
    arrays = case.random(jax.random.key(1))
    wanted = expected(*arrays, **case.static)
    found = jax.jit(functools.partial(SECURE_NORMAL, implementation="ffi", **case.static))(*arrays)
    np.testing.assert_array_equal(found, wanted)
    by_xla = jax.jit(functools.partial(SECURE_NORMAL, implementation="xla", **case.static))(*arrays)
    np.testing.assert_allclose(by_xla, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["ffi", "xla"])
def test_a_number_is_its_places_however_the_array_is_cut(built, implementation):
    shape = (4, 3, 50)
    draw = functools.partial(secure_normal, implementation=implementation)
    whole = draw(jnp.zeros(shape), KEY, NONCE)
    for start, size in [((0, 0, 0), (4, 3, 50)), ((1, 1, 21), (2, 2, 17)), ((3, 0, 40), (1, 3, 10))]:
        piece = draw(jnp.zeros(size), KEY, NONCE, start=jnp.array(start), whole=shape)
        inside = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        np.testing.assert_allclose(piece, whole[inside], rtol=0, atol=0 if implementation == "ffi" else 1e-6)


def test_numbers_are_normal_and_know_nothing_of_each_other(built):
    x = np.asarray(
        jax.jit(lambda: secure_normal(jnp.zeros((500, 2000)), KEY, NONCE, implementation="ffi"))(), np.float64
    )
    flat = x.ravel()
    for moment, value, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(flat**moment) - value) < 4 * math.sqrt(spread / flat.size), moment
    assert scipy.stats.kstest(flat, "norm").pvalue > 1e-3
    assert scipy.stats.chisquare(np.bincount((np.floor(scipy.stats.norm.cdf(flat) * 64)).astype(int))).pvalue > 1e-3
    other_nonce = np.asarray(secure_normal(jnp.zeros((500, 2000)), KEY, NONCE + 1, implementation="ffi")).ravel()
    other_key = np.asarray(secure_normal(jnp.zeros((500, 2000)), KEY ^ 1, NONCE, implementation="ffi")).ravel()
    beside = {
        "next": (flat[:-1], flat[1:]),
        "next row": (x[:-1].ravel(), x[1:].ravel()),
        "nonce": (flat, other_nonce),
        "key": (flat, other_key),
        "lane": (flat[::8], flat[4::8]),
        "squares": (flat[:-1] ** 2, flat[1:] ** 2),
    }
    for name, (a, b) in beside.items():
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(len(a)), name


def test_scale_gradient_and_vmap(built):
    x = jnp.arange(40.0).reshape(2, 20)
    unit = secure_normal(jnp.zeros_like(x), KEY, NONCE, implementation="ffi")
    scaled = secure_normal(x, KEY, NONCE, stddev=3.0, implementation="ffi")
    np.testing.assert_array_equal(scaled, x + np.float32(3) * np.asarray(unit))
    weight = jnp.linspace(0, 1, 40).reshape(2, 20)
    gradient = jax.grad(lambda x: jnp.sum(weight * secure_normal(x, KEY, NONCE, implementation="ffi")))(x)
    np.testing.assert_array_equal(gradient, weight)
    keys = jnp.stack([KEY, KEY + 1])
    each = jax.vmap(lambda key: secure_normal(x, key, NONCE, implementation="ffi"))(keys)
    np.testing.assert_array_equal(each[1], secure_normal(x, keys[1], NONCE, implementation="ffi"))


def test_what_cannot_be_is_an_error_and_no_garbage(built, unchecked_arrays):
    draw = functools.partial(secure_normal, key=KEY, nonce=NONCE)
    with pytest.raises(ValueError, match="x must be float32 with at least one dim, got bfloat16"):
        draw(jnp.zeros(4, jnp.bfloat16))
    with pytest.raises(ValueError, match="key and nonce must be 8 and 3 words"):
        secure_normal(jnp.zeros(4), KEY[:4], NONCE)
    with pytest.raises(ValueError, match=r"a shard of shape \(4,\) does not fit into an array of shape \(3,\)"):
        draw(jnp.zeros(4), whole=(3,))
    with pytest.raises(ValueError, match="takes 6442450941 blocks, a nonce has 2"):
        draw(jnp.zeros((1, 8)), whole=(2**31 - 1, 17))
    with pytest.raises(ValueError, match="is sharded along a dim larger than 2147483647"):
        draw(jnp.zeros((8,)), whole=(2**33,))
    for start in (-3, 5):
        with pytest.raises(Exception, match="the shard is not inside the whole array"):
            jax.block_until_ready(draw(jnp.zeros(4), start=jnp.array([start]), whole=(8,), implementation="ffi"))
    last = draw(jnp.zeros((1, 8)), whole=(2**31 - 1, 16), start=jnp.array([2**31 - 2, 8]), implementation="ffi")
    counter = jnp.array([2**32 - 3], jnp.uint32)
    block = np.asarray(reference.chacha20(KEY, counter, NONCE))[0]
    np.testing.assert_array_equal(np.asarray(last)[0], model(block[1::2], block[0::2]))  # of 2^32 - 2
    with pytest.raises(NotImplementedError, match="needs at most 8 dims, got 9"):
        draw(jnp.zeros([1] * 9), implementation="ffi")
    assert draw(jnp.zeros((0, 8)), implementation="ffi").shape == (0, 8)
    wrong = jax.ffi.ffi_call("secure_normal", jax.ShapeDtypeStruct((4,), jnp.int32))
    with pytest.raises(Exception, match="[Ww]rong buffer dtype"):
        jax.block_until_ready(
            wrong(jnp.zeros(4, jnp.int32), KEY, NONCE, jnp.zeros(1, jnp.int32), jnp.zeros((1024, 4)),
                  stddev=np.float32(1), whole=np.array([4]))
        )  # fmt: skip


def test_a_transposed_array_is_taken_as_it_reads(built):
    x = jnp.arange(24.0).reshape(4, 6)
    found = jax.jit(lambda x: secure_normal(x.T, KEY, NONCE, implementation="ffi"))(x)
    np.testing.assert_array_equal(
        found, secure_normal(jnp.array(np.asarray(x).T.copy()), KEY, NONCE, implementation="ffi")
    )
    found = jax.jit(lambda x: state_digest(x.T, implementation="ffi"))(x)
    np.testing.assert_array_equal(found, state_digest(jnp.array(np.asarray(x).T.copy()), implementation="xla"))


def fingerprint(x: np.ndarray, start, whole) -> list[int]:
    """The digest, word by word, by Python's integers."""
    sums, per = [0] * 4, max(x.dtype.itemsize // 4, 1)
    bits = np.ascontiguousarray(x).view(f"u{min(x.dtype.itemsize, 4)}")
    for place in np.ndindex(*bits.shape):
        row = 0
        for dim, at in enumerate(place[:-1]):
            row = row * whole[dim] + at + int(start[dim])
        column = place[-1] + per * int(start[-1])
        cut = lambda value: value & 0xFFFFFFFF
        a = int(bits[place]) ^ cut(column * 0x9E3779B1)
        a = cut((a ^ a >> 16) * 0x7FEB352D)
        a = cut((a ^ a >> 15) + row * 0x85EBCA77 + 0x165667B1)
        for i, (factor, shift) in enumerate([(0x846CA68B, 16), (0xC2B2AE3D, 15), (0x27D4EB2F, 16), (0x165667B1, 15)]):
            a = cut(a * factor)
            a ^= a >> shift
            sums[i] = cut(sums[i] + a)
    return sums


@pytest.mark.parametrize("implementation", ["ffi", "xla"])
@pytest.mark.parametrize("case", TINY["state_digest"])
def test_digests_are_the_models(built, case, implementation):
    case = STATE_DIGEST.cases[case]
    x, start = case.random(jax.random.key(2))
    found = jax.jit(functools.partial(STATE_DIGEST, implementation=implementation, **case.static))(x, start)
    assert np.asarray(found).tolist() == fingerprint(np.asarray(x), start, case.static["whole"])


def test_numbers_of_64_bits_are_two_words_and_bools_and_scalars_have_digests(built):
    with jax.enable_x64(True):
        x = jnp.arange(-3.0, 9.0, dtype=jnp.float64).reshape(3, 4) / 7
        start = jnp.array([1, 2])
        for implementation in ("ffi", "xla"):
            found = state_digest(x, start=start, whole=(5, 6), implementation=implementation)
            assert np.asarray(found).tolist() == fingerprint(np.asarray(x), start, (5, 6))
    for x in (jnp.array([True, False, True]), jnp.float32(3.5), jnp.zeros((0, 3))):
        by_ffi, by_xla = (state_digest(x, implementation=name) for name in ("ffi", "xla"))
        np.testing.assert_array_equal(by_ffi, by_xla)
    assert np.asarray(state_digest(jnp.zeros((0, 3)), implementation="ffi")).tolist() == [0] * 4
    for x, wrong in [
        (jnp.zeros(3, jnp.complex64), "got complex64; give its real and imaginary parts"),
        (jnp.zeros(3, jnp.int4), "got int4, whose elements are smaller than a byte; cast it to int8"),
        (jax.random.key(0), r"got key<fry>; give jax.random.key_data of it"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            state_digest(x)
    with pytest.raises(ValueError, match="is sharded along a dim larger than 2147483647"):
        state_digest(jnp.zeros(4), whole=(2**32,))
    with pytest.raises(Exception, match="the shard is not inside the whole array"):
        jax.block_until_ready(state_digest(jnp.zeros(4), start=jnp.array([-1]), whole=(8,), implementation="ffi"))


def test_every_bit_and_every_place_counts(built):
    digest = jax.jit(functools.partial(state_digest, implementation="ffi"))
    x = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    first = np.asarray(digest(x))
    for bit in range(32):
        changed = x.copy()
        changed.view(np.uint32)[2, 3] ^= 1 << bit
        assert np.all(np.asarray(digest(changed)) != first), bit
    two_signs = x.copy()
    two_signs[1, 1], two_signs[4, 9] = -x[1, 1], -x[4, 9]
    swapped = x.copy()
    swapped[0, 0], swapped[5, 7] = x[5, 7], x[0, 0]
    for other in (two_signs, swapped, x[::-1], x[:, ::-1], np.roll(x, 1), x.reshape(40, 6), x.reshape(12, 20)):
        assert np.all(np.asarray(digest(np.ascontiguousarray(other))) != first)


@pytest.mark.parametrize("implementation", ["ffi", "xla"])
def test_eight_devices_give_the_numbers_and_the_digest_of_one_and_gather_nothing(built, implementation):
    shape = (8, 4, 48)
    x = jax.random.normal(jax.random.key(0), shape)
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    spec = jax.P("a", "b", "c")

    def piece(x):
        sizes = jnp.array([4, 2, 24])
        start = jnp.stack([jax.lax.axis_index(axis) for axis in "abc"]) * sizes
        digest = state_digest(x, start=start, whole=shape, implementation=implementation)
        noised = secure_normal(x, KEY, NONCE, start=start, whole=shape, implementation=implementation)
        return noised, jax.lax.psum(digest, ("a", "b", "c"))

    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(piece, in_specs=spec, out_specs=(spec, jax.P()), check_vma=False))
        noised, digest = run(jax.device_put(x, jax.NamedSharding(mesh, spec)))
        text = (
            run.lower(jax.ShapeDtypeStruct(shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))).compile().as_text()
        )
    rounding = 0 if implementation == "ffi" else 1e-6  # XLA fuses products and sums as it likes
    np.testing.assert_allclose(
        noised, secure_normal(x, KEY, NONCE, implementation=implementation), rtol=0, atol=rounding
    )
    np.testing.assert_array_equal(digest, state_digest(x, implementation=implementation))
    assert "all-gather" not in text


def test_what_is_not_built_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_calls, "_registered", set())
    with pytest.raises(
        NotImplementedError, match=r"ffi.* cannot run here: is not built; run python -m kernels_pallas.build cpu"
    ):
        secure_normal(jnp.zeros(8), KEY, NONCE, implementation="ffi")
    assert np.isfinite(secure_normal(jnp.zeros(8), KEY, NONCE)).all()
    with backend.interpret_mode():
        assert "no interpret mode" in (custom_calls.why_not() or "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no compiler for cpu on PATH; install g\+\+"):
        libraries.build("cpu")


@pytest.mark.skipif(libraries.compiler("cuda") is None, reason="no nvcc here")
def test_nvcc_compiles_for_every_architecture_without_spills_and_jax_for_a_gpu_that_is_not_there():
    path = libraries.build("cuda")
    listed = subprocess.run(
        [deviceless.compiler("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    for each in libraries.ARCHITECTURES:
        assert f"arch = sm_{each}" in listed
    functions = [line for line in listed.splitlines() if "REG:" in line]
    assert len(functions) == 3 * (1 + 4 * 2) and all("STACK:0" in line for line in functions), functions
    with jax.set_mesh(deviceless.mesh("h200")):
        assert custom_calls.why_not() is None
        run = jax.jit(
            lambda x: (secure_normal(x, KEY, NONCE, implementation="ffi"), state_digest(x, implementation="ffi"))
        )
        text = run.lower(jax.ShapeDtypeStruct((64, 256), jnp.float32)).compile().as_text()
    assert 'custom_call_target="secure_normal"' in text and 'custom_call_target="state_digest"' in text


@pytest.mark.gpu
@pytest.mark.parametrize("name, case", [(op.name, case) for op in (SECURE_NORMAL, STATE_DIGEST) for case in op.cases])
def test_a_gpu_has_the_same_bits(name, case):
    """Those of the model where it is quick; of large arrays XLA's, of numbers to the last place."""
    if jax.devices()[0].platform != "gpu":
        pytest.skip(f"needs an NVIDIA GPU, got {jax.devices()[0].device_kind}")
    if libraries.compiler("cuda") is None and not libraries.built("cuda").exists():
        pytest.skip("no nvcc here")
    libraries.build("cuda")
    op = {"secure_normal": SECURE_NORMAL, "state_digest": STATE_DIGEST}[name]
    one, arrays = op.cases[case], op.cases[case].random(jax.random.key(3))
    run = jax.jit(functools.partial(op, implementation="ffi", **one.static))
    found = run(*arrays)
    np.testing.assert_array_equal(found, run(*arrays))
    by_xla = jax.jit(functools.partial(op, implementation="xla", **one.static))(*arrays)
    np.testing.assert_allclose(found, by_xla, rtol=0, atol=2e-6 if name == "secure_normal" else 0)
    if name == "secure_normal" and one.tiny:
        np.testing.assert_array_equal(found, expected(*arrays, **one.static))


CUTLASS = GROUPED_MATMUL.kernels["cutlass"]
H200 = backend.Target("gpu", "NVIDIA H200", 9.0)


@pytest.fixture(scope="module")
def cutlass():
    """CUTLASS's library."""
    if reason := libraries.missing("cutlass"):
        pytest.skip(reason)
    return libraries.build("cutlass")


def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


FIT = of(64, 32), of(4, 32, 48), of(4, dtype=jnp.int32)


def test_cutlass_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_calls, "_registered", set())
    assert CUTLASS.unsupported(*FIT) == "needs a Hopper GPU (compute capability 9.0), got cpu"
    assert custom_calls.why_not("cutlass") == "supports NVIDIA GPUs, got cpu"
    for other in (backend.Target("gpu", "NVIDIA A100", 8.0), backend.Target("gpu", "NVIDIA B200", 10.0)):
        monkeypatch.setattr(backend, "target", lambda other=other: other)
        assert CUTLASS.unsupported(*FIT) == f"needs a Hopper GPU (compute capability 9.0), got {other.kind}"
    monkeypatch.setattr(backend, "target", lambda: H200)
    x, w, sizes = FIT
    for unfit, reason in [
        ((of(64, 32, dtype=jnp.float32), w, sizes), "needs a dtype among bfloat16, float16, got float32"),
        ((of(64, 36), of(4, 36, 48), sizes), "needs matrix dimensions that are multiples of 8, got 36 x 48"),
        ((x, of(4, 32, 4), sizes), "needs matrix dimensions that are multiples of 8, got 32 x 4"),
        ((x, w, of(4, dtype=jnp.uint32)), "needs int32 group_sizes, got uint32"),
        (FIT, "is not built; run python -m kernels_pallas.build cutlass"),
    ]:
        assert CUTLASS.unsupported(*unfit) == reason
    with backend.interpret_mode():
        assert CUTLASS.unsupported(*FIT) == "is a custom call, which has no interpret mode"
    monkeypatch.setattr(custom_calls, "_registered", {"cutlass"})
    assert CUTLASS.unsupported(*FIT) is None
    alone = dataclasses.replace(GROUPED_MATMUL, kernels={"cutlass": CUTLASS})
    assert alone.choose(*FIT) == "xla"  # until a GPU has proven it


def test_cutlass_is_a_custom_call_of_its_name(monkeypatch):
    monkeypatch.setattr(backend, "target", lambda: H200)
    monkeypatch.setattr(custom_calls, "_registered", {"cutlass"})
    run = functools.partial(GROUPED_MATMUL, implementation="cutlass")
    text = jax.jit(run).trace(*FIT).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @grouped_gemm(") == 1 and "-> tensor<64x48xbf16>" in text
    batch = [of(3, *a.shape, dtype=a.dtype) for a in FIT]
    text = jax.jit(jax.vmap(run)).trace(*batch).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@grouped_gemm(") == 1 and "stablehlo.while" in text  # one call after another


def test_cutlass_compiles_for_hopper_to_wgmma_without_spills(cutlass):
    tool = deviceless.compiler("cuobjdump")
    if not tool.exists():
        pytest.skip("no cuobjdump here: pip install -e '.[deviceless]'")
    shown = lambda what: subprocess.run([tool, what, cutlass], capture_output=True, text=True, check=True).stdout
    used = [line for line in shown("-res-usage").splitlines() if "REG:" in line]
    assert len(used) == 4 and all("STACK:0" in line for line in used), used  # a product and its preparation, two dtypes
    functions = shown("-sass").split("Function : ")[1:]
    products = [text for text in functions if "GemmUniversal" in text.splitlines()[0]]
    assert len(functions) == 4 and len(products) == 2
    assert all("HGMMA.64x256x16.F32" in text and "UTMALDG" in text for text in products)
    assert sum("HGMMA.64x256x16.F32.BF16" in text for text in products) == 1


def test_cutlass_is_in_programs_for_a_gpu_that_is_not_there_and_gathers_nothing(cutlass):
    if reason := deviceless.why_not():
        pytest.skip(reason)
    run = functools.partial(GROUPED_MATMUL, implementation="cutlass")
    loss = lambda x, w, sizes: jnp.sum(run(x, w, sizes).astype(jnp.float32) ** 2)
    with jax.set_mesh(deviceless.mesh("h200")):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*FIT)
        assert lowered.compile().as_text().count('custom_call_target="grouped_gemm"') == 1
    assert all(f"grouped_matmul_backward_{name}" in lowered.as_text() for name in ("dx", "dw"))
    mesh = jax.sharding.Mesh(deviceless.devices("h200", 4), ("tensor",))
    specs = jax.P(), jax.P(None, None, "tensor"), jax.P()
    pieces = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=jax.P(None, "tensor"), check_vma=False)
    shapes = of(64, 32), of(4, 32, 64), of(4, dtype=jnp.int32)
    arrays = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))
        for a, spec in zip(shapes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(pieces).lower(*arrays).compile().as_text()
    assert "bf16[64,16]" in text and 'custom_call_target="grouped_gemm"' in text and "all-gather" not in text


def built_or_skipped(*arrays):
    """Builds CUTLASS's library where that is possible; skips what cannot run on this device."""
    if libraries.missing("cutlass") is None:
        libraries.build("cutlass")
    if reason := CUTLASS.unsupported(*arrays):
        pytest.skip(reason)


MANY = np.random.default_rng(0).multinomial(700, np.full(300, 1 / 300))  # more experts than threads that prepare them


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "rows, depth, columns, sizes",
    [
        (300, 64, 72, [0, 130, 0, 0, 170, 0]),
        (300, 152, 40, [100, 57]),
        (1, 8, 8, [0, 1, 0]),
        (20, 16, 32, [0, 0, 0]),
        (100, 64, 264, [70, 70, 5]),
        (800, 72, 520, MANY),
        (4096, 1152, 1536, [1, 2047, 0, 127, 129, 1000]),
    ],
    ids=["empty", "tail", "one", "none", "too many", "many", "large"],
)
def test_cutlass_agrees_on_the_gpu(rows, depth, columns, sizes, dtype):
    """The rule of test_ops.py, whose cases are run there too; what lies past the last row is NaN and gives zeros."""
    key_x, key_w = jax.random.split(jax.random.key(rows))
    x = jax.random.normal(key_x, (rows, depth)).at[sum(sizes) :].set(jnp.nan).astype(dtype)
    w = (jax.random.normal(key_w, (len(sizes), depth, columns)) * depth**-0.5).astype(dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    built_or_skipped(x, w, sizes)
    run = jax.jit(functools.partial(GROUPED_MATMUL, implementation="cutlass"))
    found = run(x, w, sizes)
    np.testing.assert_array_equal(found, run(x, w, sizes))
    wanted = np.asarray(GROUPED_MATMUL.reference(x.astype(jnp.float32), w.astype(jnp.float32), sizes))
    error = lambda y: np.max(np.abs(np.asarray(y, np.float32) - wanted))
    floor = 2 * float(jnp.finfo(dtype).eps) * np.max(np.abs(wanted))
    assert error(found) <= 2 * error(GROUPED_MATMUL.reference(x, w, sizes)) + floor
    assert np.all(np.asarray(found, np.float32)[int(sizes.sum()) :] == 0)


@pytest.mark.gpu
def test_cutlass_refuses_what_it_cannot_do_with_one_line():
    built_or_skipped(*FIT)
    x, w, sizes = (jnp.zeros(a.shape, a.dtype) for a in FIT)
    for arrays, reason in [
        ((x.astype(jnp.float32), w, sizes), "x must be bfloat16 or float16"),
        ((x, w.astype(jnp.float16), sizes), "w and y must have the dtype of x"),
        ((x, w, sizes.astype(jnp.uint32)), "group_sizes must be int32"),
        ((x, w[0], sizes), "the shapes must be x"),
        ((x, w, sizes[:3]), "do not fit together"),
        ((x[:, :12], w[:, :12], sizes), "multiples of 8"),
    ]:
        out = jax.ShapeDtypeStruct((64, 48), arrays[0].dtype)
        with pytest.raises(Exception, match=f"grouped_gemm: .*{reason}"):
            jax.block_until_ready(jax.ffi.ffi_call("grouped_gemm", out)(*arrays))
