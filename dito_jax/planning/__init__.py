"""Planning: a run compiled, and looked at, before it is run."""
