"""Planning without a run: AOT compile, HLO reports, step cost and kernel ablation."""
