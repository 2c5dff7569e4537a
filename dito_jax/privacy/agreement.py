"""Agreement of all processes on what process 0 decides and on a secret, which is not sent over the network.

Guarantees
  - The key-value store of jax.distributed, which anybody who reaches its port can read, has the decision and the name
    of the secret only. Each process reads the secret from its file (keys.py), which all processes must see.
  - All processes have the same decision and the same secret, or none goes on. They compare an HMAC of the decision with
    the secret as its key. So whoever writes to the store cannot make a process use other keys, for example those of an
    earlier start, whose noise would then be used twice.
"""

import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

from dito_jax.distributed import agree, index, publish, published, same
from dito_jax.errors import UserError
from dito_jax.privacy.keys import run_secret, shared_secret


def agreed(folder: str, name: str, decide: Callable[[], dict[str, Any]], refusal: str) -> tuple[dict[str, Any], bytes]:
    """(what `decide` returns in process 0, the secret that its entry "secret_of" names); all processes must call it.

    The decision is published as `folder`/`name`. `refusal` is the message of the other processes if `decide` raises.

    Raises:
      UserError: `decide` raised one, or a process does not have the same decision and secret.
    """
    decision: dict[str, Any] = {}
    secret, refused = b"", None
    try:
        if index() == 0:
            decision = decide()
            secret = run_secret(decision["secret_of"])
            publish(f"{folder}/{name}", json.dumps(decision))
    except UserError as error:
        refused = error
    if not agree(refused is None):
        raise refused or UserError(f"{refusal}; see the message of process 0.")
    try:
        if index() != 0:
            decision, secret = _followed(folder, name)
    except UserError as error:
        refused = error
    if not agree(refused is None):
        raise refused or UserError("another process cannot read a secret of this run; see its message.")
    if not same(hmac.digest(secret, b"agreement" + json.dumps(decision, sort_keys=True).encode(), hashlib.sha256)):
        raise UserError(
            f"the secret {decision['secret_of'][:16]} or the start that belongs to it is not the same in all "
            "processes: set DITO_SECRETS to a folder that all of them share, and keep other programs from the port of "
            "the coordination service."
        )
    return decision, secret


def _followed(folder: str, name: str) -> tuple[dict[str, Any], bytes]:
    """The decision of process 0 and its secret, in another process."""
    try:
        decision = json.loads(published(folder)[name])
        return decision, shared_secret(str(decision["secret_of"]))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder}/{name} in the key-value store is not what process 0 has written: keep other programs from the "
            "port of the coordination service."
        ) from error
