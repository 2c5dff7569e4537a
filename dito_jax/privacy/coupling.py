"""Rules for the config of a private run: nothing may mix examples, or release more of them than the noised sum.

Guarantees: with a config that passes, the loss of each example depends on that example only, for the models, routers
and steps of this repository. Other networks are not checked here; errors in them show in `ghost_clipping.find_hooks`
and in tests of the sensitivity.
"""

from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.privacy.settings import PrivacyConfig


def private_rules(model: DiTConfig, privacy: PrivacyConfig, checkpoint: CheckpointConfig) -> dict[str, bool]:
    """Rules for a private run, {message with the reason and what to do: broken}."""
    rules = {
        f"privacy.dataset is {privacy.dataset!r}: name the data set whose ledger is charged": not privacy.dataset,
        f"privacy.clip_norm {privacy.clip_norm} is not positive": privacy.clip_norm <= 0,
        f"privacy.noise_multiplicity {privacy.noise_multiplicity} is not positive": privacy.noise_multiplicity < 1,
        f"privacy.microbatch {privacy.microbatch} is not positive": privacy.microbatch < 1,
        f"privacy.spare_steps {privacy.spare_steps} is negative": privacy.spare_steps < 0,
        f"model.kernels.mlp {model.kernels.mlp!r} has no gradient hooks inside the MLP for privacy.backend "
        f"{privacy.backend!r}: set it to None, or use 'microbatch'": (
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
