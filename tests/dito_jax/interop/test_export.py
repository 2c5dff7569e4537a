"""Artifacts: bit-identical results in a process without the model code; a changed byte is detected."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save

from dito_jax.errors import UserError
from dito_jax.evaluation.sample import make_sampler
from dito_jax.interop import artifact
from dito_jax.interop.export import exported_denoiser


pytestmark = [
    pytest.mark.optimized("an artifact's results are compared, to the bit, with those of another process"),
    pytest.mark.recorded("configs"),
]


@pytest.fixture
def sampler(artifact_of) -> Path:
    return artifact_of("sampler")


def recorded(directory: Path) -> list[np.ndarray]:
    """The inputs that an artifact was checked with."""
    held = load_file(directory / artifact.CHECK)
    return [held[f"input{i}"] for i in range(sum(name.startswith("input") for name in held))]


@pytest.mark.slow("trains and exports, with optimisation")
def test_the_sampler_draws_the_same_pictures_for_any_number_of_labels(config, trained, sampler):
    program, state = trained
    function, weights, manifest = artifact.load(sampler)
    draw = make_sampler(program.graph, config.model, config.sample, config.loss.prediction)
    for labels in ([3], [1, 2, 3, 4, 5]):
        index = np.arange(len(labels), dtype=np.int32)
        key = np.asarray(jax.random.key_data(jax.random.key(7)))
        found = jax.jit(function.call)(weights, np.array(labels, np.int32), key, index)
        np.testing.assert_allclose(found, draw(state.params, labels, 7), rtol=0, atol=2e-5)
    assert manifest["platforms"] == ["cpu", "cuda"] and "int32[batch]" in manifest["inputs"][0]
    assert set(manifest["weights"]) == set(weights) and any("qkv/kernel" in name for name in weights)


def test_a_process_without_our_code_runs_it_to_the_same_bits(sampler):
    program = (
        "import sys; from pathlib import Path; from dito_jax.interop.artifact import verify\n"
        "print(verify(Path(sys.argv[1])))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('flax', 'optax') or m.startswith('dito_jax.models')])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(sampler)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said, modules = done.stdout.splitlines()[-2:]
    assert said.endswith("intact, results are bit-identical.") and modules == "[]"


@pytest.mark.slow("compiles a train step and its export with optimisation")
def test_the_denoiser_is_the_network_and_the_step_is_the_step(trained, artifact_of):
    program, state = trained
    function, held, _ = artifact.load(artifact_of("denoiser"))
    inputs = recorded(artifact_of("denoiser"))
    z, t, label = (np.concatenate([x, x]) for x in inputs)  # another batch than it was checked with
    network = nnx.merge(program.graph, state.params)
    found = function.call(held, z, t, label)
    np.testing.assert_allclose(found, network(*map(jnp.asarray, (z, t, label))), rtol=0, atol=1e-5)
    assert np.abs(found).max() > 0.01

    function, held, _ = artifact.load(artifact_of("train_step"))
    batch = recorded(artifact_of("train_step"))
    after, metrics = function.call(held, *batch)
    named = dict(zip(sorted(program.batch), batch, strict=True))
    wanted, measured = program.step(jax.tree.map(jnp.copy, state), jax.tree.map(jnp.asarray, named))
    np.testing.assert_allclose(metrics["loss"], measured["loss"], rtol=1e-5)
    assert after["step"] == 1 == wanted.step
    leaves = jax.tree.leaves_with_path(wanted)
    assert len(leaves) == len(held)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_allclose(after[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)


FILES = [artifact.FUNCTION, artifact.WEIGHTS, artifact.CHECK]
OF_HOST = [f"host/{name}" for name in ("arguments.txt", "cpu.mlirbc", "cuda.mlirbc", "options.pb")]


@pytest.mark.parametrize("name", FILES + OF_HOST)
def test_one_flipped_bit_in_any_file_is_refused(sampler, name):
    path: Path = sampler / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 16
    path.write_bytes(changed)
    try:
        with pytest.raises(UserError, match=f"{name}: checksum mismatch: the file is damaged or was changed"):
            artifact.load(sampler)
    finally:
        path.write_bytes(whole)


@pytest.fixture
def rewritten(sampler):
    """`rewritten(name, bytes)`: a file of the artifact is another until the test ends."""
    before = {}

    def write(name: str, content: bytes) -> None:
        before.setdefault(name, (sampler / name).read_bytes())
        (sampler / name).write_bytes(content)

    yield write
    for name, content in before.items():
        (sampler / name).write_bytes(content)


def forge(rewritten, sampler, **changed) -> None:
    """A manifest that says otherwise, and is whole."""
    told = json.loads((sampler / artifact.MANIFEST).read_text()) | changed
    told.pop("sha256")
    rewritten(artifact.MANIFEST, json.dumps(told | {"sha256": artifact._digest(told)}).encode())


def test_no_flipped_bit_of_the_manifest_is_believed(sampler, rewritten):
    whole = (sampler / artifact.MANIFEST).read_bytes()
    meaning = json.loads(whole)
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        try:
            if json.loads(changed) == meaning:  # white space for white space
                continue
        except ValueError:
            pass
        rewritten(artifact.MANIFEST, changed)
        with pytest.raises(UserError, match="checksum mismatch|not an artifact"):
            artifact.load(sampler)


@pytest.mark.parametrize("content", [b"[1, 2]", b"{}", b'"files"', b'{"files": []}', b"\xff", b""])
def test_a_manifest_of_another_shape_is_one_line(sampler, rewritten, content):
    rewritten(artifact.MANIFEST, content)
    with pytest.raises(UserError, match=artifact.MANIFEST):
        artifact.load(sampler)


def test_a_folder_in_place_of_a_file_is_refused(sampler, tmp_path):
    copy = Path(shutil.copytree(sampler, tmp_path / "copy"))
    (copy / artifact.CHECK).unlink()
    (copy / artifact.CHECK).mkdir()
    with pytest.raises(UserError, match=f"{artifact.CHECK}: checksum mismatch"):
        artifact.load(copy)


def test_what_is_no_artifact_or_not_for_this_machine_is_said(sampler, rewritten, tmp_path):
    with pytest.raises(UserError, match="not an artifact .*make one with `dito export RUN -o DIR`"):
        artifact.load(tmp_path)
    forge(rewritten, sampler, platforms=["cuda"])
    with pytest.raises(UserError, match="exported for cuda, but this machine has cpu"):
        artifact.verify(sampler)


@pytest.mark.parametrize(("factor", "refused"), [(1 + 1e-5, False), (1.1, True), (np.nan, True)])
def test_results_of_another_machine_may_be_as_far_as_rounding(sampler, rewritten, factor, refused):
    held = load_file(sampler / artifact.CHECK)
    held["output0"] = np.asarray(held["output0"] * np.float32(factor))
    rewritten(artifact.CHECK, save(held))
    files = json.loads((sampler / artifact.MANIFEST).read_text())["files"]
    forge(rewritten, sampler, files=files | {artifact.CHECK: artifact._sha256(sampler / artifact.CHECK)})
    if refused:
        with pytest.raises(UserError, match="intact, but with jaxlib .* tolerance is 0.05"):
            artifact.verify(sampler)
    else:
        assert "intact; results differ by 1" in artifact.verify(sampler)


def test_how_far_apart_results_are():
    nan, inf = np.nan, np.inf
    for found, wanted, apart in [
        ([1.0, 2.0], [1.0, 4.0], 0.5), ([nan, 4.0], [nan, 4.0], 0.0), ([nan, 3.0], [nan, 4.0], 0.25),
        ([nan, 4.0], [1.0, 4.0], inf), ([1.0, 4.0], [nan, 4.0], inf), ([inf, 4.0], [inf, 4.0], 0.0),
        ([inf, 4.0], [1.0, 4.0], inf), ([1e-9], [0.0], inf), ([], [], 0.0), ([3], [4], 0.25),
    ]:  # fmt: skip
        assert artifact._difference(np.array(found), np.array(wanted)) == apart, (found, wanted)


def test_every_output_is_compared(artifact_of, tmp_path):
    """Not the first alone, nor those before one that is no number."""
    step = Path(shutil.copytree(artifact_of("train_step"), tmp_path / "step"))
    held = load_file(step / artifact.CHECK)
    last = max((name for name in held if name.startswith("output")), key=lambda name: int(name[6:]))
    held["output0"] = held["output0"] + np.asarray(1e-6, held["output0"].dtype)
    held[last] = np.full_like(held[last], np.nan)
    (step / artifact.CHECK).write_bytes(save(held))
    told = json.loads((step / artifact.MANIFEST).read_text())
    told.pop("sha256")
    told["files"][artifact.CHECK] = artifact._sha256(step / artifact.CHECK)
    (step / artifact.MANIFEST).write_text(json.dumps(told | {"sha256": artifact._digest(told)}))
    with pytest.raises(UserError, match="the results differ by inf of the largest"):
        artifact.verify(step)


def test_an_export_that_fails_leaves_what_was_there(sampler, config, trained):
    program, state = trained
    before = {path: path.read_bytes() for path in sampler.rglob("*") if path.is_file()}
    made = exported_denoiser(program.graph, state.params, config.model, ["cuda"])
    with pytest.raises(ValueError, match="cuda"):
        artifact.write(sampler, *made, {"what": "denoiser"})
    assert {path: path.read_bytes() for path in sampler.rglob("*") if path.is_file()} == before
