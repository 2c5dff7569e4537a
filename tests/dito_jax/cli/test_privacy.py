"""`dito privacy plan` and `ledger`: figures that were asked for, and one line for what cannot be."""

import pytest

from dito_jax.privacy.accounting import noise_multiplier
from dito_jax.privacy.budget import Budget
from dito_jax.privacy.ledger import Ledger, ledger_path


@pytest.fixture
def dito_privacy(dito, tmp_path, monkeypatch):
    """`dito_privacy(*arguments)`: (exit code, stdout, stderr) of `dito privacy *arguments`, with ledgers of its own."""
    monkeypatch.setenv("DITO_LEDGERS", str(tmp_path / "ledgers"))
    return lambda *arguments: dito("privacy", *arguments)


@pytest.mark.parametrize("budget", ["-3", "nan", "0", "inf"])
def test_a_budget_that_cannot_be_is_not_entered(dito_privacy, budget):
    ledger = Ledger(ledger_path("digits"))
    ledger.set_budget(Budget(3.0, 1e-4, "example"))
    before = ledger.path.read_bytes()
    code, _, err = dito_privacy("ledger", "digits", f"--budget={budget}")
    assert code == 2 and err.endswith("wanted an epsilon above 0.\n") and ledger.path.read_bytes() == before


def test_a_budget_is_changed_and_the_old_one_stays_on_record(dito_privacy):
    Ledger(ledger_path("digits")).set_budget(Budget(3.0, 1e-4, "example"))
    code, out, _ = dito_privacy("ledger", "digits", "--budget", "4")
    assert code == 0 and "epsilon 0 of 4 at delta 0.0001" in out
    assert [entry["payload"]["epsilon"] for entry in Ledger(ledger_path("digits")).entries] == [3.0, 4.0]


def test_a_ledger_without_entries_is_one_line(dito_privacy):
    ledger_path("digits").parent.mkdir()
    ledger_path("digits").touch()
    code, _, err = dito_privacy("ledger", "digits")
    assert code == 2 and "empty, with no budget and no run; remove it" in err


@pytest.mark.slow("calibrates the noise of three plans")
@pytest.mark.recorded("dito_jax/cli", "dito_jax/privacy", "configs")
def test_the_plan_is_of_the_delta_and_epsilon_that_were_given(dito_privacy):
    asked = ["configs/digits.py", "--train.batch_size", "64", "--train.steps", "20", "--privacy.delta", "1e-4"]
    code, out, _ = dito_privacy("plan", *asked, "--epsilon", "2", "--delta", "1e-6")
    assert code == 0 and "1442 images, delta 1e-06" in out
    assert f"| 2 | 64 | 20 | {noise_multiplier(1442, 64, 20, 2.0, 1e-6):.4g} |" in out
    code, _, err = dito_privacy("plan", *asked, "--epsilon", "2", "--delta", "0")
    assert code == 2 and "delta" in err
    code, _, err = dito_privacy("plan", *asked, "--epsilon", "2", "--privacy.images_per_user", "3")
    assert code == 2 and "this data set has no owners of images" in err
