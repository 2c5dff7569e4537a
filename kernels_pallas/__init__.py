"""JAX operations with Pallas GPU kernels; each has a reference implementation, a cost model and named cases."""

from .attention import (
    FLASH_ATTENTION as FLASH_ATTENTION,
    FLASH_ATTENTION_TANGENT as FLASH_ATTENTION_TANGENT,
    AttentionMask as AttentionMask,
    flash_attention as flash_attention,
    flash_attention_jvp as flash_attention_jvp,
    merge_attention as merge_attention,
)
from .decode import (
    DECODE_ATTENTION as DECODE_ATTENTION,
    PAGED_DECODE_ATTENTION as PAGED_DECODE_ATTENTION,
    decode_attention as decode_attention,
    paged_decode_attention as paged_decode_attention,
)
from .experts import (
    COMBINE as COMBINE,
    DISPATCH as DISPATCH,
    EXPERT_MLP as EXPERT_MLP,
    GROUPED_MATMUL as GROUPED_MATMUL,
    Assignments as Assignments,
    Load as Load,
    Routing as Routing,
    by_index as by_index,
    combine as combine,
    dispatch as dispatch,
    expert_choice as expert_choice,
    expert_load as expert_load,
    expert_mlp as expert_mlp,
    grouped_matmul as grouped_matmul,
    in_order as in_order,
    load_balance_loss as load_balance_loss,
    race as race,
    sigmoid_scores as sigmoid_scores,
    softmax_scores as softmax_scores,
    to_slots as to_slots,
    top_k_sigmoid as top_k_sigmoid,
    top_k_softmax as top_k_softmax,
    update_bias as update_bias,
    z_loss as z_loss,
)
from .ffi.ranges import profile_range as profile_range
from .integrity import STATE_DIGEST as STATE_DIGEST, state_digest as state_digest
from .losses import LINEAR_CROSS_ENTROPY as LINEAR_CROSS_ENTROPY, linear_cross_entropy as linear_cross_entropy
from .mlp import (
    DENSE_MLP as DENSE_MLP,
    GATED_MLP as GATED_MLP,
    dense_mlp as dense_mlp,
    gated_mlp as gated_mlp,
)
from .norms import (
    GATED_RESIDUAL_NORM as GATED_RESIDUAL_NORM,
    MODULATED_NORM as MODULATED_NORM,
    gated_residual_norm as gated_residual_norm,
    modulated_norm as modulated_norm,
)
from .privacy import (
    CLIP_REDUCE as CLIP_REDUCE,
    GHOST_NORM_SQ as GHOST_NORM_SQ,
    clip_reduce as clip_reduce,
    ghost_norm_sq as ghost_norm_sq,
)
from .randomness import SECURE_NORMAL as SECURE_NORMAL, secure_normal as secure_normal
from .rotary import QK_NORM_ROPE as QK_NORM_ROPE, Rotation as Rotation, qk_norm_rope as qk_norm_rope


# All operations: the tests and the commands bench, tune and inspect iterate over them.
OPS = (
    FLASH_ATTENTION, FLASH_ATTENTION_TANGENT, DECODE_ATTENTION, PAGED_DECODE_ATTENTION, MODULATED_NORM,
    GATED_RESIDUAL_NORM, QK_NORM_ROPE, GATED_MLP, DENSE_MLP, DISPATCH, COMBINE, GROUPED_MATMUL, EXPERT_MLP,
    LINEAR_CROSS_ENTROPY, GHOST_NORM_SQ, CLIP_REDUCE, SECURE_NORMAL, STATE_DIGEST,
)  # fmt: skip
