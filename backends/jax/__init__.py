"""JAX: the adapter, arrays that can be written to, compiled steps, and kernels that XLA has itself."""
