"""CuPy on CUDA devices: the adapter, and CUDA kernels compiled by NVRTC (sources in ``cuda/``)."""
