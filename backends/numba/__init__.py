"""Kernels that numba compiles for NumPy arrays: the second set of CPU kernels."""
