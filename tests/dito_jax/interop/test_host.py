"""Files for a host without Python: the list of arguments matches the module, whose results match the recorded ones."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib import xla_client
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo
from safetensors.numpy import load_file

from dito_jax.errors import UserError
from dito_jax.interop import artifact, host
from dito_jax.interop.export import exported_denoiser


pytestmark = pytest.mark.optimized("an artifact's results are compared, to the bit, with those of another process")


ROOT = Path(__file__).parents[3]


def parsed(path) -> tuple[ir.FunctionType, str]:
    """The type of the module's main function, and the module as text."""
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        sdy.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, path.read_bytes())
        (main,) = (op for op in module.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main")
        return ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value), str(module)


WHAT = pytest.mark.parametrize("what", ["denoiser", "sampler", "train_step"])


@WHAT
def test_the_list_has_every_array_in_the_order_of_the_function(artifact_of, listed, what):
    directory = artifact_of(what)
    weights, check = load_file(directory / artifact.WEIGHTS), load_file(directory / artifact.CHECK)
    of_inputs = [name for name in check if name.startswith("input")]
    wanted = [weights[name] for name in sorted(weights)] + [check[f"input{i}"] for i in range(len(of_inputs))]
    for kind, arrays in (
        ("input", wanted),
        ("output", [check[f"output{i}"] for i in range(len(check) - len(of_inputs))]),
    ):
        found = listed(directory, kind)
        assert len(found) == len(arrays)
        for a, b in zip(found, arrays, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@WHAT
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_module_has_these_arguments_and_no_free_shape(artifact_of, listed, what, platform):
    directory = artifact_of(what)
    main, text = parsed(directory / f"host/{platform}.mlirbc")
    assert "tensor<?" not in text and "x?x" not in text and "platform_index" not in text
    for types, kind in ((main.inputs, "input"), (main.results, "output")):
        shapes = [tuple(ir.RankedTensorType(its_type).shape) for its_type in types]
        assert shapes == [array.shape for array in listed(directory, kind)]


@pytest.mark.parametrize("what", ["denoiser", "sampler", pytest.param("train_step", marks=pytest.mark.slow)])
def test_the_module_gives_what_was_recorded_where_jax_only_hands_it_to_xla(artifact_of, listed, what):
    directory, device = artifact_of(what), jax.devices()[0]
    options = xla_client.CompileOptions.ParseFromString((directory / "host/options.pb").read_bytes())
    code = (directory / "host/cpu.mlirbc").read_bytes()
    program = device.client.compile_and_load(code, xla_client.DeviceList((device,)), options)
    found = program.execute([jax.device_put(array, device) for array in listed(directory, "input")])
    wanted = listed(directory, "output")
    assert any(np.abs(array.astype(np.float64)).max() > 0.01 for array in wanted)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5)


def test_the_options_are_of_one_device_and_hold_no_flag_of_the_exporting_machine():
    understood = xla_client.CompileOptions.ParseFromString(host.OPTIONS)
    assert understood.SerializeAsString() == host.OPTIONS and len(host.OPTIONS) < 20  # XLA's flags are a thousand bytes
    assert (understood.num_replicas, understood.num_partitions) == (1, 1)


def test_what_an_earlier_export_left_goes(config, trained, tmp_path):
    left = tmp_path / "host" / "cuda.mlirbc"
    left.parent.mkdir()
    left.write_bytes(b"of other weights")
    (left.parent / "mine.txt").write_text("a user's")
    program, state = trained
    made = exported_denoiser(program.graph, state.params, config.model, ("cpu",))
    with pytest.raises(UserError, match=r"has host/mine\.txt, which is no file of an artifact and would be deleted"):
        artifact.write(tmp_path, *made, {"what": "denoiser"})
    assert left.exists()
    (left.parent / "mine.txt").unlink()
    artifact.write(tmp_path, *made, {"what": "denoiser"})
    assert sorted(path.name for path in left.parent.iterdir()) == ["arguments.txt", "cpu.mlirbc", "options.pb"]
    _, _, manifest = artifact.load(tmp_path)
    assert "host/cpu.mlirbc" in manifest["files"]


def test_a_dtype_that_the_host_does_not_know_is_refused():
    known = re.findall(r'{"(\w+)", PJRT_Buffer_Type', (ROOT / "examples/pjrt_host/main.cc").read_text())
    assert list(host.DTYPES) == known
    with pytest.raises(UserError, match="an array has dtype float16; a host without Python supports float32"):
        host._line("input", "weights.safetensors", (0, 6), jax.core.ShapedArray((3,), jnp.float16))
