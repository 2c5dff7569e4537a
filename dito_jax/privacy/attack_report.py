"""What an attack's scores are worth: ROC figures with their uncertainty, and whether the split betrays its members.

    AUC           P(a member's score > a hold-out's), ties counting half
    accuracy      (TPR + TNR) / 2 of one threshold, chosen on other images than it is counted on
    TPR at FPR    members found by the lowest threshold that accuses at most that share of the hold-outs wrongly

Guarantees
----------
What the figures mean: how well *this* attack tells members from hold-outs. The AUC is an average over people, the TPR
at a low FPR is what a few of them suffer; the second is the one to look at (Carlini et al., arXiv 2112.03570).

Assumes: members and hold-outs are independent draws from one distribution. Published attacks that shine on another
split fall to chance on an unbiased one (CopyMark, arXiv 2410.03640): `split_check` looks for a split that betrays
members without any network, and figures beside a split that fails it mean nothing. Intervals cover the truth with the
confidence given, each by itself: by bootstrap for AUCs (exact, by pairs, where all pairs are ordered one way), exact
binomial (Clopper-Pearson) for shares. That of a TPR takes the threshold as given.

Cannot show: a bound on epsilon; who went in was not chosen by a coin (canaries.py does that). A share of n hold-outs
cannot be resolved below 1 / n: such a figure is None, with the reason.
"""

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dito_jax.errors import UserError


FALSE_POSITIVE_RATES = (0.01, 0.001)
RESAMPLES = 1000
FOLDS = 5
MOST_SIDE = 16  # pixels a side that the split's classifier looks at


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its interval; a figure that the data cannot give is None, and `reason` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        return (
            f"not resolved: {self.reason}"
            if self.value is None
            else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        )


@dataclasses.dataclass(frozen=True)
class AttackReport:
    """What one attack finds."""

    auc: Estimate
    accuracy: Estimate
    best_accuracy: float  # of the best threshold, counted where it was chosen, as papers do: above 1/2 by chance alone
    tpr_at_fpr: dict[str, Estimate]  # by FPR, "0.01"
    members: int
    validation: int
    confidence: float


@dataclasses.dataclass(frozen=True)
class SplitCheck:
    """Whether members and hold-outs can be told apart by their pixels alone."""

    split_auc: Estimate  # of a logistic regression on pixels, on folds that it was not fitted to
    brightness_p: float  # two-sample Kolmogorov-Smirnov test of the images' mean
    biased: bool


def attack_report(
    members: Float[np.ndarray, " members"],
    validation: Float[np.ndarray, " validation"],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> AttackReport:
    """The figures of an attack from its scores, larger for members.

    Raises:
      UserError: fewer than two scores of a kind.
    """
    if min(len(members), len(validation)) < 2:
        raise UserError(f"scores of {len(members)} members and {len(validation)} hold-outs: give at least 2 of each.")
    is_member = np.repeat([True, False], [len(members), len(validation)])
    false_rates, true_rates, _ = roc_curve(is_member, np.concatenate([members, validation]), drop_intermediate=False)
    return AttackReport(
        auc=auc(members, validation, confidence=confidence, seed=seed),
        accuracy=_accuracy(members, validation, confidence=confidence, seed=seed),
        best_accuracy=float(np.max(true_rates + 1 - false_rates) / 2),
        tpr_at_fpr={
            str(rate): _tpr(true_rates, false_rates, rate, len(members), len(validation), confidence)
            for rate in FALSE_POSITIVE_RATES
        },
        members=len(members),
        validation=len(validation),
        confidence=confidence,
    )


def auc(
    members: Float[np.ndarray, " members"],
    validation: Float[np.ndarray, " validation"],
    *,
    confidence: float,
    seed: int = 0,
) -> Estimate:
    """The area under the ROC curve, with the percentile bootstrap over members and hold-outs.

    Where every member lies above every hold-out, or below, each resample does too, and the bootstrap would claim
    certainty. Then the interval is the exact one of as many pairs as there are of the rarer kind: pairs that share no
    image are independent, and all of them are ordered one way.
    """
    is_member = np.repeat([1, 0], [len(members), len(validation)])
    value = float(roc_auc_score(is_member, np.concatenate([members, validation])))
    if value in (0.0, 1.0):
        pairs = min(len(members), len(validation))
        return _share(int(value) * pairs, pairs, confidence)
    found = scipy.stats.bootstrap(
        (members, validation), _auc_by_ranks, n_resamples=RESAMPLES, batch=50, vectorized=True, method="percentile",
        confidence_level=confidence, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(found.low), float(found.high))


def split_check(
    members: Float[np.ndarray, "members h w c"],
    validation: Float[np.ndarray, "validation h w c"],
    *,
    confidence: float = 0.99,
    seed: int = 0,
) -> SplitCheck:
    """Looks for a difference between the two sets that needs no network to be seen.

    A logistic regression on pixels (every so many, at most MOST_SIDE a side) is fitted to four fifths and asked about
    the last; its AUC is 1/2 where both sets come from one distribution. The split counts as biased where the interval
    of that AUC lies above 1/2, or the means of the images differ with a p-value below 1 - confidence.

    Raises:
      UserError: fewer than FOLDS images of a kind.
    """
    if min(len(members), len(validation)) < FOLDS:
        raise UserError(f"{len(members)} members and {len(validation)} hold-outs: give at least {FOLDS} of each.")
    images = np.concatenate([members, validation])
    is_member = np.repeat([True, False], [len(members), len(validation)])
    step = max(1, -(-max(images.shape[1:3]) // MOST_SIDE))
    pixels = images[:, ::step, ::step].reshape(len(images), -1)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    scores = cross_val_predict(classifier, pixels, is_member, cv=folds, method="decision_function")
    scores = np.asarray(scores)
    split_auc = auc(scores[is_member], scores[~is_member], confidence=confidence, seed=seed)
    brightness = images.mean(axis=(1, 2, 3), dtype=np.float64)
    _, p_value = map(float, scipy.stats.ks_2samp(brightness[is_member], brightness[~is_member]))
    assert split_auc.low is not None
    return SplitCheck(split_auc, p_value, biased=split_auc.low > 0.5 or p_value < 1 - confidence)


def share(hits: Bool[np.ndarray, " num"], *, confidence: float = 0.95) -> Estimate:
    """The share of True, with the exact binomial interval."""
    return _share(int(np.sum(hits)), len(hits), confidence)


def _share(successes: int, trials: int, confidence: float) -> Estimate:
    found = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return Estimate(successes / trials, float(found.low), float(found.high))


def _auc_by_ranks(members, validation, axis):
    """Mann-Whitney's U over the number of pairs, along the last axis."""
    assert axis in (-1, members.ndim - 1)
    count, others = members.shape[-1], validation.shape[-1]
    ranks = scipy.stats.rankdata(np.concatenate([members, validation], axis=-1), axis=-1)
    return (ranks[..., :count].sum(axis=-1) - count * (count + 1) / 2) / (count * others)


def _accuracy(members, validation, *, confidence: float, seed: int) -> Estimate:
    """Balanced accuracy of a threshold chosen on one half of each kind and counted on the other half.

    Its interval joins those of TPR and TNR, each at (1 + confidence) / 2, so that both hold together.
    """
    rng = np.random.default_rng(seed)
    members, validation = rng.permutation(members), rng.permutation(validation)
    half, others = len(members) // 2, len(validation) // 2
    is_member = np.repeat([True, False], [half, others])
    false_rates, true_rates, thresholds = roc_curve(is_member, np.concatenate([members[:half], validation[:others]]))
    threshold = thresholds[np.argmax(true_rates - false_rates)]
    each = (1 + confidence) / 2
    found, spared = (
        share(members[half:] >= threshold, confidence=each),
        share(validation[others:] < threshold, confidence=each),
    )
    middle = lambda name: (getattr(found, name) + getattr(spared, name)) / 2
    return Estimate(middle("value"), middle("low"), middle("high"))


def _tpr(true_rates, false_rates, rate: float, members: int, validation: int, confidence: float) -> Estimate:
    """The largest TPR whose FPR is at most `rate`."""
    if validation * rate < 1:
        reason = f"{validation} hold-outs cannot resolve a false positive rate of {rate}; it takes {round(1 / rate)}"
        return Estimate(None, reason=reason)
    best = float(np.max(true_rates[false_rates <= rate]))
    return _share(round(best * members), members, confidence)
