"""DiT: the class-conditional diffusion transformer (arXiv 2212.09748), original or with modern layers.

    image -> patches -> [block] x depth -> patches -> image
    block: x += gate * attention(norm(x)(1 + scale) + shift);  x += gate * mlp(norm(x)(1 + scale) + shift)

scale, shift and gate are computed from the timestep and the class (adaLN). All gates start at zero, so every block
starts as the identity (adaLN-Zero). The two presets differ in the layers of a block:

    original   LayerNorm   GELU MLP   fixed sine-cosine positions
    modern     RMSNorm     SwiGLU     axial rotary positions        QK-norm
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import zeros
from jaxtyping import Array, Float, Int

from dito_jax.layers.attention import Attention
from dito_jax.layers.embed import NUM_FREQUENCIES, ClassEmbedding, TimeEmbedding
from dito_jax.layers.linear import linear
from dito_jax.layers.mlp import GeluMLP, SwiGLU
from dito_jax.layers.norm import NormKind, adaptive_norm, residual_norm
from dito_jax.layers.patchify import patchify, unpatchify
from dito_jax.layers.positions import sincos_table
from dito_jax.models.kernels import KernelsConfig
from dito_jax.sharding import constrain
from kernels_pallas import Rotation, flash_attention, flash_attention_jvp


SIZES = {  # (depth, width, heads), table 1 of the paper; a preset name is size/patch: "XL/2"
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
ORIGINAL = dict(norm="layer", mlp="gelu", positions="sincos", qk_norm=False)
MODERN = dict(norm="rms", mlp="swiglu", positions="rope", qk_norm=True)
MLPS = {"gelu": GeluMLP, "swiglu": SwiGLU}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes and options of a DiT. `DiTConfig.preset("XL/2", ...)` fills in the paper's sizes."""

    image_shape: tuple[int, int, int]
    """Height, width and channels of the images or latents."""
    num_classes: int
    """Number of classes, numbered from 0; label num_classes means "no class"."""
    patch: int
    """Side of a square patch in pixels (or latent cells)."""
    depth: int
    """Number of transformer blocks."""
    width: int
    """Hidden size: the number of channels of a token."""
    num_heads: int
    """Number of query heads of attention."""
    num_kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention); None: the same as num_heads."""
    norm: NormKind = "rms"
    """Normalization: LayerNorm (layer) or RMSNorm (rms)."""
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    """Feed-forward layer: two matrices with GELU (gelu) or three with a SwiGLU gate (swiglu)."""
    positions: Literal["sincos", "rope"] = "rope"
    """Position encoding: fixed sine-cosine table (sincos) or axial rotary embedding (rope)."""
    qk_norm: bool = True
    """Apply RMSNorm to queries and keys (QK-norm), which keeps attention logits bounded."""
    learn_sigma: bool = False
    """Predict twice the channels; the second half parametrizes the DDPM variance and the flow matching loss ignores
    it."""
    remat: bool = False
    """Recompute each block in the backward pass (activation checkpointing): less memory, more time."""
    adapter_rank: int = 0
    """Rank of the low-rank adapters (LoRA) on the attention projections; 0: no adapters."""
    forward_mode: bool = False
    """Support jax.jvp of the network on a GPU, as MeanFlow needs; norms and rotations then use XLA."""
    kernels: KernelsConfig = KernelsConfig()
    """Implementation of each kernel operation by name: "xla" is plain JAX; None is the fastest one measured."""

    @classmethod
    def preset(cls, name: str, image_shape: tuple[int, int, int], num_classes: int, **make: Any) -> "DiTConfig":
        """A config of the paper's sizes: `preset("XL/2", (32, 32, 4), 1000, **ORIGINAL)`.

        Raises:
          ValueError: the name is not a size S, B, L or XL, a slash and a patch side 1, 2, 4, 8 or 16.
        """
        size, _, patch = name.partition("/")
        if size not in SIZES or patch not in ("1", "2", "4", "8", "16"):
            raise ValueError(f"no DiT named {name!r}; sizes are {', '.join(SIZES)}, patches 1 2 4 8 16: 'B/4'.")
        depth, width, num_heads = SIZES[size]
        return cls(image_shape, num_classes, int(patch), depth, width, num_heads, **make)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        return MLPS[self.mlp].hidden(self.width)

    @property
    def implementations(self) -> KernelsConfig:
        """The kernel choice; in forward mode XLA replaces the kernels that have no forward-mode derivative."""
        return dataclasses.replace(self.kernels, norm="xla", qk_norm_rope="xla") if self.forward_mode else self.kernels

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches (vertically, horizontally); their product is T."""
        return self.image_shape[0] // self.patch, self.image_shape[1] // self.patch

    @property
    def together(self) -> int:
        """Number of images that must be computed together on one device (the routing pool of an MoE)."""
        return 1

    @property
    def out_channels(self) -> int:
        return self.image_shape[2] * (2 if self.learn_sigma else 1)

    def problems(self) -> list[str]:
        """One line for each reason why this config is invalid."""
        numbers = {name: getattr(self, name) for name in ("patch", "width", "num_heads", "kv_heads")}
        if small := [f"{name} {number} is not positive" for name, number in numbers.items() if number < 1]:
            return small
        h, w, _ = self.image_shape
        head_width = self.width // self.num_heads
        rules = {
            f"patch {self.patch} does not divide the image side(s) {h} x {w}": h % self.patch or w % self.patch,
            f"width {self.width} is not a multiple of num_heads {self.num_heads}": self.width % self.num_heads,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}": (
                self.num_heads % self.kv_heads
            ),
            f"head width {head_width} (width / num_heads) is not a multiple of 8": head_width % 8,
            f"depth {self.depth} is not positive": self.depth < 1,
            f"adapter_rank {self.adapter_rank} is negative": self.adapter_rank < 0,
            f"forward_mode supports only xla norms, rotations and MLPs, got {self.kernels}": (
                self.forward_mode
                and not {self.kernels.norm, self.kernels.qk_norm_rope, self.kernels.mlp} <= {None, "xla"}
            ),
        }
        return [problem for problem, broken in rules.items() if broken] + self.kernels.problems(self.mlp)

    def run_rules(self, sizes: Mapping[str, int], *, images: int) -> dict[str, bool]:
        """Rules for a run, {message: broken}; `sizes` are the mesh axes, `images` those computed at once per device."""
        del images
        hidden = MLPS[self.mlp].hidden(self.width)  # of the dense blocks
        tensor, fsdp = sizes["tensor"], sizes["fsdp"]
        return {
            f"model.num_kv_heads {self.kv_heads} is not a multiple of mesh.tensor {tensor}": self.kv_heads % tensor > 0,
            f"the feed-forward width {hidden} is not a multiple of mesh.tensor {tensor}": hidden % tensor > 0,
            f"model.width {self.width} is not a multiple of mesh.fsdp {fsdp}": self.width % fsdp > 0,
        }

    def mlp_flops(self) -> int:
        """FLOPs per token in the MLPs of all blocks."""
        return self.depth * MLPS[self.mlp].flops(self.width)

    def flops(self) -> int:
        """FLOPs of one forward pass over one image; a multiply-add counts 2 (the paper's "Gflops" count it once)."""
        tokens, d = self.grid[0] * self.grid[1], self.width
        head_width = d // self.num_heads
        projections = 2 * d * head_width * (2 * self.num_heads + 2 * self.kv_heads)  # q, out; k, v
        packed = head_width * (self.num_heads + 2 * self.kv_heads)
        adapters = 2 * self.adapter_rank * (d + packed + d + d)  # qkv, out
        attention = 4 * tokens * d  # q k^T and p v: 2 T D each
        block = tokens * (projections + adapters + attention) + 2 * d * 6 * d
        patch = self.patch**2
        ends = 2 * tokens * d * patch * (self.image_shape[2] + self.out_channels) + 2 * d * 2 * d
        return self.depth * block + tokens * self.mlp_flops() + ends + 2 * (NUM_FREQUENCIES * d + d * d)

    def rebalance(self, params: nnx.State, report: "Report") -> nnx.State:
        """Changes parameters after the update of a step, from the network's report; a DiT changes nothing."""
        del report
        return params

    def build(self, rngs: nnx.Rngs) -> "DiT":
        """A model of this config."""
        return DiT(self, rngs=rngs)

    def num_parameters(self) -> int:
        """Number of parameters as the paper counts them: trained ones plus the fixed position table."""
        model = nnx.eval_shape(lambda: self.build(nnx.Rngs(0)))
        trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        return trained + (self.grid[0] * self.grid[1] * self.width if self.positions == "sincos" else 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """Outputs of a network besides the image: auxiliary losses, metrics and expert loads."""

    losses: Any = 0.0  # float32 (B,): auxiliary losses, added to the losses of the examples
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: Any = None  # float32 (L, E): rows computed by each expert of each layer


class DiTBlock(nnx.Module):
    """Attention and MLP, each with an adaptive norm and a gate that starts at zero (adaLN-Zero)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.norm: NormKind = config.norm
        self.implementation = config.implementations.norm
        self.modulation = linear(config.width, (6, config.width), "D . .", init=zeros, rngs=rngs)
        self.attention = Attention(
            config.width,
            config.num_heads,
            config.kv_heads,
            qk_norm=config.qk_norm,
            adapter_rank=config.adapter_rank,
            attend=flash_attention_jvp if config.forward_mode else flash_attention,
            implementation=config.implementations.attention,
            qk_implementation=config.implementations.qk_norm_rope,
            rngs=rngs,
        )
        self.mlp = self.make_mlp(config, rngs)

    def make_mlp(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        return MLPS[config.mlp](config.width, implementation=config.implementations.mlp, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], c: Float[Array, "B D"], rotation: Rotation | None
    ) -> Float[Array, "B T D"]:
        return self.through(x, c, rotation, lambda h: (self.mlp(h), None))[0]

    def through[Extra](
        self, x: Array, c: Array, rotation: Rotation | None, mlp: Callable[[Array], tuple[Array, Extra]]
    ) -> tuple[Array, Extra]:
        """The block with `mlp` as its MLP; `mlp` returns its output and an extra value, which is returned too."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.unstack(self.modulation(c), axis=1)  # (B, D) each
        norm: Any = dict(kind=self.norm, implementation=self.implementation)
        y = self.attention(adaptive_norm(x, scale1, shift1, **norm), rotation)
        x, y = residual_norm(x, y, gate1, scale2, shift2, **norm)
        y, extra = mlp(y)
        return constrain(x + gate2[:, None] * y, "B T D"), extra


class DiT(nnx.Module):
    """Predicts x, v or eps (see diffusion/path.py) from a noisy image, its timestep and its class."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        h, w, c = config.image_shape
        patch = config.patch**2
        self.patches = linear(patch * c, config.width, ". D", rngs=rngs)
        self.time = TimeEmbedding(config.width, rngs=rngs)
        self.label = ClassEmbedding(config.num_classes, config.width, rngs=rngs)
        self.blocks = self.make_blocks(config, rngs)
        self.modulation = linear(config.width, (2, config.width), "D . .", init=zeros, rngs=rngs)
        self.out = linear(config.width, patch * config.out_channels, "D .", init=zeros, rngs=rngs)

    def __call__(
        self, image: Float[Array, "B h w c"], t: Float[Array, " B"], label: Int[Array, " B"]
    ) -> Float[Array, "B h w c_out"]:
        """The prediction, computed in the dtype of the parameters; t is in [0, 1], label num_classes is "no class"."""
        return self.with_report(image, t, label)[0]

    def make_blocks(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """All blocks as one module for `scan`: each parameter has a leading dimension L."""
        return stacked(lambda rngs: DiTBlock(config, rngs=rngs), config.depth, rngs)

    def with_report(self, image: Array, t: Array, label: Array) -> tuple[Array, Report]:
        """The prediction and the Report for training."""
        x, c, rotation = self.embed(image, t, label)
        x, _ = self.scan(lambda x, block: (block(x, c, rotation), None), x)
        return self.head(x, c), Report()

    def embed(self, image, t, label):
        """Tokens (B, T, D), conditioning (B, D), and the rotary embedding or None."""
        config = self.config
        head_width = config.width // config.num_heads
        x = self.patches(patchify(image.astype(self.patches.kernel.dtype), config.patch))  # (B, T, D)
        rotation = None
        if config.positions == "rope":
            rotation = Rotation.grid(config.grid, head_width)
        else:
            x = x + jnp.asarray(sincos_table(*config.grid, config.width), x.dtype)[None]
        return constrain(x, "B T D"), jax.nn.silu(self.time(t) + self.label(label)), rotation

    def scan(self, apply: Callable, x: Array):
        """Scans apply(x, block) -> (x, extra) over the blocks; returns the last x and the stacked extras."""
        return jax.lax.scan(jax.checkpoint(apply) if self.config.remat else apply, x, self.blocks)

    def head(self, x, c):
        """The final layer: tokens to the output image."""
        config = self.config
        shift, scale = jnp.unstack(self.modulation(c), axis=1)
        x = adaptive_norm(x, scale, shift, kind=config.norm, implementation=config.implementations.norm)
        h, w, _ = config.image_shape
        return unpatchify(self.out(x), config.patch, h, w)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Any:
    """`depth` modules as one, with stacked parameters, for `scan`."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))
