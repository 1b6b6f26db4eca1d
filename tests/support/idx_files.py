"""IDX files packed by hand, and small sets of four of them."""

import gzip
import struct

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def pack(code, letter, shape, values):
    return struct.pack(
        f">HBB{len(shape)}I{len(values)}{letter}", 0, code, len(shape), *shape, *values
    )


def tiny(images, labels, h=28, w=28):
    """The bytes of an image file with `images` images and a label file with these labels."""
    pixels = [(7 * i) % 256 for i in range(images * h * w)]
    return pack(8, "B", (images, h, w), pixels), pack(8, "B", (len(labels),), labels)


def fill(
    folder, train=(12, (*range(10), 3, 4)), test=(3, (9, 0, 1)), h=28, w=28, suffix="", dotted=False
):
    """Write a small set of four files and return their unpacked bytes by name."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = dict(zip(NAMES, tiny(*train, h, w) + tiny(*test, h, w), strict=True))
    for name, content in contents.items():
        path = folder / ((name.replace("-idx", ".idx") if dotted else name) + suffix)
        path.write_bytes(gzip.compress(content) if suffix else content)
    return contents
