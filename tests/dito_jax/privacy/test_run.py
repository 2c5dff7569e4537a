"""A private run: plan, charges before each batch, and the errors at a start or a restart."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from dito_jax import distributed
from dito_jax.data import DigitsData
from dito_jax.errors import UserError
from dito_jax.privacy import agreement
from dito_jax.privacy.accounting import Release, epsilon, remaining_steps
from dito_jax.privacy.budget import Budget, rounded_up
from dito_jax.privacy.ledger import Ledger, ledger_path
from dito_jax.privacy.run import PLAN, PrivateRun, check_history, make_plan
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import LoopConfig


pytestmark = pytest.mark.recorded


# With room for all, so that nothing is truncated: accounting for that takes half a minute.
PRIVACY = PrivacyConfig(epsilon=3.0, delta=1e-4, dataset="digits", max_batch=2000)
LOOP = LoopConfig(steps=6, batch_size=64)
SOURCE = DigitsData().open("train")


@pytest.fixture(autouse=True)
def homes(tmp_path, monkeypatch):
    monkeypatch.setenv("DITO_LEDGERS", str(tmp_path / "ledgers"))
    monkeypatch.setenv("DITO_SECRETS", str(tmp_path / "secrets"))


@pytest.fixture
def begun(tmp_path):
    """Makes a run, the same one again for the same name."""

    def make(name="a", privacy=PRIVACY, loop=LOOP, source=SOURCE, multiple=8, **more):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        return PrivateRun(privacy, loop, source, RunDirectory(path), multiple=multiple, **more)

    return make


def taken(run, steps, after=0):
    return list(itertools.islice(run.batches_after(after, 0, 1), steps))


def spent():
    return Ledger(ledger_path("digits")).spent()


@pytest.mark.slow("calibrates the noise of several plans")
def test_the_plan_spends_its_budget_and_no_more(begun):
    run = begun(privacy=dataclasses.replace(PRIVACY, max_batch=None))
    assert 64 < run.plan.max_batch < 150
    assert 2.99 < epsilon({run.release: LOOP.steps}, PRIVACY.delta) <= 3
    assert run.plan.expected_batch == pytest.approx(64) and run.plan.max_batch % 8 == 0
    spare = make_plan(dataclasses.replace(PRIVACY, spare_steps=6), LOOP, len(SOURCE), 8)
    assert 2.99 < epsilon({Release(spare.sampling_prob, spare.noise_multiplier): 12}, PRIVACY.delta) <= 3


def test_accumulated_parts_do_not_make_the_batch_that_is_accounted(begun):
    """q is that of the logical step: a batch in four parts is one draw, not four."""
    whole, parts = begun().plan, begun("b", loop=dataclasses.replace(LOOP, gradient_accumulation_steps=4)).plan
    assert whole == parts


def test_every_batch_was_paid_for_before_it_left(begun):
    run = begun()
    for number, _ in enumerate(itertools.islice(run.batches_after(0, 0, 1), 4), start=1):
        assert spent() == {run.release: number}


def test_a_run_goes_on_with_other_keys_and_pays_again_for_what_it_does_again(begun):
    spare = dataclasses.replace(PRIVACY, spare_steps=4)
    first = taken(begun(privacy=spare), 4)
    again = taken(begun(privacy=spare), 2, after=2)
    assert sum(spent().values()) == 6
    assert not np.array_equal(first[2]["noise_key"], again[0]["noise_key"])
    assert not np.array_equal(first[2]["padding"], again[0]["padding"]) or not np.array_equal(
        first[2]["image"], again[0]["image"]
    )


def test_steps_taken_again_in_one_process_have_other_keys_and_are_paid_for_again(begun):
    """As after a rollback: the update of a step must not be published twice with the same noise."""
    run = begun(privacy=dataclasses.replace(PRIVACY, spare_steps=4))
    first, again = taken(run, 4), taken(run, 2, after=2)
    for name in ("noise_key", "draw_key", "padding"):
        assert not np.array_equal(first[2][name], again[0][name]), name
    ledger = Ledger(ledger_path("digits"))
    assert sum(ledger.spent().values()) == 6 and ledger.restarts(run.name) == 2


def test_other_processes_draw_by_the_name_that_the_first_has_given_the_run(begun, monkeypatch):
    first = taken(begun("a"), 1)[0]
    told = distributed.published("private")["1"]
    elsewhere = begun("b")  # which saw no privacy.json when it began, and made up a name
    monkeypatch.setattr(agreement, "index", lambda: 1)
    monkeypatch.setattr(agreement, "published", lambda prefix: {"1": told})
    same = taken(elsewhere, 1)[0]
    for name, value in first.items():
        np.testing.assert_array_equal(same[name], value)


def test_a_run_goes_on_with_devices_that_its_room_does_not_divide_into(begun):
    of_eight = begun()
    (whole,) = taken(of_eight, 1)
    of_seven = begun(multiple=7)
    (padded,) = taken(of_seven, 1, after=1)
    assert of_eight.plan == of_seven.plan and of_eight.plan.max_batch == 2000
    assert len(whole["padding"]) == 2000 and len(padded["padding"]) == 2002 and padded["padding"][2000:].all()
    seventh = next(of_seven.batches_after(2, 6, 7))
    assert len(seventh["padding"]) == 286


def test_one_data_set_has_one_ledger_whatever_it_is_called(begun):
    taken(begun("a", data="/faces"), 1)
    other = dataclasses.replace(PRIVACY, dataset="other")
    with pytest.raises(
        UserError, match="dataset is 'other', but runs on /faces were charged to .*digits.jsonl: a data set"
    ):
        begun("b", privacy=other, data="/faces").batches_after(0, 0, 1)
    assert not Ledger(ledger_path("other")).spent()
    taken(begun("c", privacy=other, data="/birds"), 1)
    (ledger_path("other").parent / "damaged.jsonl").write_text("no ledger\n")
    taken(begun("d", privacy=dataclasses.replace(PRIVACY, dataset="third"), data="/fish"), 1)


def test_a_start_on_the_same_data_must_be_in_the_same_ledger(begun):
    with pytest.raises(UserError, match="it lacks run lost, which this run starts from"):
        begun("a", starts_from=["lost"]).batches_after(0, 0, 1)


def test_whatever_it_was_started_from_until_a_checkpoint_counts(begun, tmp_path):
    first, second = begun("first"), begun("second")
    Ledger(ledger_path("digits")).set_budget(Budget(20.0, 1e-4, "example"))
    taken(first, 1)
    taken(second, 1)
    taken(begun("run", starts_from=[first.name]), 1)
    taken(begun("run", starts_from=[second.name]), 1)
    assert json.loads((tmp_path / "run" / PLAN).read_text())["starts_from"] == [first.name, second.name]


def test_a_directory_is_private_from_its_first_step_or_never(begun, tmp_path):
    run = begun("private")
    check_history(RunDirectory(tmp_path / "private"), private=False)  # nothing was promised yet
    taken(run, 1)
    with pytest.raises(UserError, match="a private run, whose guarantee a non-private step would break"):
        check_history(RunDirectory(tmp_path / "private"), private=False)
    check_history(RunDirectory(tmp_path / "private"), private=True)
    (tmp_path / "public/checkpoints").mkdir(parents=True)
    for private in (True, False):
        check_history(RunDirectory(tmp_path / "public"), private=private)
    (tmp_path / "public/checkpoints/4").mkdir()
    check_history(RunDirectory(tmp_path / "public"), private=False)
    with pytest.raises(UserError, match="its steps so far were not private"):
        check_history(RunDirectory(tmp_path / "public"), private=True)


def test_a_run_that_its_ledger_refuses_leaves_nothing_in_its_directory(begun, tmp_path):
    taken(begun(), 6)
    with pytest.raises(UserError, match="0 remain"):
        begun("b").batches_after(0, 0, 1)
    assert list((tmp_path / "b").iterdir()) == []


def test_ledgers_of_others_are_neither_changed_nor_needed(begun, tmp_path):
    folder = ledger_path("digits").parent
    taken(begun(data="/faces"), 1)
    torn = folder / "torn.jsonl"
    torn.write_bytes(ledger_path("digits").read_bytes().replace(b"/faces", b"/birds") + b'{"half')
    before = torn.read_bytes()
    (folder / "folder.jsonl").mkdir()
    (folder / "dangling.jsonl").symlink_to(folder / "nowhere")
    other = dataclasses.replace(PRIVACY, dataset="other")
    for data in ("/faces/train", "/birds"):
        with pytest.raises(UserError, match=f"runs on {data} were charged to"):
            begun("b", privacy=other, data=data).batches_after(0, 0, 1)
    taken(begun("b", privacy=other, data="/fish"), 1)
    assert torn.read_bytes() == before


def test_keys_are_of_the_run_and_of_no_config(begun):
    one, other = taken(begun("a"), 1)[0], taken(begun("b", privacy=dataclasses.replace(PRIVACY, dataset="b")), 1)[0]
    assert not np.array_equal(one["noise_key"], other["noise_key"])


def test_the_budget_ends_a_run_between_steps(begun):
    """Steps that a crash made it do again were not planned for."""
    taken(begun(), 5)
    run = begun()
    with pytest.raises(UserError, match=r"6 steps at noise .* would exceed epsilon 3 .*: 1 remain"):
        run.batches_after(0, 0, 1)
    Ledger(ledger_path("digits")).set_budget(Budget(3.5, 1e-4, "example"))
    batches = begun().batches_after(4, 0, 1)
    with pytest.raises(UserError, match="would exceed epsilon 3.5 .*0 steps remain"):
        for _ in batches:
            pass
    total = Ledger(ledger_path("digits")).spent()
    assert sum(total.values()) >= 7 and epsilon(total, 1e-4) <= 3.5
    assert epsilon({release: steps + 1 for release, steps in total.items()}, 1e-4) > 3.5


def test_a_second_run_on_the_data_finds_what_the_first_has_left(begun):
    taken(begun(), 6)
    with pytest.raises(UserError, match="would exceed epsilon 3 .*: 0 remain"):
        begun("b").batches_after(0, 0, 1)


def test_a_second_run_is_told_at_its_start_that_both_do_not_fit(begun, tmp_path, capsys):
    """Each fits alone. The first has taken one of its six steps when the second starts."""
    Ledger(ledger_path("digits")).set_budget(Budget(3.5, 1e-4, "example"))
    first = begun("first")
    taken(first, 1)
    assert capsys.readouterr().err == ""
    second = begun("second")
    batches = second.batches_after(0, 0, 1)
    said = capsys.readouterr().err
    left = remaining_steps({first.release: 6}, second.release, 3.5, 1e-4)
    assert f"(run {first.name[:8]}: 5 steps): {left} remain if those are taken" in said and said.count("\n") == 1
    whole = epsilon({first.release: 12}, 1e-4)
    assert f"need a budget of epsilon {rounded_up(whole)}" in said and 0 <= float(rounded_up(whole)) - whole < 0.01
    assert said.strip() in (tmp_path / "second" / "events.jsonl").read_text()
    next(batches)
    second.batches_after(1, 0, 1)  # after a rollback it is not said again
    assert capsys.readouterr().err == ""


def test_settings_that_the_noise_was_chosen_for_cannot_change_on_the_way(begun):
    taken(begun(), 1)
    for changed in ({"clip_norm": 2.0}, {"epsilon": 4.0}):
        with pytest.raises(UserError, match=f"privacy.{next(iter(changed))} changed since this private run was st"):
            begun(privacy=dataclasses.replace(PRIVACY, **changed))
    with pytest.raises(UserError, match="train.batch_size, train.steps changed"):
        begun(loop=LoopConfig(steps=7, batch_size=32))


def test_a_ledger_that_lacks_what_the_run_saw_is_refused(begun):
    taken(begun(), 4)
    path = ledger_path("digits")
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-1]))
    with pytest.raises(UserError, match="3 steps of this run are charged, but it has taken 4"):
        begun().batches_after(4, 0, 1)
    path.write_text("".join(whole[:1]))
    with pytest.raises(UserError, match="entry 2 differs from the one that this run recorded"):
        begun().batches_after(4, 0, 1)
    path.unlink()
    with pytest.raises(UserError, match="differs from the one that this run recorded"):
        begun().batches_after(4, 0, 1)


def test_a_budget_of_another_unit_or_delta_is_refused(begun):
    Ledger(ledger_path("digits")).set_budget(Budget(3.0, 1e-5, "example"))
    with pytest.raises(UserError, match="delta of 1e-05 and the unit 'example', the run has 0.0001"):
        begun().batches_after(0, 0, 1)


class Owned:
    """Digits that belong to forty users."""

    image_shape, num_classes, augment = SOURCE.image_shape, SOURCE.num_classes, None
    owners = np.arange(len(SOURCE)) % 40

    def __len__(self):
        return len(SOURCE)

    def __getitem__(self, index):
        return SOURCE[index]


def test_users_are_units_of_many_images(begun):
    privacy = dataclasses.replace(PRIVACY, images_per_user=3)
    run = begun(privacy=privacy, loop=LoopConfig(steps=3, batch_size=10), source=Owned())
    assert len(run.units) == 40 and run.plan.sampling_prob == 0.25
    batch = taken(run, 1)[0]
    assert batch["image"].shape == (run.plan.max_batch, 3, 8, 8, 1)
    assert Ledger(ledger_path("digits")).budget == Budget(3.0, 1e-4, "user")
    with pytest.raises(UserError, match="this data set has no owners of images"):
        begun("b", privacy=privacy)


def test_what_a_delta_or_a_batch_cannot_be_is_one_line():
    with pytest.raises(UserError, match="delta 0.01 is not below 1/"):
        make_plan(dataclasses.replace(PRIVACY, delta=0.01), LOOP, len(SOURCE), 8)
    with pytest.raises(UserError, match="batch_size 5000 is more than the"):
        make_plan(PRIVACY, LoopConfig(steps=3, batch_size=5000), len(SOURCE), 8)


def test_what_is_kept_with_the_run_has_no_secret(begun, tmp_path):
    run = begun()
    taken(run, 1)
    secret = (tmp_path / "secrets" / run.name).read_bytes().hex()
    kept = (tmp_path / "a" / PLAN).read_text() + ledger_path("digits").read_text()
    assert secret not in kept and json.loads((tmp_path / "a" / PLAN).read_text())["run"] == run.name
