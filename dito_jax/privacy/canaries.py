"""Canaries: examples included in training at random, whose traces give empirical lower bounds on epsilon.

There are two kinds. EXAMPLE canaries are random images, each included in the training data with probability 1/2
(`CanarySource`); the trained network's loss on them shows which were included. They audit a whole run, once. GRADIENT
canaries (`audit_mechanism`) are vectors, one direction each, passed directly to the code that clips, sums and adds
noise; the released sums show which were included. They audit that code in seconds, without a network.

In both cases an adversary guesses which canaries were included, and (epsilon, delta)-DP limits how many guesses can be
right. Three bounds, computed by jax-privacy's auditor, turn the right guesses into a lower bound on epsilon:

    one_run            Steinke, Nasr, Jagielski, arXiv 2305.08846
    one_run_fdp        Mahloujifar, Melis, Chaudhuri, arXiv 2410.22235
    clopper_pearson    from TPR and FPR of the best threshold: Nasr et al., arXiv 2101.04535

Guarantees
----------
Meaning of a bound: with probability `confidence` over the inclusions and the noise, for all three bounds together
(each uses a third of the significance), the audited run is *not* (epsilon, delta)-DP for any epsilon below the bound.
A bound above the claimed epsilon refutes the claim: there is a bug, or the accounting does not match the run.

Assumptions: each inclusion is an independent fair coin flip that the audited code does not know. `one_run` needs only
this. `one_run_fdp` refutes that the mechanism is as private as a Gaussian one with this (epsilon, delta).
`clopper_pearson` assumes that the scores of different canaries are independent, as for orthogonal directions with
independent noise.

Cannot show: that the claim is true. The bounds for a correct mechanism are far below its epsilon: with 5,000 directions
they are 2.4, 4.9 and 3.6 for a true epsilon of 10. The audit detects bugs; tests apply it to mechanisms with planted
bugs. It detects too little noise and too large contributions; it does not detect too much noise. That two releases use
the same noise is detected only with `alternate`. Example canaries count in the size of the training set and may reduce
the quality of the run.
"""

import dataclasses
import hashlib
import hmac
import json
import uuid
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from dito_jax.data import Example, Source, class_names
from dito_jax.errors import UserError
from dito_jax.privacy.agreement import agreed
from dito_jax.privacy.keys import run_secret, secret_path
from dito_jax.telemetry.run_directory import RunDirectory


PrivateSum = Callable[
    [Float[Array, "m D"], Bool[Array, " m"], Key[Array, ""]], Float[Array, " D"]
]  # per-example gradients, mask of the included ones, key -> the noised sum
BOUNDS = ("one_run", "one_run_fdp", "clopper_pearson")
PLANTED = "canaries.json"


@dataclasses.dataclass(frozen=True)
class EpsilonBounds:
    """Lower bounds on epsilon; `confidence` is that of all three together."""

    one_run: float
    one_run_fdp: float
    clopper_pearson: float
    auc: float
    num_in: int
    num_out: int
    delta: float
    confidence: float

    @property
    def largest(self) -> float:
        return max(getattr(self, name) for name in BOUNDS)


@dataclasses.dataclass(frozen=True)
class Canaries:
    """Example canaries with their labels, and which of them are in the training data."""

    image: Float32[np.ndarray, "num h w c"]
    label: Int32[np.ndarray, " num"]
    included: Bool[np.ndarray, " num"]


def make_canaries(num: int, image_shape: tuple[int, int, int], num_classes: int, *, secret: bytes) -> Canaries:
    """`num` images of random signs, +1 or -1 per pixel, with labels and inclusions; a function of `secret`.

    These images are far from all real ones, so a network can learn them only from themselves. Images and inclusions
    come from separate generators: somebody who sees the images in order learns nothing about the inclusions.

    Raises:
      UserError: fewer than one canary, or an empty secret.
    """
    if num < 1 or not secret:
        raise UserError(f"{num} canaries, a secret of {len(secret)} bytes: wanted at least 1 of each.")
    pictures, coins = _generator(secret, b"pictures"), _generator(secret, b"coins")
    return Canaries(
        image=np.where(pictures.random((num, *image_shape)) < 0.5, -1, 1).astype(np.float32),
        label=pictures.integers(num_classes, size=num, dtype=np.int32),
        included=coins.random(num) < 0.5,
    )


class CanarySource:
    """A training source with the included canaries appended."""

    def __init__(self, source: Source, num: int, *, secret: bytes):
        self.source = source
        self.image_shape = source.image_shape
        self.num_classes = source.num_classes
        self.augment = source.augment
        self.classes = class_names(source)
        self.unreadable: dict[str, str] = getattr(source, "unreadable", {})
        self.canaries = make_canaries(num, source.image_shape, source.num_classes, secret=secret)
        self._appended = np.flatnonzero(self.canaries.included)

    def __len__(self) -> int:
        return len(self.source) + len(self._appended)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index < len(self.source):
            return self.source[index]
        chosen = self._appended[index - len(self.source)]
        return Example(image=self.canaries.image[chosen], label=np.int32(self.canaries.label[chosen]))


def planted(source: Source, num: int, run: RunDirectory) -> CanarySource:
    """`source` with the canaries of a run, which are the same in every start of the run and in its audit.

    The secret of the canaries is stored like that of the run (keys.py), for the audit; it determines the inclusions.
    canaries.json in the run directory has its name and SHA-256, so another secret is detected. A collective: all
    processes must call it.

    Raises:
      UserError: the run was started with another number of canaries, or their secret is missing.
    """
    _, secret = agreed(
        "canaries", "planted", lambda: {"secret_of": _kept_secret(run, num)}, "the canaries of this run cannot be used"
    )
    return CanarySource(source, num, secret=secret)


def _kept_secret(run: RunDirectory, num: int) -> str:
    """The name of the secret of the canaries, which is the one that was used before."""
    path = run.path / PLANTED
    kept = json.loads(path.read_text()) if path.exists() else {"secret": f"canaries-{uuid.uuid4().hex}", "num": num}
    if kept["num"] != num:
        raise UserError(
            f"{path}: this run was started with {kept['num']} canaries, not {num}: set canaries to {kept['num']}."
        )
    held = secret_path(kept["secret"])
    secret = run_secret(kept["secret"]) if held.exists() or not path.exists() else b""
    digest = hashlib.sha256(secret).hexdigest()
    if kept.setdefault("sha256", digest) != digest:
        raise UserError(f"{held}: not the secret of this run's canaries; restore it from a copy.")
    run.write_json(PLANTED, kept)
    return kept["secret"]


def epsilon_bounds(
    scores: Float[np.ndarray, " num"],
    included: Bool[np.ndarray, " num"],
    *,
    delta: float,
    confidence: float = 0.95,
) -> EpsilonBounds:
    """Lower bounds on epsilon from the scores of canaries, which should be larger for included ones.

    Raises:
      UserError: no canary or every canary is included; delta or confidence is not in (0, 1).
    """
    if not 0 < delta < 1 or not 0 < confidence < 1:
        raise UserError(f"delta {delta}, confidence {confidence}: wanted both between 0 and 1.")
    if included.all() or not included.any():
        raise UserError(
            f"{int(included.sum())} of {len(included)} canaries are included: use more, so that some are not."
        )
    auditor = CanaryScoreAuditor(scores[included], scores[~included])
    each = (1 - confidence) / len(BOUNDS)
    return EpsilonBounds(
        one_run=float(auditor.epsilon_one_run(each, delta)),
        one_run_fdp=float(auditor.epsilon_one_run_fdp(each, delta)),
        clopper_pearson=float(auditor.epsilon_clopper_pearson(each, delta)),
        auc=float(auditor.attack_auroc()),
        num_in=int(included.sum()),
        num_out=int((~included).sum()),
        delta=delta,
        confidence=confidence,
    )


def verdict(bounds: EpsilonBounds, claimed_epsilon: float) -> Literal["refuted", "not refuted"]:
    """Whether a bound refutes the claimed epsilon; "not refuted" does not prove the claim."""
    return "refuted" if bounds.largest > claimed_epsilon else "not refuted"


def audit_mechanism(
    private_sum: PrivateSum,
    *,
    dimension: int,
    num_canaries: int,
    steps: int,
    key: Key[Array, ""],
    delta: float,
    confidence: float = 0.95,
    magnitude: float = 1e4,
    alternate: bool = False,
) -> EpsilonBounds:
    """Bounds on the epsilon of `steps` calls of `private_sum(vectors (m, D), present (m,), key) -> (D,)`.

    Canary i is `magnitude` times a random coordinate vector e_i, one coordinate per canary. If the clip norm is below
    `magnitude`, its contribution to the sum is clip_norm * e_i. Each canary is included with probability 1/2, in all
    steps. Its score is the sum over steps of <released, e_i>. To audit code that takes losses instead of gradients, use
    the loss <params, vector>, whose gradient is the vector.

    `alternate`: included canaries are present in even steps only, and odd steps count negatively. With correct noise
    the bounds are lower (a canary takes part half as often); noise that two steps share cancels.

    Memory: m x D floats, plus that of `private_sum`.

    Raises:
      UserError: more canaries than dimensions, or no steps (two, if they alternate).
    """
    if not 0 < num_canaries <= dimension:
        raise UserError(f"{num_canaries} canaries in {dimension} dimensions: wanted at most one per dimension.")
    if steps < 1 + alternate:
        raise UserError(f"{steps} steps: wanted at least {1 + alternate}.")
    key_coins, key_axes, key_noise = jax.random.split(key, 3)
    included = jax.random.bernoulli(key_coins, 0.5, (num_canaries,))
    axes = jax.random.permutation(key_axes, dimension)[:num_canaries]
    vectors = jnp.zeros((num_canaries, dimension)).at[jnp.arange(num_canaries), axes].set(magnitude)
    scores = np.zeros(num_canaries)
    for step in range(steps):
        away = alternate and step % 2 == 1
        present = jnp.zeros_like(included) if away else included
        released = private_sum(vectors, present, jax.random.fold_in(key_noise, step))
        scores += np.asarray(released, np.float64)[np.asarray(axes)] * (-1 if away else 1)
    return epsilon_bounds(scores, np.asarray(included), delta=delta, confidence=confidence)


def _generator(secret: bytes, purpose: bytes) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hmac.digest(secret, purpose, hashlib.sha256)))
