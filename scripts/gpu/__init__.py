"""The parts of ``gpu_check.py``: its sections and their shared code; and commands for the CUDA
kernels.
"""
