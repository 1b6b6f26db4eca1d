"""NumPy on the CPU: the adapter, and kernels in NumPy for the ops where the portable version is
slow."""
