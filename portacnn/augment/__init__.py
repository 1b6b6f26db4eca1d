"""Augmentation: change training images at random, on the device, so that a network does not see
the same image twice.

    from portacnn.augment import HorizontalFlip, RandomCrop

    Trainer(model, x_train, t_train, x_test, t_test, augment=[RandomCrop(4), HorizontalFlip()])

The random numbers follow from the seed, the epoch and the index of the image. They are the same on
every backend, and in a training run that was resumed. docs/augmentation.md shows what each
transform does.
"""

from typing import TYPE_CHECKING

from portacnn.lazy import lazily

if TYPE_CHECKING:
    from portacnn.augment.applying import Augmented, apply, named, standard
    from portacnn.augment.base import Batch, Draw, Transform
    from portacnn.augment.geometric import (
        Affine,
        Geometric,
        HorizontalFlip,
        RandomCrop,
        RandomResizedCrop,
        Rotation,
        Scale,
        Shift,
        VerticalFlip,
    )
    from portacnn.augment.mixing import CutMix, MixUp
    from portacnn.augment.pixels import Brightness, Contrast, CutOut
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "portacnn.augment.applying": ("Augmented", "apply", "named", "standard"),
            "portacnn.augment.base": ("Batch", "Draw", "Transform"),
            "portacnn.augment.geometric": (
                *("Affine", "Geometric", "HorizontalFlip", "RandomCrop", "RandomResizedCrop"),
                *("Rotation", "Scale", "Shift", "VerticalFlip"),
            ),
            "portacnn.augment.mixing": ("CutMix", "MixUp"),
            "portacnn.augment.pixels": ("Brightness", "Contrast", "CutOut"),
        },
    )

__all__ = [
    "Affine",
    "Augmented",
    "Batch",
    "Brightness",
    "Contrast",
    "CutMix",
    "CutOut",
    "Draw",
    "Geometric",
    "HorizontalFlip",
    "MixUp",
    "RandomCrop",
    "RandomResizedCrop",
    "Rotation",
    "Scale",
    "Shift",
    "Transform",
    "VerticalFlip",
    "apply",
    "named",
    "standard",
]
