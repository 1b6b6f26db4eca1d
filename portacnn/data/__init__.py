"""Data sets as NumPy arrays: MNIST, a bundled sample of it, any folder like it, IDX files, and
images that are made."""

from portacnn.cache import cache_folder
from portacnn.data.idx import read_idx, write_idx
from portacnn.data.mnist import load_idx_folder, load_mnist, load_mnist_sample
from portacnn.data.synthetic import SHAPES, rotate, scenes, shapes

__all__ = [
    "SHAPES",
    "cache_folder",
    "load_idx_folder",
    "load_mnist",
    "load_mnist_sample",
    "read_idx",
    "rotate",
    "scenes",
    "shapes",
    "write_idx",
]
