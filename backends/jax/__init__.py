"""JAX: the adapter, arrays that can be written to, steps as programs of XLA, and kernels."""
