"""What a run records: metrics, events, goodput; and the run directory it records them in."""
