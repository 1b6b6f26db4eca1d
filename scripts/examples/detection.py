"""Detection: which digits are where on a canvas. A one-stage detector with centres.

    python scripts/examples/detection.py --out runs/detection

Scenes of one to four digits and clutter are composed from the packaged sample of MNIST. The network
is a small fully convolutional one: a cell of its map, of 4x4 pixels, has the probabilities of
background and ten digits, and the distances to the edges of the digit's box. Non-maximum
suppression joins the detections of one digit. Average precision is over scenes of test digits,
which training has not seen. The last picture is a larger canvas: the network takes any size.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure

import portacnn
from portacnn import Model, Trainer, data, detection, losses
from portacnn.layers import BatchNorm2d, Conv2d, ReLU
from portacnn.losses import Loss
from portacnn.metrics import AveragePrecision
from portacnn.runtime import backend_of

STRIDE, SIZE, CLASSES = 4, 64, 10
SCENES = {"objects": (1, 4), "clutter": 6, "overlap": 0.3, "target": "boxes"}


@dataclass(frozen=True)
class Detection(Loss):
    """Cross-entropy of every cell, and L1 of the distances of those cells that have a digit.
    Targets are ``detection.center_targets``."""

    metrics: ClassVar[tuple[str, ...]] = ()

    def forward(self, y, t, weight=None):
        xp = backend_of(y).xp
        classes = xp.astype(t[:, 0, ...], xp.int64)
        first, kept = losses.CrossEntropy().forward(y[:, :-4, ...], classes, weight)
        own = xp.astype(t[:, :1, ...] > 0, y.dtype)
        share = own / xp.maximum(xp.sum(own), xp.ones_like(xp.sum(own)))
        off = y[:, -4:, ...] - t[:, 1:, ...]
        return first + xp.sum(share * xp.abs(off)) / 4, (kept, share, off)

    def backward(self, cache, dloss=1.0):
        kept, share, off = cache
        xp = backend_of(off).xp
        first = losses.CrossEntropy().backward(kept, dloss)
        return xp.concat([first, share * xp.sign(off) * (dloss / 4)], axis=1)


def network(width: int = 64, *, device: str | None = None, seed: int = 0) -> Model:
    """Return a network (1, S, S) -> (15, S/4, S/4): two convolutions of stride 2, four of stride 1,
    whose outputs see 41 pixels."""
    layers: list[Any] = []
    for channels, size, stride in ((width // 2, 5, 2), (width, 3, 2), *[(width, 3, 1)] * 4):
        conv = Conv2d(None, channels, size, stride, padding=size // 2, bias=False)
        layers += [conv, BatchNorm2d(channels), ReLU()]
    layers.append(Conv2d(None, 1 + CLASSES + 4, 1))
    return Model(*layers).build((1, SIZE, SIZE), device=device, seed=seed)


def detect(model: Model, x: Any, iou: float = 0.4) -> list[dict[str, Any]]:
    """Return boxes, scores and labels of each image, best first."""
    found = detection.center_decode(model.predict(x), STRIDE, top=60)
    keep = detection.batched_nms(found["boxes"], found["scores"], found["labels"], iou)
    return detection.per_image(found, keep & (found["scores"] > 0.05))


def average_precision(found: Any, true: Any, iou: Any) -> float:
    metric = AveragePrecision(iou)
    metric.update(found, true)
    return metric.compute()


def draw(axes: Any, image: Any, found: dict[str, Any], least: float = 0.5) -> None:
    """Draw an image and the boxes of a score of at least ``least``."""
    axes.imshow(image[0], cmap="gray", extent=(0, image.shape[2], image.shape[1], 0))
    axes.axis("off")
    for (x1, y1, x2, y2), score, label in zip(
        found["boxes"], found["scores"], found["labels"], strict=True
    ):
        if score >= least:
            axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=f"C{label}", linewidth=1.5)
            text = f"{label}: {score:.2f}"
            axes.text(x1, y1 - 1, text, color=f"C{label}", fontsize=8, clip_on=True)


def picture(model: Model, x: Any, large: Any) -> Figure:
    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    cells = figure.add_gridspec(2, 4)
    small = [figure.add_subplot(cells[row, column]) for row in (0, 1) for column in (0, 1)]
    for axes, image, found in zip(small, x, detect(model, x[:4]), strict=False):
        draw(axes, image, found)
    draw(figure.add_subplot(cells[:, 2:]), large[0], detect(model, large)[0])
    return figure


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--scenes", type=int, default=3000, help="for training; by default 3000")
    add("--test-scenes", type=int, default=500, help="by default 500")
    add("--epochs", type=int, default=12, help="by default 12")
    add("--batch-size", type=int, default=32, help="by default 32")
    add("--seed", type=int, default=0, help="of weights, order and training scenes; by default 0")
    add("--width", type=int, default=64, help="channels of the network; by default 64")
    add("--device", help="cpu, cuda, torch, ...; by default numpy")
    add("--out", type=Path, default=Path("."), help="folder for detection.png")
    options = parser.parse_args(arguments)

    begun = time.perf_counter()
    (x, t), (x_test, t_test) = portacnn.load_mnist_sample()
    x, boxes = data.scenes(x, t, options.scenes, size=SIZE, seed=3 + options.seed, **SCENES)
    wide = {**SCENES, "objects": (16, 16), "clutter": 24}
    large, _ = data.scenes(x_test, t_test, 1, size=160, seed=2, **wide)
    x_test, true = data.scenes(x_test, t_test, options.test_scenes, size=SIZE, seed=1, **SCENES)

    model = network(options.width, device=options.device, seed=options.seed)
    t = detection.center_targets(boxes, model.output_shape[1:], STRIDE)
    trainer = Trainer(
        model, x, t, loss=Detection(), epochs=options.epochs,
        batch_size=min(options.batch_size, options.scenes), lr=0.003, schedule="one_cycle",
        seed=options.seed,
    )  # fmt: skip
    trainer.train()

    found = detect(model, x_test)
    figures = {
        "ap50": average_precision(found, true, 0.5),
        "ap": average_precision(found, true, "coco"),
        "seconds": time.perf_counter() - begun,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    picture(model, x_test, large).savefig(options.out / "detection.png")
    print(
        f"average precision {figures['ap50']:.3f} at IoU 0.5, {figures['ap']:.3f} over 0.5:0.95, "
        f"{len(true)} test scenes; {figures['seconds']:.0f} s"
    )
    return figures


if __name__ == "__main__":
    main()
