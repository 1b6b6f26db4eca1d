"""Classification: which digit is on an image. A small residual network on all of MNIST.

    python scripts/examples/classification.py --out runs/classification

The network has a stage of 14x14 pixels, one of 7x7 and one of 4x4, each a residual block. Training
images are moved, turned, scaled and sheared a little in every epoch. 5,000 training images are
for validation: settings are judged by their accuracy, which the curve shows. The test images are
looked at once, at the end. The figure has those of them that the network finds hardest.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from portacnn import Model, Normalize, Trainer, data
from portacnn.augment import Affine
from portacnn.data import Dataset
from portacnn.layers import (
    BatchNorm2d,
    Conv2d,
    GlobalAvgPool,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.losses import scores

AUGMENT = Affine(degrees=12, translate=0.08, scale=(0.88, 1.12), shear=8)


def convolution(channels: int, size: int = 3, stride: int = 1) -> Sequential:
    """Return a convolution and batch norm, which makes a bias redundant."""
    conv = Conv2d(None, channels, size, stride, padding=size // 2, bias=False)
    return Sequential(conv, BatchNorm2d(channels))


def block(channels: int, stride: int) -> Layer:
    """Return a residual block. Its shortcut is a 1x1 convolution, as the channels change."""
    body = Sequential(convolution(channels, 3, stride), ReLU(), convolution(channels))
    return Residual(body, convolution(channels, 1, stride), activation=ReLU())


def network(
    classes: int, shape: tuple[int, ...], width: int = 16, *, device: str | None, seed: int
) -> Model:
    """Return a network (C, H, W) -> (classes,)."""
    model = Model(
        Sequential(convolution(width), ReLU(), MaxPool2d(2, 2)),
        block(3 * width // 2, 1),
        block(3 * width, 2),
        block(6 * width, 2),
        GlobalAvgPool(flatten=True),
        Linear(None, classes),
    ).build(shape, device=device, seed=seed)
    model.preprocess = Normalize()  # 0..255 -> 0..1
    return model


def first(images: Dataset, count: int | None) -> Dataset:
    """Return the first ``count`` images; None returns all."""
    return images.subset(np.arange(len(images))[:count])


def picture(accuracy: list[float], test: Dataset, probabilities: Any) -> Figure:
    """Draw the validation accuracy by epoch, and the test images whose class got the lowest
    probability."""
    labels = np.asarray(test.labels)
    own = probabilities[np.arange(len(labels)), labels]
    predicted = probabilities.argmax(axis=1)
    figure = Figure(figsize=(10, 4.4), dpi=100, layout="constrained")
    cells = figure.add_gridspec(3, 9)
    axes = figure.add_subplot(cells[:, :4])
    axes.plot(range(1, len(accuracy) + 1), accuracy, "o-", color="#0072B2", markersize=4)
    axes.set(xlabel="epoch", ylabel="accuracy, validation images")
    axes.grid(alpha=0.3)
    hardest = np.argsort(own, kind="stable")[:15]
    for place, index in enumerate(hardest.tolist()):
        axes = figure.add_subplot(cells[place // 5, 4 + place % 5])
        axes.imshow(np.asarray(test.images[index, 0]), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        says = f"says {predicted[index]} ({probabilities[index].max():.0%})"
        axes.set_title(f"is {labels[index]}\n{says}", fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", default="mnist", help="a named set, or a path to one; by default mnist")
    add("--images", type=int, help="take only so many training images")
    add("--test-images", type=int, help="take only so many test images")
    add("--epochs", type=int, default=15, help="by default 15")
    add("--batch-size", type=int, default=128, help="by default 128")
    add("--lr", type=float, default=0.008, help="the highest learning rate; by default 0.008")
    add("--width", type=int, default=16, help="channels of the first layer; by default 16")
    add("--seed", type=int, default=0, help="of weights and order; by default 0")
    add("--device", help="cpu, cuda, torch, ...; by default numpy")
    add("--out", type=Path, default=Path("."), help="folder for the figure and the weights")
    options = parser.parse_args(arguments)

    begun, processor = time.perf_counter(), time.process_time()
    train, test = data.load(options.data)
    train, test = first(train, options.images), first(test, options.test_images)
    train, validation = train.split(1 / 12, seed=0)
    classes = len(train.class_names) or int(max(train.labels)) + 1
    shape = tuple(train.images.shape[1:])
    model = network(classes, shape, options.width, device=options.device, seed=options.seed)
    trainer = Trainer(
        model, train, None, validation, None, epochs=options.epochs,
        batch_size=min(options.batch_size, len(train)), label_smoothing=0.05, optimizer="adamw",
        optimizer_param={"lr": options.lr, "weight_decay": 0.02}, schedule="one_cycle",
        augment=AUGMENT, seed=options.seed, evaluate_sample_num_per_epoch=5000,
    )  # fmt: skip
    trainer.train()

    outputs = model.predict(test.images)
    probabilities = model.home.to_host(scores(outputs, "multiclass"))
    right = probabilities.argmax(axis=1) == np.asarray(test.labels)
    figures = {
        "validation": trainer.test_acc_list[-1],
        "accuracy": float(right.mean()),
        "seconds": time.perf_counter() - begun,
        "processor": time.process_time() - processor,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    model.save(options.out / "classification.safetensors")
    drawn = picture(trainer.test_acc_list, test, probabilities)
    drawn.savefig(options.out / "classification.png")
    print(
        f"accuracy {figures['validation']:.4f} on {len(validation)} validation images, "
        f"{figures['accuracy']:.4f} on {len(test)} test images; {figures['seconds']:.0f} s, "
        f"processor time {figures['processor']:.0f} s"
    )
    return figures


if __name__ == "__main__":
    main()
