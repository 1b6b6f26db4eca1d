"""Small data and networks for the tests of layers, models and training."""

from collections import OrderedDict

import numpy as np

from portacnn import Model, SimpleConvNet, Trainer
from portacnn.layers import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
)
from support.matrix import Here


def patches(count, classes=4, shape=(1, 8, 8), seed=0, dtype="float32"):
    """Noise with a bright row whose place is the class: (images, labels), learnt in a few steps."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = 0.3 * rng.random((count, *shape))
    images[np.arange(count), :, labels, :] += 1.0
    return images.astype(dtype), labels


def as_bytes(images):
    """``patches`` as a file would have them: uint8."""
    return np.clip(np.rint(images * 150), 0, 255).astype("uint8")


def small_net(device="numpy", **changes):
    """A SimpleConvNet for ``patches``: 1x8x8 -> 3x6x6 -> 3x3x3 -> 6 -> 4."""
    arguments = {
        "input_dim": (1, 8, 8),
        "conv_param": {"filter_num": 3, "filter_size": 3},
        "hidden_size": 6,
        "output_size": 4,
        "weight_init_std": "he",
        "seed": 0,
    }
    return SimpleConvNet(**{**arguments, **changes}, device=device)


def torch_twin(torch, model):
    """The same network in PyTorch alone, with the weights of a SimpleConvNet."""
    weights = {path: torch.tensor(value) for path, value in model.state_dict().items()}
    filters, channels, size, _ = weights["conv1.weight"].shape
    conv = model.children["conv1"]
    (hidden, features), classes = weights["fc1.weight"].shape, weights["fc2.weight"].shape[0]
    nn = torch.nn
    parts = OrderedDict(
        conv1=nn.Conv2d(channels, filters, size, conv.stride, conv.padding),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(features, hidden),
        relu2=nn.ReLU(),
        fc2=nn.Linear(hidden, classes),
    )
    twin = nn.Sequential(parts).to(next(iter(weights.values())).dtype)
    twin.load_state_dict(weights, strict=True)
    return twin


def bits(model):
    """A model's state as bytes by path, for comparing to the last bit."""
    return {
        path: (value.dtype, value.shape, value.tobytes())
        for path, value in model.state_dict().items()
    }


def normed_net(device, dtype="float32"):
    model = Model(
        conv=Conv2d(1, 3, 3), bn=BatchNorm2d(3), relu=ReLU(), flatten=Flatten(), fc=Linear(None, 4)
    )
    return model.build((1, 8, 8), device=device, seed=1, dtype=dtype)


def trained(seed: int, epochs: int = 2) -> Trainer:
    draws = np.random.default_rng(seed)
    x, t = draws.random((50, 1, 28, 28), dtype=np.float32), draws.integers(0, 10, 50)
    trainer = Trainer(
        SimpleConvNet(seed=seed, device="numpy"),
        x,
        t,
        x,
        t,
        epochs=epochs,
        mini_batch_size=20,
        verbose=False,
    )
    trainer.train()
    return trainer


def distinct_batch(shape, seed=0):
    """Distinct values, no two equal: a maximum and a ReLU's bend are then clear of finite
    differences."""
    count = int(np.prod(shape))
    values = np.random.default_rng(seed).permutation(count) - count / 2 + 0.25
    return values.reshape(shape) / max(count, 1)


def small_chain():
    return Sequential(
        conv1=Conv2d(2, 4, 3, padding=1),
        relu1=ReLU(),
        pool1=MaxPool2d(2),
        body=Sequential(Conv2d(None, 3, 1), Sequential(act=Sigmoid())),
        flatten=Flatten(),
        fc=Linear(None, 5),
    )


def model_on(here: Here, seed: int = 0) -> Model:
    """All kinds of layers: fused ones, one without a way of its own, and containers."""
    model = Model(
        conv1=Conv2d(1, 3, 3, padding=1),
        relu1=ReLU(),
        pool1=MaxPool2d(2),
        block=Residual(Conv2d(3, 3, 3, padding=1), activation=ReLU()),
        norm=BatchNorm2d(3),
        drop=Dropout(0.5),
        flatten=Flatten(),
        fc1=Linear(None, 6),
        relu2=ReLU(),
        fc2=Linear(6, 4),
    )
    return model.build((1, 8, 8), device=here.device, seed=seed)
