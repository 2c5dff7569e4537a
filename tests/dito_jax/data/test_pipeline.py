import itertools

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from dito_jax.data import DataError, DigitsData, arrays, batches
from dito_jax.data.transforms import random_flip
from dito_jax.errors import UserError


class Numbered:
    """Examples whose label is their number, and whose image shows whether it is mirrored."""

    image_shape = (1, 2, 1)
    augment = staticmethod(random_flip)

    def __init__(self, count):
        self.num_classes = count

    def __len__(self):
        return self.num_classes

    def __getitem__(self, index):
        return {"image": np.array([[[0], [1]]], np.float32), "label": np.int32(index)}


def take(iterator, steps):
    """The next `steps` batches as one: labels, and which were mirrored."""
    taken = list(itertools.islice(iterator, steps))
    return (
        np.concatenate([batch["label"] for batch in taken]),
        np.concatenate([batch["image"][:, 0, 0, 0] for batch in taken]),
    )


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


WHOLE = {"batch_size": 12, "seed": 3}


@pytest.mark.parametrize("process_count", [2, 3, 12])
def test_shares_of_the_processes_are_the_batch_of_one(process_count):
    whole = batches(Numbered(50), **WHOLE)
    shares = [
        batches(Numbered(50), **WHOLE, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    for _ in range(10):
        taken = [take(share, 1) for share in shares]
        assert_same(take(whole, 1), [np.concatenate(field) for field in zip(*taken, strict=True)])


def test_draws_do_not_depend_on_the_batch_size_or_on_threads():
    wanted = take(batches(Numbered(50), batch_size=12, seed=3), 10)
    assert_same(wanted, take(batches(Numbered(50), batch_size=120, seed=3), 1))
    assert_same(wanted, take(batches(Numbered(50), batch_size=1, seed=3, threads=0), 120))


def test_each_epoch_holds_every_example_once_in_a_new_order():
    labels, _ = take(batches(Numbered(50), batch_size=50, seed=0), 6)
    epochs = labels.reshape(6, 50)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(50), (6, 1)))
    assert len({epoch.tobytes() for epoch in epochs}) == 6


def test_seeds_share_no_epoch():
    epochs = [
        epoch.tobytes()
        for seed in range(4)
        for epoch in take(batches(Numbered(50), batch_size=50, seed=seed), 4)[0].reshape(4, 50)
    ]
    assert len(set(epochs)) == len(epochs)


def test_batch_may_be_larger_than_the_data_set():
    labels, _ = take(batches(Numbered(5), batch_size=17, seed=0), 5)
    np.testing.assert_array_equal(np.sort(labels.reshape(17, 5)), np.tile(np.arange(5), (17, 1)))


def test_flips_are_drawn_anew_for_every_draw_and_seed():
    _, mirrored = take(batches(Numbered(1), batch_size=400, seed=0), 2)
    _, of_another_seed = take(batches(Numbered(1), batch_size=400, seed=1), 2)
    for draws in (mirrored[:400], mirrored[400:], of_another_seed[:400]):
        assert abs(draws.sum() - 200) < 5 * 10  # a fair coin's standard deviation over 400 throws is 10
    assert np.any(mirrored[:400] != mirrored[400:])
    assert np.any(mirrored != of_another_seed)


def test_source_without_augmentation_is_left_alone():
    source = DigitsData().open("train")
    batch = next(batches(source, batch_size=len(source), seed=0))
    drawn, kept = (np.sort([image.tobytes() for image in data["image"]]) for data in (batch, arrays(source)))
    np.testing.assert_array_equal(drawn, kept)
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32


def test_state_and_start_resume_at_the_same_batch():
    run = batches(Numbered(50), **WHOLE)
    take(run, 7)
    state = run.get_state()
    wanted = take(run, 5)
    resumed = batches(Numbered(50), **WHOLE)
    take(resumed, 2)
    resumed.set_state(state)
    assert_same(wanted, take(resumed, 5))
    assert_same(wanted, take(batches(Numbered(50), **WHOLE, first_example=7 * 12), 5))


@pytest.mark.parametrize("process_count", [1, 2])
def test_another_batch_size_goes_on_with_the_next_example(process_count):
    """Example 84 is the first after seven batches of 12; batches of 20 begin within an epoch and within none of 12."""
    wanted = take(batches(Numbered(50), batch_size=1, seed=3, threads=0), 84 + 60)
    shares = [
        batches(Numbered(50), batch_size=20, seed=3, first_example=84, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    for number in range(3):
        taken = [take(share, 1) for share in shares]
        rows = slice(84 + 20 * number, 84 + 20 * (number + 1))
        assert_same([field[rows] for field in wanted], [np.concatenate(field) for field in zip(*taken, strict=True)])


def test_state_of_one_process_resumes_two():
    run = batches(Numbered(50), **WHOLE)
    take(run, 7)
    state = run.get_state()
    shares = [batches(Numbered(50), **WHOLE, process_index=i, process_count=2) for i in (0, 1)]
    for share in shares:
        share.set_state(state)
    taken = [take(share, 1) for share in shares]
    assert_same(take(run, 1), [np.concatenate(field) for field in zip(*taken, strict=True)])


def test_orbax_saves_and_restores_the_place(tmp_path):
    run = batches(Numbered(50), **WHOLE)
    take(run, 7)
    ocp.save_checkpointables(tmp_path / "7", {"data": run})
    wanted = take(run, 5)
    resumed = batches(Numbered(50), **WHOLE)
    ocp.load_checkpointables(tmp_path / "7", {"data": resumed})
    assert_same(wanted, take(resumed, 5))


@pytest.mark.parametrize("threads", [0, 4])
def test_error_of_the_source_arrives_unchanged(threads):
    class Broken(Numbered):
        def __getitem__(self, index):
            raise DataError("one line; what to do")

    with pytest.raises(DataError) as error:
        next(batches(Broken(3), batch_size=2, seed=0, threads=threads))
    assert str(error.value) == "one line; what to do"


@pytest.mark.parametrize(("batch_size", "process_count"), [(10, 4), (0, 1), (2, 4)])
def test_batch_that_does_not_divide_is_refused(batch_size, process_count):
    with pytest.raises(UserError, match=f"wanted a multiple of {process_count}"):
        batches(Numbered(50), batch_size=batch_size, seed=0, process_count=process_count)
