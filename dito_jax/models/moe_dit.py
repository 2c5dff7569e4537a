"""MoE-DiT: a DiT with a mixture-of-experts layer (top-k and other routers) in every block or every second block.

    block: x += gate * attention(norm(x)(1 + scale) + shift);  x += gate * moe(norm(x)(1 + scale) + shift)

Besides the image the network returns load-balancing losses and the load of each expert, from which the router biases
are updated after a step (auxiliary-loss-free load balancing).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.layers.expert_parallel import ExchangeName
from dito_jax.layers.mlp import SwiGLU
from dito_jax.layers.moe import MoE, RouterBias, RouterReport
from dito_jax.models.dit import MLPS, DiT, DiTBlock, DiTConfig, Report, stacked
from kernels_pallas import (
    Assignments,
    by_index,
    expert_choice,
    load_balance_loss,
    race,
    sigmoid_scores,
    softmax_scores,
    top_k_sigmoid,
    top_k_softmax,
    update_bias,
    z_loss,
)


# Published sizes: (depth, width, heads), then the fields that differ from the defaults below. The two shared experts of
# DiT-MoE are one shared expert of twice the width here.
PRESETS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    # https://arxiv.org/abs/2407.11633
    "DiT-MoE-S/2-8E2A": ((12, 384, 6), dict(num_experts=8, expert_hidden=1536, shared_hidden=768)),
    "DiT-MoE-B/2-8E2A": ((12, 768, 12), dict(num_experts=8, expert_hidden=3072, shared_hidden=1536)),
    "DiT-MoE-XL/2-8E2A": ((28, 1152, 16), dict(num_experts=8, expert_hidden=4608, shared_hidden=2304)),
    "DiT-MoE-G/2-16E2A": ((40, 1408, 16), dict(num_experts=16, expert_hidden=5632, shared_hidden=2816)),
    # https://arxiv.org/abs/2512.01252
    "DSMoE-L/2-E48": (
        (24, 1024, 16),
        dict(num_experts=48, active_experts=5, expert_hidden=448, shared_hidden=448, moe_every=2, router="sigmoid"),
    ),
    "DSMoE-3B/2-E16": (
        (28, 1152, 16),
        dict(num_experts=16, active_experts=2, expert_hidden=2880, shared_hidden=2880, moe_every=2, router="sigmoid"),
    ),
}


@dataclasses.dataclass(frozen=True)
class MoEDiTConfig(DiTConfig):
    """Sizes and options of a DiT with mixture-of-experts (MoE) blocks, beside those of DiTConfig."""

    num_experts: int = 8
    """Number of routed experts in each MoE block."""
    active_experts: int = 2
    """Experts per token (top-k); with the expert_choice and race routers the average; timestep always uses 1."""
    expert_hidden: int | None = None
    """Hidden width of each expert; None: the SwiGLU width that belongs to model.width."""
    shared_hidden: int = 0
    """Hidden width of the shared expert, which computes every token; 0: no shared expert."""
    moe_every: Literal[1, 2] = 1
    """1: every block has experts; 2: dense blocks and MoE blocks alternate."""
    router: Literal["softmax", "sigmoid", "expert_choice", "race", "timestep"] = "softmax"
    """Router: top-k by softmax or sigmoid scores, expert choice, race (highest scores of all tokens and experts), or
    one expert per interval of timesteps."""
    normalize: bool = False
    """Softmax router: scale the weights of a token's experts so that they sum to 1."""
    router_groups: int = 1
    """Sigmoid router: number of expert groups for group-limited routing."""
    active_groups: int = 1
    """Sigmoid router: number of groups, of router_groups, from which a token may choose experts."""
    weight_scale: float = 1.0
    """Sigmoid router: factor on the weights of the chosen experts."""
    pool: int = 1
    """Number of images whose tokens are routed together (expert choice, race, capacity); above 1 a sample depends on
    the other images in its pool."""
    capacity_factor: float | None = None
    """Maximum rows of an expert as a multiple of the even share, further rows are dropped; None: no limit."""
    exchange: ExchangeName | None = None
    """How rows reach experts on other devices (expert parallelism); None: the exchange that moves least and drops
    nothing."""
    balance: Literal["batch", "example"] = "batch"
    """Compute the load-balancing loss over the whole batch or over each example separately."""
    balance_weight: float = 0.01
    """Weight of the load-balancing loss."""
    z_weight: float = 0.0
    """Weight of the router z-loss."""
    bias_rate: float = 0.001
    """Sigmoid router: change of the router biases per step, for load balancing without a loss."""

    @classmethod
    def preset(cls, name: str, image_shape: tuple[int, int, int], num_classes: int, **make: Any) -> "MoEDiTConfig":
        """A config of a published size: `preset("DiT-MoE-XL/2-8E2A", (32, 32, 4), 1000)`.

        Raises:
          ValueError: the name is not in PRESETS.
        """
        if name not in PRESETS:
            raise ValueError(f"no MoE DiT named {name!r}; choose from {', '.join(PRESETS)}.")
        (depth, width, num_heads), experts = PRESETS[name]
        patch = int(name.split("/")[1].split("-")[0])
        return cls(image_shape, num_classes, patch, depth, width, num_heads, **(experts | make))

    @property
    def hidden(self) -> int:
        """Hidden width of an expert."""
        return self.expert_hidden or SwiGLU.hidden(self.width)

    @property
    def together(self) -> int:
        return self.pool

    @property
    def moe_depth(self) -> int:
        """Number of blocks with experts."""
        return self.depth // self.moe_every

    def problems(self) -> list[str]:
        chosen = self.router in ("softmax", "sigmoid")
        rules = {
            f"depth {self.depth} is not a multiple of moe_every {self.moe_every}": self.depth % self.moe_every > 0,
            f"active_experts {self.active_experts} is not between 1 and num_experts {self.num_experts}": (
                not 1 <= self.active_experts <= self.num_experts
            ),
            f"num_experts {self.num_experts} is not a multiple of router_groups {self.router_groups}": (
                self.num_experts % max(self.router_groups, 1) > 0
            ),
            f"the {self.active_groups} active_groups have fewer than active_experts {self.active_experts} experts": (
                chosen and self.active_groups * self.num_experts < self.active_experts * self.router_groups
            ),
            f"pool {self.pool} is not positive": self.pool < 1,
            f"capacity_factor {self.capacity_factor} is not positive": (
                self.capacity_factor is not None and self.capacity_factor <= 0
            ),
            f"balance 'example' needs a pool of 1, got {self.pool}": self.balance == "example" and self.pool > 1,
        }
        return super().problems() + [problem for problem, broken in rules.items() if broken]

    def run_rules(self, sizes: Mapping[str, int], *, images: int) -> dict[str, bool]:
        expert, tensor = sizes["expert"], sizes["tensor"]
        return super().run_rules(sizes, images=images) | {
            f"model.num_experts {self.num_experts} is not a multiple of mesh.expert {expert}": (
                self.num_experts % expert > 0
            ),
            f"the experts' width {self.hidden} is not a multiple of mesh.tensor {tensor}": self.hidden % tensor > 0,
            f"model.shared_hidden {self.shared_hidden} is not a multiple of mesh.tensor {tensor}": (
                self.shared_hidden % tensor > 0
            ),
            f"the {images} images that a device computes at once are not a multiple of model.pool {self.pool}": (
                images % self.pool > 0
            ),
        }

    def mlp_flops(self) -> int:
        """FLOPs per token in the MLPs of all blocks: active experts, shared expert and router."""
        active = 1 if self.router == "timestep" else self.active_experts
        product = 2 * self.width
        moe = 3 * product * (active * self.hidden + self.shared_hidden) + product * self.num_experts
        dense = MLPS[self.mlp].flops(self.width)
        return self.moe_depth * moe + (self.depth - self.moe_depth) * dense

    def active_parameters(self) -> int:
        """Number of parameters that one token uses."""
        active = 1 if self.router == "timestep" else self.active_experts
        idle = self.moe_depth * (self.num_experts - active) * 3 * self.width * self.hidden
        return self.num_parameters() - idle

    def build(self, rngs: nnx.Rngs) -> "MoEDiT":
        return MoEDiT(self, rngs=rngs)

    def choose(self, logits: Array, bias: Array | None, index: Array | None) -> Assignments:
        """Routes one pool of tokens: the assignments of tokens to experts."""
        tokens = logits.shape[0]
        rows = self.active_experts * tokens
        match self.router:
            case "softmax":
                return top_k_softmax(logits, active=self.active_experts, normalize=self.normalize)
            case "sigmoid":
                assert bias is not None
                return top_k_sigmoid(
                    logits, bias, active=self.active_experts, groups=self.router_groups,
                    active_groups=self.active_groups, scale=self.weight_scale,
                )  # fmt: skip
            case "expert_choice":
                return expert_choice(logits, rows=max(rows // self.num_experts, 1))
            case "race":
                return race(logits, rows=rows)
            case "timestep":
                assert index is not None
                return by_index(index, num_experts=self.num_experts)

    def rebalance(self, params: nnx.State, report: Report) -> nnx.State:
        """Updates the router biases from the expert loads of the global batch."""

        def moved(variable: nnx.Variable) -> nnx.Variable:
            if not isinstance(variable, RouterBias):
                return variable
            move = jax.vmap(lambda bias, rows: update_bias(bias, rows, rate=self.bias_rate))
            return variable.replace(move(variable[...], report.rows))

        return jax.tree.map(moved, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


class MoEBlock(DiTBlock):
    """A DiT block with an MoE layer instead of the MLP."""

    def make_mlp(self, config: MoEDiTConfig, rngs: nnx.Rngs) -> nnx.Module:
        sigmoid = config.router == "sigmoid"
        return MoE(
            config.width,
            config.hidden,
            config.num_experts,
            choose=config.choose,
            scores=sigmoid_scores if sigmoid else softmax_scores,
            active=config.active_experts,
            even=config.router == "expert_choice",
            by_index=config.router == "timestep",
            biased=sigmoid,
            capacity_factor=config.capacity_factor,
            pool=config.pool,
            shared_hidden=config.shared_hidden,
            exchange=config.exchange,
            rngs=rngs,
        )

    def run(self, x, c, rotation, index) -> tuple[Array, RouterReport]:
        return self.through(x, c, rotation, lambda h: self.mlp(h, index))


class MoEGroup(nnx.Module):
    """The repeated unit: an MoE block, after a dense block if moe_every is 2."""

    def __init__(self, config: MoEDiTConfig, *, rngs: nnx.Rngs):
        self.dense = DiTBlock(config, rngs=rngs) if config.moe_every == 2 else None
        self.moe = MoEBlock(config, rngs=rngs)

    def __call__(self, x, c, rotation, index) -> tuple[Array, RouterReport]:
        x = x if self.dense is None else self.dense(x, c, rotation)
        return self.moe.run(x, c, rotation, index)


class MoEDiT(DiT):
    """A DiT with mixture-of-experts blocks."""

    config: MoEDiTConfig

    def make_blocks(self, config: MoEDiTConfig, rngs: nnx.Rngs) -> nnx.Module:
        return stacked(lambda rngs: MoEGroup(config, rngs=rngs), config.moe_depth, rngs)

    def with_report(
        self, image: Float[Array, "B h w c"], t: Float[Array, " B"], label: Array
    ) -> tuple[Float[Array, "B h w c_out"], Report]:
        config = self.config
        x, c, rotation = self.embed(image, t, label)
        index = jnp.clip(jnp.floor(t * config.num_experts), 0, config.num_experts - 1).astype(jnp.int32)
        x, reports = self.scan(lambda x, group: group(x, c, rotation, index), x)
        return self.head(x, c), report_of(config, reports, image.shape[0])


def report_of(config: MoEDiTConfig, reports: RouterReport, batch: int) -> Report:
    """The Report from the router statistics (L, P, ...): auxiliary losses, averaged over layers, and metrics."""

    def auxiliary(load):
        return config.balance_weight * load_balance_loss(load) + config.z_weight * z_loss(load)

    whole = jax.tree.map(lambda a: a.sum(axis=1), reports.load)  # (L, ...)
    if config.router == "timestep":
        losses = jnp.zeros(batch)  # the router has no parameters
    elif config.balance == "example":
        losses = jnp.mean(jax.vmap(jax.vmap(auxiliary))(reports.load), axis=0)
    else:
        losses = jnp.broadcast_to(jnp.mean(jax.vmap(auxiliary)(whole)), (batch,))
    share = whole.rows / jnp.maximum(jnp.sum(whole.rows, axis=1, keepdims=True), 1.0)
    metrics = {
        "balance_loss": jnp.mean(jax.vmap(load_balance_loss)(whole)),
        "expert_load_max": jnp.max(share) * config.num_experts,  # 1 is an even load
        "dropped": jnp.sum(reports.dropped) / jnp.maximum(jnp.sum(whole.rows), 1.0),
    }
    return Report(losses, metrics, whole.rows)
