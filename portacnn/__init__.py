"""portacnn: CNNs on the Python array API. One model runs on NumPy, CuPy, PyTorch and other array
libraries."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "backends" / "threads.py").is_file() and (_root / "pyproject.toml").is_file():
    # a checkout, not installed: portacnn.backends is the folder backends/ beside this one
    __path__.append(str(_root))

from typing import TYPE_CHECKING

from portacnn.lazy import lazily
from portacnn.version import VERSION

if TYPE_CHECKING:
    from portacnn import (
        callbacks,
        data,
        detection,
        distributed,
        layers,
        losses,
        metrics,
        models,
        onnx,
        ops,
        optim,
        plot,
        schedules,
        scratch,
    )
    from portacnn.data import load_mnist, load_mnist_sample
    from portacnn.errors import PortacnnError
    from portacnn.models import Model, Normalize, SimpleConvNet, load
    from portacnn.runtime import Backend, available_backends, resolve
    from portacnn.training import EarlyStopping, Trainer
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "portacnn.data": ("load_mnist", "load_mnist_sample"),
            "portacnn.errors": ("PortacnnError",),
            "portacnn.models": ("Model", "Normalize", "SimpleConvNet", "load"),
            "portacnn.runtime": ("Backend", "available_backends", "resolve"),
            "portacnn.training": ("EarlyStopping", "Trainer"),
        },
        modules=(
            "augment",
            "callbacks",
            "data",
            "detection",
            "distributed",
            "errors",
            "gradient_check",
            "init",
            "layers",
            "losses",
            "metrics",
            "models",
            "onnx",
            "ops",
            "optim",
            "plot",
            "report",
            "runtime",
            "schedules",
            "scratch",
            "seeds",
            "sklearn",
            "testing",
            "training",
        ),
    )

__version__ = VERSION

__all__ = [
    "Backend",
    "EarlyStopping",
    "Model",
    "Normalize",
    "PortacnnError",
    "SimpleConvNet",
    "Trainer",
    "available_backends",
    "callbacks",
    "data",
    "detection",
    "distributed",
    "layers",
    "load",
    "load_mnist",
    "load_mnist_sample",
    "losses",
    "metrics",
    "models",
    "onnx",
    "ops",
    "optim",
    "plot",
    "resolve",
    "schedules",
    "scratch",
]
