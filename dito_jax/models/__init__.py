"""Models: DiT and MoE-DiT, each with its config, preset sizes and FLOPs; fine-tuning and upcycling."""
