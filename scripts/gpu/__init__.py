"""What ``gpu_check.py`` is made of: its sections, and what they stand on; and commands of their own
for the CUDA kernels."""
