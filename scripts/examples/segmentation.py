"""Segmentation: the class of each pixel. A UNet on scenes of MNIST's digits and clutter.

    python scripts/examples/segmentation.py --out runs/segmentation

Scenes of two to six digits and clutter are composed from MNIST (--data mnist-sample: from the 5,000
digits in the package, which are too few for unseen handwriting). The network says of
each pixel whether it is background, clutter included, or of which digit it is. Mean IoU is over
these 11 classes. The settings were chosen by that of validation scenes, of 800 training digits that
training does not see. Test digits are looked at once, at the end. The figure has four test scenes
and a larger canvas: the network takes images of any height and width that are multiples of 8.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from portacnn import Trainer, data, losses
from portacnn.models import Model, UNet

SIZE, CLASSES, HELD_OUT = 64, 11, 800
SCENES = {"objects": (2, 6), "clutter": 6, "overlap": 0.15}
CANVAS = {**SCENES, "objects": (16, 16), "clutter": 24, "size": 160}
# of the digits: Okabe and Ito's seven, which the colour-blind can tell apart, and three more
COLORS = ListedColormap(
    ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF",
     "#9F79EE", "#8B4513"]
)  # fmt: skip


def digits_of(mask: Any, least: int = 10) -> str:
    """Return in words which digits have at least so many pixels, from left to right."""
    columns = {c: np.nonzero(mask == c)[1] for c in range(1, CLASSES)}
    there = [c for c, found in columns.items() if len(found) >= least]
    return " ".join(str(c - 1) for c in sorted(there, key=lambda c: columns[c].mean()))


def picture(model: Model, scenes: list[Any], masks: list[Any]) -> Figure:
    """Draw scenes (1, H, W) of any size, and below each its mask and the network's."""
    figure = Figure(figsize=(2.0 * len(scenes), 6.6), dpi=90, layout="constrained")
    rows = figure.subplots(3, len(scenes))
    for column, (scene, mask) in enumerate(zip(scenes, masks, strict=True)):
        found = model.home.to_host(model.predict(scene[None])).argmax(axis=1)[0]
        for row, (word, classes) in enumerate((("scene", None), ("true", mask), ("found", found))):
            axes = rows[row, column]
            axes.imshow(scene[0], cmap="gray", vmax=1.0 if classes is None else 2.5)
            if classes is not None:
                shown = np.ma.masked_equal(classes, 0)
                axes.imshow(shown, cmap=COLORS, vmin=1, vmax=CLASSES - 1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(word if classes is None else f"{word}: {digits_of(classes)}", fontsize=9)
    patches = [Patch(color=COLORS(c), ec="black", label=str(c)) for c in range(CLASSES - 1)]
    figure.legend(handles=patches, loc="outside lower center", ncols=10, frameon=False)
    return figure


def digits(part: data.Dataset) -> tuple[Any, Any]:
    """Return images from 0 to 1, and labels."""
    return np.asarray(part.images[:], dtype="float32") / 255, np.asarray(part.labels)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", default="mnist", help="a named set, or a path to one; by default mnist")
    add("--scenes", type=int, default=6000, help="for training; by default 6000")
    add("--test-scenes", type=int, default=500, help="as many for validation; by default 500")
    add("--epochs", type=int, default=10, help="by default 10")
    add("--batch-size", type=int, default=8, help="by default 8")
    add("--lr", type=float, default=0.01, help="the highest learning rate; by default 0.01")
    add("--width", type=int, default=12, help="channels at full resolution; by default 12")
    add("--seed", type=int, default=0, help="of weights, order and training scenes; by default 0")
    add("--device", help="cpu, cuda, torch, ...; by default numpy")
    add("--out", type=Path, default=Path("."), help="folder for the figure and the weights")
    options = parser.parse_args(arguments)

    begun, processor = time.perf_counter(), time.process_time()
    (x, t), test = (digits(part) for part in data.load(options.data))
    x_train, masks = data.scenes(
        x[:-HELD_OUT], t[:-HELD_OUT], options.scenes, size=SIZE, seed=options.seed + 3, **SCENES
    )
    count = options.test_scenes
    validation = data.scenes(x[-HELD_OUT:], t[-HELD_OUT:], count, size=SIZE, seed=1, **SCENES)
    x_test, true = data.scenes(*test, count, size=SIZE, seed=1, **SCENES)
    canvas, canvas_mask = data.scenes(*test, 1, seed=2, **CANVAS)

    model = UNet(
        1, CLASSES, depth=3, width=options.width, input_size=SIZE, device=options.device,
        seed=options.seed,
    )  # fmt: skip
    # nine pixels in ten are background, and most of those are black
    weight = (0.25, *[1.0] * (CLASSES - 1))
    trainer = Trainer(
        model, x_train, masks, loss=losses.CrossEntropy(weight=weight),
        metrics=["mean_iou", "pixel_accuracy"], epochs=options.epochs,
        batch_size=min(options.batch_size, len(x_train)), lr=options.lr, schedule="one_cycle",
        seed=options.seed, evaluate_sample_num_per_epoch=100,
    )  # fmt: skip
    trainer.train()

    figures = {
        "validation": trainer.evaluate(*validation)["mean_iou"],
        **trainer.evaluate(x_test, true),
        "seconds": time.perf_counter() - begun,
        "processor": time.process_time() - processor,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    model.save(options.out / "segmentation.safetensors")
    drawn = picture(model, [*x_test[:4], *canvas], [*true[:4], *canvas_mask])
    drawn.savefig(options.out / "segmentation.png")
    print(
        f"mean IoU {figures['validation']:.3f} in {count} validation scenes, "
        f"{figures['mean_iou']:.3f} in {count} test scenes (pixel accuracy "
        f"{figures['pixel_accuracy']:.3f}); {figures['seconds']:.0f} s, "
        f"processor time {figures['processor']:.0f} s"
    )
    return figures


if __name__ == "__main__":
    main()
