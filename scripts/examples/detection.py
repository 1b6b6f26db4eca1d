"""Detection: which digits are where. A one-stage detector with centres on scenes of MNIST's digits.

    python scripts/examples/detection.py --out runs/detection

Scenes of one to four digits and clutter are composed from the packaged sample. The network is fully
convolutional: each cell of its map, 4x4 pixels, has the logits of background and of ten digits, and
the distances to the edges of the digit's box. Non-maximum suppression leaves one box of a digit.
Average precision is over scenes of test digits. The settings were chosen by that of --validate, on
scenes of 800 training digits that were left out for it. The figure has four test scenes and a
larger canvas: the network takes images of any size.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import portacnn
from portacnn import Model, Trainer, data, detection, plot
from portacnn.layers import BatchNorm2d, Conv2d, Layer, ReLU
from portacnn.losses import CenterDetection
from portacnn.metrics import AveragePrecision

STRIDE, SIZE, CLASSES = 4, 64, 10
SCENES = {"objects": (1, 4), "clutter": 6, "overlap": 0.3, "target": "boxes"}
CANVAS = {**SCENES, "objects": (16, 16), "clutter": 24, "size": 160}


def network(width: int = 48, *, device: str | None = None, seed: int = 0) -> Model:
    """Return a network (1, H, W) -> (15, H/4, W/4): two convolutions of stride 2, four of stride 1.
    A cell's outputs see 41x41 pixels, which is more than a digit."""
    layers: list[Layer] = []
    for channels, size, stride in ((width // 2, 5, 2), (width, 3, 2), *[(width, 3, 1)] * 4):
        conv = Conv2d(None, channels, size, stride, padding=size // 2, bias=False)
        layers += [conv, BatchNorm2d(channels), ReLU()]
    layers.append(Conv2d(None, 1 + CLASSES + 4, 1))
    return Model(*layers).build((1, SIZE, SIZE), device=device, seed=seed)


def detect(model: Model, x: Any, least: float = 0.05) -> list[dict[str, Any]]:
    """Return for each image the boxes, scores and labels of a score of ``least``, best first.

    A place has one digit. So a box suppresses those of other classes, too.
    """
    found = detection.center_decode(model.predict(x), STRIDE, top=100)
    keep = detection.nms(found["boxes"], found["scores"], 0.4)
    return detection.per_image(found, keep & (found["scores"] >= least))


def average_precision(found: list[Any], true: list[Any], iou: float | str) -> float:
    """Return the average precision of ``detect``'s result for true boxes."""
    metric = AveragePrecision(iou)
    metric.update(found, true)
    return metric.compute()


def picture(model: Model, scenes: Any, canvas: Any) -> Figure:
    """Draw the boxes of a score of at least 0.5: in the first four scenes with their scores, and in
    a canvas."""
    figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 4)
    places = [grid[0, 0], grid[0, 1], grid[1, 0], grid[1, 1], grid[:, 2:]]
    found = detect(model, scenes[:4], 0.5) + detect(model, canvas, 0.5)
    for place, image, each in zip(places, [*scenes[:4], *canvas], found, strict=True):
        scores = each["scores"] if image.shape[1] == SIZE else None
        plot.boxes(image, each["boxes"], each["labels"], scores, axes=figure.add_subplot(place))
    return figure


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--scenes", type=int, default=4000, help="for training; by default 4000")
    add("--test-scenes", type=int, default=500, help="by default 500")
    add("--epochs", type=int, default=10, help="by default 10")
    add("--batch-size", type=int, default=16, help="by default 16")
    add("--lr", type=float, default=0.006, help="the highest learning rate; by default 0.006")
    add("--width", type=int, default=48, help="channels of the network; by default 48")
    add("--seed", type=int, default=0, help="of weights, order and training scenes; by default 0")
    add("--validate", action="store_true", help="leave out 800 training digits, and test on those")
    add("--device", help="cpu, cuda, torch, ...; by default numpy")
    add("--out", type=Path, default=Path("."), help="folder for the figure and the weights")
    options = parser.parse_args(arguments)

    begun, processor = time.perf_counter(), time.process_time()
    (x, t), (x_test, t_test) = portacnn.load_mnist_sample()
    if options.validate:
        (x, t), (x_test, t_test) = (x[:-800], t[:-800]), (x[-800:], t[-800:])
    x, boxes = data.scenes(x, t, options.scenes, size=SIZE, seed=options.seed + 3, **SCENES)
    canvas, _ = data.scenes(x_test, t_test, 1, seed=2, **CANVAS)
    x_test, true = data.scenes(x_test, t_test, options.test_scenes, size=SIZE, seed=1, **SCENES)

    model = network(options.width, device=options.device, seed=options.seed)
    targets = detection.center_targets(boxes, model.output_shape[1:], STRIDE)
    Trainer(
        model, x, targets, loss=CenterDetection(box_weight=2.0), epochs=options.epochs,
        batch_size=min(options.batch_size, len(x)), lr=options.lr, schedule="one_cycle",
        seed=options.seed,
    ).train()  # fmt: skip

    found = detect(model, x_test)
    figures = {
        "ap50": average_precision(found, true, 0.5),
        "ap": average_precision(found, true, "coco"),
        "seconds": time.perf_counter() - begun,
        "processor": time.process_time() - processor,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    model.save(options.out / "detection.safetensors")
    picture(model, x_test, canvas).savefig(options.out / "detection.png")
    print(
        f"average precision {figures['ap50']:.3f} at IoU 0.5, {figures['ap']:.3f} over 0.5:0.95 in "
        f"{len(true)} {'validation' if options.validate else 'test'} scenes; "
        f"{figures['seconds']:.0f} s, processor time {figures['processor']:.0f} s"
    )
    return figures


if __name__ == "__main__":
    main()
