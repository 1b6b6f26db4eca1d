"""Similar-image search: which images show the same digit as this one?

    python scripts/examples/search.py --out runs/search

A classifier's inner layers are embeddings. One network learns all ten digits; the outputs of its
layer "fc1" find images of a digit among all test images. Another one learns 0 to 4 only, and has to
find 5 to 9, which training never saw: the last layers know nothing of these, so an earlier one,
"stage3", is taken. Precision at 10 is the share of the ten nearest neighbours that show the query's
digit; each test image is a query once, among all others. The pixels themselves are the comparison.

The layers were chosen on training images, with 5 to 9 as the classes to learn and 0 to 4 as those
to find: ``--validate`` does that, with a sixth of the training images for the search.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from portacnn import Model, Normalize, Trainer, data, plot
from portacnn.augment import Affine
from portacnn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
)
from portacnn.runtime import backend_of
from portacnn.search import Index

AUGMENT = Affine(degrees=12, translate=0.08, scale=(0.88, 1.12), shear=8)
LAYERS = ("stage2", "stage3", "pool", "fc1")
SEEN, UNSEEN = "fc1", "stage3"
"""The layer for classes that training saw, and for others."""


def network(width: int, *, device: str | None, seed: int) -> Model:
    """Return a classifier of ten digits. Its layer "stage3" has 7x7 pixels."""

    def stage(channels: int, *more: Any) -> Sequential:
        conv = Conv2d(None, channels, 3, padding=1, bias=False)
        return Sequential(conv, BatchNorm2d(channels), ReLU(), *more)

    model = Model(
        stage1=stage(width, MaxPool2d(2, 2)),
        stage2=stage(2 * width, MaxPool2d(2, 2)),
        stage3=stage(4 * width),
        pool=AvgPool2d(3, 2),
        flatten=Flatten(),
        fc1=Linear(None, 64),
        relu=ReLU(),
        fc2=Linear(None, 10),
    ).build((1, 28, 28), device=device, seed=seed)
    model.preprocess = Normalize()  # 0..255 -> 0..1
    return model


def trained(x: Any, t: Any, options: argparse.Namespace) -> Model:
    model = network(options.width, device=options.device, seed=options.seed)
    Trainer(
        model, x, t, loss=options.loss, epochs=options.epochs,
        batch_size=min(options.batch_size, len(x)), lr=0.005, schedule="one_cycle",
        augment=AUGMENT, seed=options.seed, metrics=(), evaluate_sample_num_per_epoch=1000,
    ).train()  # fmt: skip
    return model


def embeddings(model: Model, x: Any, layer: str) -> Any:
    """Return a layer's outputs for images, flat: (N, D)."""
    y = model.features(x, layer)
    return model.home.xp.reshape(y, (y.shape[0], -1))


def neighbors(index: Index, k: int) -> np.ndarray:
    """Return the places of each entry's k nearest others, as a NumPy array (N, k)."""
    places = index.query(k=k).indices
    return backend_of(places).to_host(places)


def precision(index: Index, t: Any, k: int = 10) -> float:
    """Return the share of the k nearest neighbours with the label of the query. ``t``: labels of
    the index's entries, NumPy."""
    return float(np.mean(t[neighbors(index, k)] == t[:, None]))


def compared(model: Model, x: Any, t: Any, k: int) -> dict[str, float]:
    """Return the precision of the pixels and of each layer."""
    home = model.home
    pixels = home.asarray(np.reshape(x, (len(x), -1)) / 255.0, model.dtype)
    found = {"pixels": precision(Index(pixels), t, k)}
    for layer in LAYERS:
        found[layer] = precision(Index(embeddings(model, x, layer)), t, k)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", default="mnist", help="mnist, or a folder with its files; by default mnist")
    add("--images", type=int, help="take only so many training images")
    add("--test-images", type=int, help="take only so many test images")
    add("--validate", action="store_true", help="search among training images, see above")
    add("--loss", default="cross_entropy", help="or nt_xent; by default cross_entropy")
    add("--epochs", type=int, default=3, help="by default 3")
    add("--batch-size", type=int, default=128, help="by default 128")
    add("--width", type=int, default=16, help="channels of the first layer; by default 16")
    add("--seed", type=int, default=0, help="of weights and order; by default 0")
    add("--device", help="cpu, cuda, torch, ...; by default numpy")
    add("--out", type=Path, default=Path("."), help="folder for the figure, weights and the index")
    options = parser.parse_args(arguments)

    begun, processor = time.perf_counter(), time.process_time()
    train, test = data.load(options.data)
    if options.validate:
        train, test = train.split(1 / 6, seed=0)
    x, t = train[: options.images]
    x_test, t_test = test[: options.test_images]
    learned, unseen = (t >= 5, t_test < 5) if options.validate else (t < 5, t_test >= 5)
    k = max(1, min(10, int(unseen.sum()) - 1))

    model = trained(x, t, options)
    figures: dict[str, Any] = {"all": compared(model, x_test, t_test, k)}
    narrow = trained(x[learned], t[learned], options)
    figures["unseen"] = compared(narrow, x_test[unseen], t_test[unseen], k)

    options.out.mkdir(parents=True, exist_ok=True)
    model.save(options.out / "search.safetensors")
    index = Index(embeddings(model, x_test, SEEN))
    index.save(options.out / "index.safetensors")
    sheet(narrow, x_test[unseen], t_test[unseen], k).savefig(options.out / "search.png", dpi=80)
    figures["seconds"] = time.perf_counter() - begun
    figures["processor"] = time.process_time() - processor

    found, known = ("0 to 4", "5 to 9") if options.validate else ("5 to 9", "0 to 4")
    print(f"precision at {k}     all digits   {found}, learned from {known}")
    for name, value in figures["all"].items():
        print(f"{name:15} {value:11.3f} {figures['unseen'][name]:12.3f}")
    print(f"{figures['seconds']:.0f} s, processor time {figures['processor']:.0f} s")
    return figures


def sheet(model: Model, x: Any, t: Any, k: int) -> Any:
    """Draw for each unseen digit its first two images, and what the search finds for them."""
    found = neighbors(Index(embeddings(model, x, UNSEEN)), k)
    rows = [int(i) for digit in np.unique(t) for i in np.flatnonzero(t == digit)[:2]]
    return plot.neighbors(
        [x[i] for i in rows],
        [[x[j] for j in found[i]] for i in rows],
        right=t[found[rows]] == t[rows, None],
    )


if __name__ == "__main__":
    main()
