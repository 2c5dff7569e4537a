"""What a config must not have for a private run: whatever lets examples meet, or tells of them beside the noised sum.

Guarantees: a config that passes computes each example's loss from that example alone, as far as models, routers and
steps of this repository go. A network of somebody else's is not looked into, but for batch normalization
(`tapped` and the tests of sensitivity are what shows more).
"""

from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.privacy.settings import PrivacyConfig


def private_rules(model: DiTConfig, privacy: PrivacyConfig, checkpoint: CheckpointConfig) -> dict[str, bool]:
    """What makes a run impossible under privacy, with the reason and the cure, and whether it does."""
    rules = {
        f"privacy.dataset is {privacy.dataset!r}: name the data set whose ledger is charged": not privacy.dataset,
        f"privacy.clip_norm {privacy.clip_norm} is not positive": privacy.clip_norm <= 0,
        f"privacy.noise_multiplicity {privacy.noise_multiplicity} is not positive": privacy.noise_multiplicity < 1,
        f"privacy.microbatch {privacy.microbatch} is not positive": privacy.microbatch < 1,
        f"privacy.spare_steps {privacy.spare_steps} is negative": privacy.spare_steps < 0,
        f"model.kernels.mlp {model.kernels.mlp!r} hides what is inside the MLP from privacy.backend "
        f"{privacy.backend!r}: leave it None, or take 'microbatch'": (
            model.kernels.mlp is not None and privacy.backend in ("ghost", "bookkeeping")
        ),
        f"checkpoint.keep_best {checkpoint.keep_best} would choose a checkpoint by the private examples' losses: "
        "set it to 0": checkpoint.keep_best > 0,
    }
    return rules | (_routing_rules(model) if isinstance(model, MoEDiTConfig) else {})


def _routing_rules(model: MoEDiTConfig) -> dict[str, bool]:
    return {
        f"model.pool {model.pool} lets images compete for experts, so one image changes another's gradient: "
        "set it to 1": model.pool > 1,
        "model.balance 'batch' makes the loss of one image depend on the others: set it to 'example', or "
        "model.balance_weight and model.z_weight to 0": (
            model.balance == "batch" and model.router != "timestep" and bool(model.balance_weight or model.z_weight)
        ),
        f"model.bias_rate {model.bias_rate} moves the router's biases by counts of private examples, without noise: "
        "set it to 0, or take the router 'softmax'": model.router == "sigmoid" and model.bias_rate != 0,
    }
