"""Training: train state, train step, optimizer, EMA and compilation."""
