"""Mixture of experts (MoE): routers, routing, load balancing, grouped GEMM and the MoE MLP."""

from .api import (
    COMBINE as COMBINE,
    DISPATCH as DISPATCH,
    EXPERT_MLP as EXPERT_MLP,
    GROUPED_MATMUL as GROUPED_MATMUL,
    combine as combine,
    dispatch as dispatch,
    expert_mlp as expert_mlp,
    grouped_matmul as grouped_matmul,
)
from .balance import (
    Load as Load,
    expert_load as expert_load,
    load_balance_loss as load_balance_loss,
    update_bias as update_bias,
    z_loss as z_loss,
)
from .routers import (
    by_index as by_index,
    expert_choice as expert_choice,
    race as race,
    sigmoid_scores as sigmoid_scores,
    softmax_scores as softmax_scores,
    top_k_sigmoid as top_k_sigmoid,
    top_k_softmax as top_k_softmax,
)
from .routing import Assignments as Assignments, Routing as Routing, in_order as in_order, to_slots as to_slots
