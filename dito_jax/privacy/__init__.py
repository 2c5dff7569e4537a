"""Differentially private training (DP-SGD): clipping, noise, accounting, privacy ledger and audit."""
