"""XLA FFI custom calls: compiling, loading and calling the C++ and CUDA sources in csrc/."""
