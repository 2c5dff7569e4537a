"""Telemetry of a run: metrics, events, goodput, heartbeat, and the run directory."""
