"""A run's folder without a training: images in an .npz, a model that computes what a page can."""

import numpy as np

from portacnn import run_folder
from portacnn.layers import (
    AvgPool2d,
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
)
from portacnn.models import Model, ModelInfo, Normalize

HOSTILE = ('</script><img src=x onerror="alert(1)">', "<!-- <script>", 'a & b\'s "class"')


def write_run(folder, *, channels=1, names=HOSTILE, pool="global", preprocess=True, images=40):
    """Write a run; return its model and its test images and labels."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (images, channels, 12, 11), dtype="uint8")
    x = x if preprocess else (x / 255).astype("float32")
    t = rng.integers(0, 3, images)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data.npz", x_train=x[:4], t_train=t[:4], x_test=x, t_test=t)
    model = net(channels, pool)
    for layer in model.walk():  # statistics that are not 0 and 1
        if "running_mean" in layer.buffers:
            layer.buffers["running_mean"][...] = rng.normal(size=layer.output_shape[0]) / 10
            layer.buffers["running_var"][...] = rng.random(layer.output_shape[0]) + 0.5
    range_ = {} if preprocess else {"input_range": (0.0, 1.0)}
    model.info = ModelInfo(class_names=names, task="multiclass", **range_)
    if preprocess:
        model.preprocess = Normalize(mean=0.4, std=0.3)
    model.save(folder / run_folder.PARAMS)
    history = {"train_loss": [1.0, 0.5], "test_loss": [1.25, 0.75], "lr": [0.1, 0.05]}
    history |= {"train_accuracy": [0.25, 0.5], "test_accuracy": [0.125, 0.375], "seconds": [1, 2]}
    ran = {"date": "2026-01-02T03:04:05+00:00", "seconds": 61.0, "peak_memory": 3 << 20}
    ran |= {"backend": "numpy on cpu", "versions": {"numpy": "2.0", "torch": None}}
    run_folder.write_history(folder, history, [1.5, 1.0, 0.5], ran)
    settings = f'data = "{(folder / "data.npz").as_posix()}"\nmodel = "<i>net</i>"\nseed = 0\n'
    (folder / run_folder.SETTINGS).write_text(settings, encoding="utf-8")
    return model, x, t


def net(channels=1, pool="global"):
    """Every kind of layer that a page computes."""
    ends = {
        "global": {"mean": GlobalAvgPool(), "flatten": Flatten()},
        "global max": {"most": GlobalMaxPool(flatten=True)},
        "flat": {"flatten": Flatten()},
    }[pool]
    made = Model(
        conv1=Conv2d(channels, 4, (3, 5), padding=((2, 1), (0, 2)), dilation=(1, 2)),
        bn1=BatchNorm2d(4),
        relu1=ReLU(),
        pool1=MaxPool2d(3, 2, 1, ceil_mode=True),
        block=Sequential(Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), ReLU()),
        pool2=AvgPool2d(2, 1, 1),
        drop=Dropout(0.5),
        **ends,
        fc=Linear(None, 5),
        bn2=BatchNorm1d(5, affine=False),
        fc2=Linear(5, 3),
    )
    return made.build((channels, 12, 11), device="numpy", seed=1)
