"""Data sets: folders of images, named sets (MNIST and others), arrays and memory maps, IDX files,
and images that are made."""

from typing import TYPE_CHECKING

from portacnn.lazy import lazily

if TYPE_CHECKING:
    from portacnn.cache import cache_folder
    from portacnn.data.dataset import Dataset
    from portacnn.data.decoding import read_image
    from portacnn.data.idx import read_idx, write_idx
    from portacnn.data.image_folder import ImageFolder
    from portacnn.data.loading import load
    from portacnn.data.mnist import load_idx_folder, load_mnist, load_mnist_sample
    from portacnn.data.named import NAMES
    from portacnn.data.rows import Rows
    from portacnn.data.stream import Stream
    from portacnn.data.synthetic import SHAPES, rotate, scenes, shapes
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "portacnn.cache": ("cache_folder",),
            "portacnn.data.dataset": ("Dataset",),
            "portacnn.data.decoding": ("read_image",),
            "portacnn.data.idx": ("read_idx", "write_idx"),
            "portacnn.data.image_folder": ("ImageFolder",),
            "portacnn.data.loading": ("load",),
            "portacnn.data.mnist": ("load_idx_folder", "load_mnist", "load_mnist_sample"),
            "portacnn.data.named": ("NAMES",),
            "portacnn.data.rows": ("Rows",),
            "portacnn.data.stream": ("Stream",),
            "portacnn.data.synthetic": ("SHAPES", "rotate", "scenes", "shapes"),
        },
    )

__all__ = [
    "NAMES",
    "SHAPES",
    "Dataset",
    "ImageFolder",
    "Rows",
    "Stream",
    "cache_folder",
    "load",
    "load_idx_folder",
    "load_mnist",
    "load_mnist_sample",
    "read_idx",
    "read_image",
    "rotate",
    "scenes",
    "shapes",
    "write_idx",
]
