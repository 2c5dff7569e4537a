"""XLA FFI custom calls: how the sources in csrc/ are compiled, found and called."""
