"""Training: the state, the step, and what keeps a run alive and accounted for."""
