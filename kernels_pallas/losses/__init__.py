"""Fused linear cross-entropy: the loss of a language-model head without the logits in memory."""

from .api import LINEAR_CROSS_ENTROPY as LINEAR_CROSS_ENTROPY, linear_cross_entropy as linear_cross_entropy
