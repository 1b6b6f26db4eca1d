"""NumPy on the CPU: the adapter, and NumPy kernels for the ops whose portable version is slow."""
