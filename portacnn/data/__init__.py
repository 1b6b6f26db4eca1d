"""Data sets as NumPy arrays: MNIST, a bundled sample of it, any folder like it, and IDX files."""

from portacnn.cache import cache_folder
from portacnn.data.idx import read_idx, write_idx
from portacnn.data.mnist import load_idx_folder, load_mnist, load_mnist_sample

__all__ = [
    "cache_folder",
    "load_idx_folder",
    "load_mnist",
    "load_mnist_sample",
    "read_idx",
    "write_idx",
]
