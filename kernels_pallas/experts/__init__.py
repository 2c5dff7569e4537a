"""Experts: routing as data, and the matrix products of many experts."""

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
from .routing import Assignments as Assignments, Routing as Routing
