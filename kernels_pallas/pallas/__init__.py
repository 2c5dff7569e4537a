"""What the Pallas kernels share: how they are launched, and how tiles are read and written."""
