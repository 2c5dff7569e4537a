"""Canaries: what is put into training by the toss of a coin, so that its traces bound epsilon from below.

Two kinds. EXAMPLE canaries are pictures that no data set holds, each added to the training data or not
(`CanarySource`); the trained network's loss on them says which went in. They audit a whole run, once. GRADIENT
canaries (`audit_mechanism`) are vectors given straight to the code that clips, adds up and adds noise, one direction
each; the released sums say which went in. They audit that code, in seconds, without a network.

Either way an adversary guesses the coins, and under (epsilon, delta) nobody guesses too well: three bounds by
jax-privacy's auditor turn right guesses into the smallest epsilon that the data do not refute.

    one_run            Steinke, Nasr, Jagielski, arXiv 2305.08846
    one_run_fdp        Mahloujifar, Melis, Chaudhuri, arXiv 2410.22235
    clopper_pearson    from TPR and FPR of the best threshold: Nasr et al., arXiv 2101.04535

Guarantees
----------
What a bound means: with probability `confidence` over the coins and the noise, for the three together (each is taken
at a third of the significance), the audited run is *not* (epsilon, delta)-private for any epsilon below it. A bound
above the claimed epsilon refutes the claim: there is a bug, or the accounting is of something else.

Assumes: every coin is fair, independent, and unknown to what is audited. `one_run` needs no more than that.
`one_run_fdp` refutes that the mechanism is as good as a Gaussian one of that (epsilon, delta). `clopper_pearson` takes
the scores of different canaries for independent, as those of orthogonal directions under independent noise are.

Cannot show: that the claim is true. A correct mechanism gives bounds far below its epsilon: with 5,000 directions, 2.4,
4.9 and 3.6 of a true 10. The audit is a detector of bugs, and is itself tested by mechanisms that have one. It sees
too little noise and too large a contribution; noise that is too large, or in the wrong units but larger, passes. That
two releases have the same noise shows only with `alternate`. Example canaries count in the training set's size, and
what they cost in quality is the run's.
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
from dito_jax.distributed import agree, index, publish, published
from dito_jax.errors import UserError
from dito_jax.privacy.keys import run_secret, secret_path
from dito_jax.telemetry.run_directory import RunDirectory


PrivateSum = Callable[
    [Float[Array, "m D"], Bool[Array, " m"], Key[Array, ""]], Float[Array, " D"]
]  # per-example gradients, which are there, key -> the noised sum
BOUNDS = ("one_run", "one_run_fdp", "clopper_pearson")
PLANTED = "canaries.json"


@dataclasses.dataclass(frozen=True)
class EpsilonBounds:
    """Lower bounds on epsilon, with the confidence given for all three together."""

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
    """Pictures with their labels, and which of them are in the training data."""

    image: Float32[np.ndarray, "num h w c"]
    label: Int32[np.ndarray, " num"]
    included: Bool[np.ndarray, " num"]


def make_canaries(num: int, image_shape: tuple[int, int, int], num_classes: int, *, secret: bytes) -> Canaries:
    """`num` pictures of random signs, +1 or -1 a pixel, with labels and coins; all a function of `secret`.

    Such a picture is as far from any real one as pixels allow, and what a network learns of it, it learns from it
    alone. Pictures and coins come from generators that have nothing in common but the secret: who sees the pictures,
    in their order, learns nothing of the coins.

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
    """A training Source with those canaries appended whose coin says so; the rest of it is as it was."""

    def __init__(self, source: Source, num: int, *, secret: bytes):
        self.source = source
        self.image_shape = source.image_shape
        self.num_classes = source.num_classes
        self.augment = source.augment
        self.classes = class_names(source)
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
    """`source` with the canaries of one run: made by its first start, the same in every later one and in its audit.

    Their secret lies where the run's own does (keys.py), for the auditor: whoever has it knows the coins. The run keeps
    its name, and its hash, so that coins tossed anew are noticed. All processes of a run must call.

    Raises:
      UserError: the run began with another number of canaries, or their secret is not here.
    """
    refused: UserError | None = None
    if index() == 0:
        try:
            publish("canaries/secret", _kept_secret(run, num).hex())
        except UserError as error:
            refused = error
    if not agree(refused is None):
        raise refused or UserError("the canaries of this run are refused; process 0 says why.")
    return CanarySource(source, num, secret=bytes.fromhex(published("canaries")["secret"]))


def _kept_secret(run: RunDirectory, num: int) -> bytes:
    path = run.path / PLANTED
    kept = json.loads(path.read_text()) if path.exists() else {"secret": f"canaries-{uuid.uuid4().hex}", "num": num}
    if kept["num"] != num:
        raise UserError(f"{path}: this run began with {kept['num']} canaries, not {num}: set canaries to it.")
    held = secret_path(kept["secret"])
    secret = run_secret(kept["secret"]) if held.exists() or not path.exists() else b""
    digest = hashlib.sha256(secret).hexdigest()
    if kept.setdefault("sha256", digest) != digest:
        raise UserError(f"{held}: not the secret that this run's canaries were made of; restore it from a copy.")
    run.write_json(PLANTED, kept)
    return secret


def epsilon_bounds(
    scores: Float[np.ndarray, " num"],
    included: Bool[np.ndarray, " num"],
    *,
    delta: float,
    confidence: float = 0.95,
) -> EpsilonBounds:
    """What the scores of canaries, larger for those that are in, prove of epsilon.

    Raises:
      UserError: no canary is in, or none is out; delta or confidence is not in (0, 1).
    """
    if not 0 < delta < 1 or not 0 < confidence < 1:
        raise UserError(f"delta {delta}, confidence {confidence}: wanted both between 0 and 1.")
    if included.all() or not included.any():
        raise UserError(f"{int(included.sum())} of {len(included)} canaries are in: give more, so that some are out.")
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
    """Whether the claim can still be true; "not refuted" is no proof of it."""
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

    Canary i is `magnitude` times a unit vector of its own, e_i, a coordinate chosen by chance: as long as the clip norm
    is below, what reaches the sum is clip x e_i. Half of the canaries, by a coin each, are present in every step. The
    score of one is the sum over steps of <released, e_i>. To audit code that takes losses and not gradients, give it
    the loss <params, vector>, whose gradient is the vector.

    `alternate`: canaries that are in are present in even steps alone, and odd steps count negatively. Correct noise
    hides more so (a canary takes part half as often); noise that two steps have in common cancels, and hides nothing.

    Memory: m x D floats, and what `private_sum` makes of them.

    Raises:
      UserError: more canaries than dimensions, or no steps (two, if they alternate).
    """
    if not 0 < num_canaries <= dimension:
        raise UserError(f"{num_canaries} canaries in {dimension} dimensions: wanted a direction each, so at most that.")
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
