"""`dito sample`: the files, their form, what they are drawn from; independent of batches; nothing is overwritten."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from dito_jax import load_run
from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.config import TrainConfig, to_json
from dito_jax.data import DigitsData, LatentsData
from dito_jax.evaluation.sample import SampleConfig, make_sampler
from dito_jax.models.dit import DiTConfig
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.training.program import LoopConfig, make_program


pytestmark = pytest.mark.recorded


SAMPLE = SampleConfig(sampler="euler", steps=2, batch_size=3)
CONFIG = TrainConfig(
    model=DiTConfig((4, 4, 1), num_classes=10, patch=2, depth=1, width=32, num_heads=2),
    data=DigitsData(),
    train=LoopConfig(steps=4, batch_size=8, compute_dtype="float32", ema_decays=(0.5,)),
    sample=SAMPLE,
)
LATENT = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, image_shape=(4, 4, 4)),
    data=LatentsData("x.npz", scaling_factor=0.5),
)


def written(path, config):
    """A run directory with one checkpoint whose parameters are random and whose EMA is another."""
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with jax.set_mesh(mesh):
        state = make_program(config.model, config.loss, config.optimizer, config.train, mesh, config.guard).init()
        rng = np.random.default_rng(0)
        random = lambda leaf: jax.numpy.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32))
        params, ema = (jax.tree.map(random, state.params) for _ in range(2))
        checkpoints = Checkpoints(path / "checkpoints", config.checkpoint)
        checkpoints.save(
            4, dataclasses.replace(state, params=params, ema={"0.5": ema}, step=state.step + 4), metadata={}
        )
        checkpoints.close()
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return written(tmp_path_factory.mktemp("runs") / "images", CONFIG)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return written(tmp_path_factory.mktemp("runs") / "latents", LATENT)


def test_npz_for_evaluators_has_pixels_and_labels_and_does_not_depend_on_batches(run, dito, tmp_path):
    code, said, _ = dito("sample", str(run), "--num", "11", "--npz", "--seed", "5", "--out", str(tmp_path / "a.npz"))
    assert code == 0 and said == f"{tmp_path / 'a.png'}, {tmp_path / 'a.npz'}\n"
    loaded = load_run(run)
    labels = [*range(10), 0]
    whole = make_sampler(loaded.graph, CONFIG.model, dataclasses.replace(SAMPLE, batch_size=100), "x")
    images = np.clip(whole(loaded.params, labels, 5), -1, 1)
    assert images.std() > 0.1
    with np.load(tmp_path / "a.npz") as drawn:
        assert sorted(drawn) == ["arr_0", "arr_1"] and drawn["arr_1"].tolist() == labels
        pixels = drawn["arr_0"]
    assert pixels.shape == (11, 4, 4, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels / 127.5 - 1, images.repeat(3, axis=-1), atol=0.51 / 127.5)
    np.testing.assert_allclose(loaded.sample(labels, seed=5), images, atol=1e-5)
    first = next(loaded.sample_batches([0] * 1_000_000, seed=5))  # the others are not drawn
    np.testing.assert_allclose(first[0], images[0], atol=1e-5)
    np.testing.assert_allclose(np.concatenate(list(loaded.sample_batches(labels[:2], seed=5))), images[:2], atol=1e-5)


def test_a_grid_has_the_first_hundred_and_no_file_is_overwritten(run, dito, tmp_path):
    for _ in range(2):
        assert dito("sample", str(run), "--num", "120", "--steps", "1", "--class", "3", "--out", str(tmp_path))[0] == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    stem = "step_4_seed_0_steps_1_class_3"
    assert names == [f"{stem}.npz", f"{stem}.png", f"{stem}_2.npz", f"{stem}_2.png"]
    with np.load(tmp_path / names[0]) as drawn:
        assert drawn["images"].shape == (120, 4, 4, 1) and drawn["images"].dtype == np.float32
        assert set(drawn["labels"].tolist()) == {3}
    with Image.open(tmp_path / names[1]) as picture:
        assert picture.size == (10 * 66 + 2, 10 * 66 + 2)


def test_the_parameters_themselves_are_sampled_without_ema(run, dito, tmp_path):
    assert dito("sample", str(run), "--num", "3", "--no-ema", "--out", str(tmp_path))[0] == 0
    with np.load(tmp_path / "step_4_seed_0_no_ema.npz") as drawn:
        images = drawn["images"]
    raw, ema = load_run(run, ema=False), load_run(run)
    np.testing.assert_allclose(images, raw.sample([0, 1, 2]), atol=1e-5)
    assert np.abs(images - ema.sample([0, 1, 2])).max() > 0.01
    code, _, said = dito("sample", str(run), "--no-ema", "--ema-decay", "0.5")
    assert code == 2 and "choose one of the two" in said.splitlines()[-1]


def test_latents_are_scaled_back_as_the_decoder_and_the_data_have_them(latent, dito, tmp_path):
    code, said, _ = dito("sample", str(latent), "--num", "40", "--steps", "1", "--out", str(tmp_path / "l.npz"))
    assert code == 0 and "latents divided by data.scaling_factor 0.5" in said.splitlines()[-1]
    loaded = load_run(latent)
    scaled = make_sampler(loaded.graph, LATENT.model, dataclasses.replace(SAMPLE, steps=1), "x")(
        loaded.params, [i % 10 for i in range(40)], 0
    )
    with np.load(tmp_path / "l.npz") as drawn:
        np.testing.assert_allclose(drawn["latents"], scaled / 0.5, rtol=1e-5)
    again = LatentsData(str(tmp_path / "l.npz"), scaling_factor=0.5).open("train")[0]  # the form of a data set
    np.testing.assert_allclose(again["image"], scaled[0], rtol=1e-5)
    assert (tmp_path / "l.png").exists()


def test_latents_are_no_pixels_and_nothing_is_written(latent, dito, tmp_path):
    code, _, said = dito("sample", str(latent), "--npz", "--out", str(tmp_path / "new"))
    assert code == 2 and "have 4 channels and are no pixels; leave out --npz" in said.splitlines()[-1]
    assert not list(tmp_path.iterdir())
