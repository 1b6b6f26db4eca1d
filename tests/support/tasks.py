"""A small training for every word of a loss, with every metric that goes with it."""

import numpy as np

from portacnn import Model, Trainer
from portacnn.layers import Conv2d, Flatten, Linear, ReLU
from support.nets import patches

X, CLASSES = patches(40)
BINARY = (CLASSES[:, None] == np.arange(3)).astype("uint8")
MASKS = (X[:, 0] > 0.7).astype("uint8")
VALUES = CLASSES.astype("float32") / 3
OF_CLASSES = [
    *("accuracy", "pixel_accuracy", "balanced_accuracy", "precision", "recall", "f1"),
    *("confusion_matrix", "roc_auc", "mean_iou", "dice"),
]
OF_LABELS = ["accuracy", "precision", "recall", "f1", "roc_auc", "mean_iou", "dice"]
OF_VALUES = ["mae", "rmse", "r2"]

TASKS = {
    "cross_entropy": (CLASSES, 4, {"metrics": OF_CLASSES}),
    "focal": (CLASSES, 6, {"metrics": ["top5"]}),
    "bce_with_logits": (BINARY, 3, {"metrics": OF_LABELS}),
    "mse": (VALUES, 1, {"metrics": OF_VALUES}),
    "l1": (VALUES[:, None], 1, {}),
    "huber": (VALUES, 1, {}),
    "smooth_l1": (VALUES, 1, {}),
    "dice": (MASKS, 2, {"metrics": ["mean_iou"]}),
    "maps": (MASKS, 2, {"loss": "cross_entropy", "metrics": ["accuracy", "dice"]}),
    "nt_xent": (CLASSES, 5, {"metrics": []}),
    "triplet": (CLASSES, 5, {"metrics": []}),
}
"""By name: targets, outputs, options of the Trainer."""


def net(outputs: int, device: object = "numpy", maps: bool = False, dtype: str = "float32"):
    if maps:
        model = Model(conv=Conv2d(1, 4, 3, padding=1), relu=ReLU(), out=Conv2d(4, outputs, 1))
    else:
        model = Model(conv=Conv2d(1, 4, 3), relu=ReLU(), flat=Flatten(), fc=Linear(None, outputs))
    return model.build((1, 8, 8), device=device, dtype=dtype, seed=2)


def sets_of(task: str) -> tuple:
    """Training images and targets, and test images and targets."""
    t = TASKS[task][0]
    return X, t, X[:12], t[:12]


def made(task: str, device: object = "numpy", kind: type[Trainer] = Trainer, **changes: object):
    t, outputs, options = TASKS[task]
    model = net(outputs, device, maps=t is MASKS)
    options = {"loss": task, "epochs": 3, "batch_size": 16, "lr": 0.01, "verbose": False, **options}
    return kind(model, *sets_of(task), **{**options, **changes})


def figures(trainer: Trainer) -> dict:
    """``history`` without what a clock says, arrays as lists."""
    times = ("seconds", "images_per_second")
    return {
        name: [np.asarray(value).tolist() for value in values]
        for name, values in trainer.history.items()
        if name not in times
    }
