"""Trainings in float64 on noise with a bright row, whose place is the class."""

import numpy as np

from portacnn.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from portacnn.models import Model
from portacnn.training import Trainer

COUNT, SIZE, EPOCHS = 50, 20, 4  # 3 steps an epoch, the last with 10 images


def digits(count, seed=0):
    """Noise with a bright row whose place is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = 0.3 * rng.random((count, 1, 8, 8))
    images[np.arange(count), :, labels, :] += 1.0
    return images, labels


def net(device="numpy", dtype="float64"):
    layers = {
        "conv1": Conv2d(1, 3, 3),
        "relu1": ReLU(),
        "pool1": MaxPool2d(2),
        "flatten": Flatten(),
        "fc1": Linear(27, 4),
    }
    return Model(**layers).build((1, 8, 8), device=device, dtype=dtype, seed=0)


def trainer(model=None, kind=Trainer, **changes):
    options = {
        "epochs": EPOCHS,
        "mini_batch_size": SIZE,
        "optimizer": "sgd",
        "optimizer_param": {"lr": 0.1},
        "seed": 5,
    }
    return kind(
        model or net(), *digits(COUNT), *digits(20, seed=1), verbose=False, **{**options, **changes}
    )


def weights(model):
    return {path: value.copy() for path, value in model.state_dict().items()}


def same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(
            one[path], other[path], rtol=tolerance, atol=tolerance, err_msg=path
        )
