"""PyTorch: the adapter, and kernels that call PyTorch's functions."""
