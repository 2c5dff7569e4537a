"""Membership inference results: AUC, accuracy and TPR at low FPR with confidence intervals, and a check of the split.

    AUC           P(score of a member > score of a non-member), ties counting half
    accuracy      (TPR + TNR) / 2 of one threshold, chosen on other images than those it is evaluated on
    TPR at FPR    TPR of the lowest threshold whose FPR is at most the given one

Non-members are validation images.

Guarantees
----------
Meaning: how well *this* attack distinguishes members from non-members. The AUC is an average over all people; the TPR
at a low FPR shows the risk of a few of them and is the more relevant result (Carlini et al., arXiv 2112.03570).

Assumptions: members and non-members are independent samples of one distribution. Published attacks that succeed on a
biased split are at chance level on an unbiased one (CopyMark, arXiv 2410.03640). `split_check` looks for a split in
which members can be recognized without a network; results for a split that fails this check are invalid. Each interval
separately has the stated confidence: bootstrap for AUCs (exact, by pairs, if all pairs are ordered the same way), exact
binomial (Clopper-Pearson) for shares. The interval of a TPR takes the threshold as fixed.

Cannot show: a bound on epsilon, because members were not chosen at random (canaries.py does that). A share of n
non-members cannot be resolved below 1 / n: such a value is None, with the reason.
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
MOST_SIDE = 16  # maximum image side in pixels for the classifier of split_check


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; None if the data cannot resolve it, with the `reason`."""

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
    """Results of one attack."""

    auc: Estimate
    accuracy: Estimate
    best_accuracy: float  # of the best threshold on the same images, as in papers: biased above 1/2
    tpr_at_fpr: dict[str, Estimate]  # by FPR as text, "0.01"
    members: int
    validation: int
    confidence: float


@dataclasses.dataclass(frozen=True)
class SplitCheck:
    """Whether members and non-members can be distinguished by their pixels alone."""

    split_auc: Estimate  # of a logistic regression on pixels, with cross-validation
    brightness_p: float  # two-sample Kolmogorov-Smirnov test of the images' mean
    biased: bool


def attack_report(
    members: Float[np.ndarray, " members"],
    validation: Float[np.ndarray, " validation"],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> AttackReport:
    """The results of an attack from its scores, which should be larger for members.

    Raises:
      UserError: fewer than two members or non-members.
    """
    if min(len(members), len(validation)) < 2:
        raise UserError(
            f"scores of {len(members)} members and {len(validation)} non-members: wanted at least 2 of each."
        )
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
    """The area under the ROC curve, with a percentile bootstrap interval over members and non-members.

    If all members score above all non-members, or below, every resample does too, and the bootstrap interval would
    have width zero. The interval is then the exact binomial one of min(members, non-members) disjoint pairs, which are
    independent and all ordered the same way.
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
    """Checks whether members and non-members differ without any network (a biased split).

    A logistic regression on pixels (subsampled to at most MOST_SIDE per side) is cross-validated with five folds; its
    AUC is 1/2 if both sets have the same distribution. The split is biased if the interval of this AUC lies above 1/2,
    or if the distributions of the mean brightness differ with a p-value below 1 - confidence.

    Raises:
      UserError: fewer than FOLDS members or non-members.
    """
    if min(len(members), len(validation)) < FOLDS:
        raise UserError(f"{len(members)} members and {len(validation)} non-members: wanted at least {FOLDS} of each.")
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
    """The share of True with its exact binomial (Clopper-Pearson) interval."""
    return _share(int(np.sum(hits)), len(hits), confidence)


def _share(successes: int, trials: int, confidence: float) -> Estimate:
    found = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return Estimate(successes / trials, float(found.low), float(found.high))


def _auc_by_ranks(members, validation, axis):
    """The AUC along the last axis: Mann-Whitney's U divided by the number of pairs."""
    assert axis in (-1, members.ndim - 1)
    count, others = members.shape[-1], validation.shape[-1]
    ranks = scipy.stats.rankdata(np.concatenate([members, validation], axis=-1), axis=-1)
    return (ranks[..., :count].sum(axis=-1) - count * (count + 1) / 2) / (count * others)


def _accuracy(members, validation, *, confidence: float, seed: int) -> Estimate:
    """Balanced accuracy of a threshold that is chosen on one half of each set and evaluated on the other half.

    The interval combines those of TPR and TNR, each at confidence (1 + confidence) / 2, so that both hold together.
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
        reason = (
            f"{validation} non-members cannot resolve a false positive rate of {rate}; {round(1 / rate)} are needed"
        )
        return Estimate(None, reason=reason)
    best = float(np.max(true_rates[false_rates <= rate]))
    return _share(round(best * members), members, confidence)
