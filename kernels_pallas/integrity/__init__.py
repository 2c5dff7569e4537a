"""Whether arrays are still what they were."""

from .api import STATE_DIGEST as STATE_DIGEST, state_digest as state_digest
