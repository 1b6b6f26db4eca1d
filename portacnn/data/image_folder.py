"""``ImageFolder``: a folder of images for each class becomes a ``Dataset``."""

import os
from collections.abc import Sequence
from typing import Literal

from portacnn.data.dataset import Dataset

MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image that is decoded, 8192 x 8192."""


class ImageFolder(Dataset):
    """Images from a folder for each class: ``root/cat/1.jpg``, ``root/dog/2.png``, ...

    Needs Pillow (``pip install "portacnn[data]"``). Images are decoded once, by threads, into a
    cache file of uint8 (N, C, image_size, image_size), which is then memory-mapped.

        photos = portacnn.data.ImageFolder("photos", image_size=64)
        train, test = photos.split(0.2)

    Args:
        root: the folder.
        image_size: height and width of the result. The short side of an image is resized to it, and
            the centre is cropped.
        mode: "RGB" (3 channels) or "L" (one, grey).
        cache: folder of the cache file. None is ``images/`` in ``cache_folder()``; False decodes
            into memory.
        threads: number of threads that decode. None is the number of cores.
        on_error: "raise" an error that names a file that cannot be decoded, or "skip" such files
            with a warning that counts them.
        max_pixels: largest number of pixels of an image; larger ones are refused before they are
            decoded.
        class_names: names of the class folders, in the order of the labels. None takes all folders,
            sorted by name. Folders that are missing are classes without images.

    Attributes:
        images, labels, class_names, files: as of ``Dataset``; files are paths below ``root``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int = 64,
        *,
        mode: Literal["RGB", "L"] = "RGB",
        cache: str | os.PathLike[str] | Literal[False] | None = None,
        threads: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        max_pixels: int = MAX_PIXELS,
        class_names: Sequence[str] | None = None,
    ) -> None:
        raise NotImplementedError

    @classmethod
    def train_and_test(
        cls,
        root: str | os.PathLike[str],
        image_size: int = 64,
        *,
        test_share: float = 0.2,
        seed: int = 0,
        mode: Literal["RGB", "L"] = "RGB",
        cache: str | os.PathLike[str] | Literal[False] | None = None,
        threads: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        max_pixels: int = MAX_PIXELS,
    ) -> tuple[Dataset, Dataset]:
        """Return the training set and the test set of a folder.

        If ``root`` has ``train/`` and one of ``test/``, ``val/``, ``valid/`` and ``validation/``,
        these are the sets, with the classes of ``train/``. Otherwise ``test_share`` of the images
        of each class is split off by ``seed``.
        """
        raise NotImplementedError
