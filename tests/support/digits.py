"""For commands: a folder of digits in MNIST's format, and packages that look uninstalled."""

import struct
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# Put on PYTHONPATH as sitecustomize.py, this makes the packages named in BLOCKED look uninstalled.
BLOCK = """
import os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["BLOCKED"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
"""


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_digits(folder, train=40, test=15, classes=10, size=12):
    """The four files of MNIST's form, with noise for digits."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, size, size), dtype="uint8")
        labels = (np.arange(count) % classes).astype("uint8")
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder
