"""``portacnn bench``: a short figure of this machine, on each backend."""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from inspect import signature
from math import inf
from statistics import median
from typing import Any, NamedTuple

from portacnn.arguments import told
from portacnn.commands.environment import installed
from portacnn.commands.kinds import NUMBER, positive
from portacnn.console import say
from portacnn.errors import PortacnnError
from portacnn.models import MODELS, Normalize, make_model
from portacnn.models.registry import model_class
from portacnn.ops import use_kernels
from portacnn.runtime import available_backends, resolve
from portacnn.training import Trainer

HELP = "steps and images per second of a model, on each backend of this machine"
_CLASSES = 10
_SIZE = 28  # of models without a size of their own
_HARDWARE = ("cpu", "cuda", "mps", "xpu")
_BLOCKS = 5  # that the time is cut into; the median is printed


class Place(NamedTuple):
    """Where to measure: what to call it, a device, and a kernel set or None."""

    name: str
    device: str
    kernels: str | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "--model",
        default="simple_conv_net",
        metavar="NAME",
        help=f"{', '.join(MODELS)}; by default simple_conv_net",
    )
    add("--image-size", type=positive, metavar="PIXELS", help="by default the model's own")
    add("--batch-size", type=positive, default=100, metavar="N", help="by default 100")
    add("--device", help="measure on this one only; by default on each usable backend")
    add(
        "--seconds",
        type=_seconds,
        default=2.0,
        metavar="S",
        help="for each figure, after a first step; by default 2",
    )
    add("--json", action="store_true", help="print JSON")


def _seconds(word: str) -> float:
    seconds = float(NUMBER.from_word(word))
    if not 0.0 < seconds < inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {told(word)}")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Measure; return the exit status."""
    shape = _shape(options.model, options.image_size)
    title = f"{model_class(options.model).__name__}, images {'x'.join(map(str, shape))}, "
    rows = []
    if not options.json:
        say(f"{title}batches of {options.batch_size}", _row("", *_HEAD))
    for place in _places(options.device):
        try:
            rates = _measured(place, options, shape)
        except PortacnnError as error:
            if options.device is not None:
                raise
            say(f"{place.name}: {error}", error=True)
            continue
        rows.append({"backend": place.name, **dict(zip(_KEYS, rates, strict=True))})
        if not options.json:
            steps, *images = rates
            say(_row(place.name, f"{steps:,.1f}", *(f"{rate:,.0f}" for rate in images)))
    if options.json:
        about = {"model": options.model, "shape": list(shape), "batch_size": options.batch_size}
        say(json.dumps({**about, "results": rows}, indent=1))
    return 0


_KEYS = ("steps_per_second", "images_per_second", "predictions_per_second")
_HEAD = ("steps/s", "images/s trained", "images/s predicted")


def _row(name: str, *cells: str) -> str:
    return f"{name:32}{cells[0]:>9}{cells[1]:>18}{cells[2]:>20}".rstrip()


def _shape(model: str, size: int | None) -> tuple[int, int, int]:
    """Return (C, H, W) of the model's images, of its own size by default."""
    parameters = signature(model_class(model).__init__).parameters
    if "input_dim" in parameters:
        channels, own = 1, _SIZE
    else:
        channels, own = (parameters[name].default for name in ("in_channels", "input_size"))
    return channels, size or own, size or own


def _places(device: str | None) -> Iterator[Place]:
    """Yield where to measure."""
    if device is not None:
        yield Place(str(resolve(device)), device)
        return
    for info in available_backends():
        for place in _one_of_each_kind(info.devices):
            name = f"{info.name} on {place}"
            if info.name == "numpy" and installed("numba"):
                yield Place(f"{name}, numba", f"{info.name}:{place}", "numba")
                yield Place(f"{name}, native", f"{info.name}:{place}", "native")
            else:
                yield Place(name, f"{info.name}:{place}")


def _one_of_each_kind(devices: Sequence[str]) -> list[str]:
    """Return the first device of each kind of hardware: of several GPUs the first, and none of
    array-api-strict's imitations."""
    found: dict[str, str] = {}
    for device in devices:
        found.setdefault(device.partition(":")[0], device)
    return [device for kind, device in found.items() if kind in _HARDWARE]


def _measured(
    place: Place, options: argparse.Namespace, shape: tuple[int, int, int]
) -> tuple[float, float, float]:
    """Return steps per second, images per second of them, and of ``predict``."""
    host, size = resolve("numpy").xp, options.batch_size
    model = make_model(options.model, shape, _CLASSES, device=place.device, seed=0)
    model.preprocess = Normalize()
    pixels = host.arange(size * shape[0] * shape[1] * shape[2]) * 31 % 251
    x = host.reshape(host.astype(pixels, host.uint8), (size, *shape))
    maps = model.output_shape[1:]
    t = host.broadcast_to(
        host.reshape(host.arange(size) % _CLASSES, (size, *(1 for _ in maps))), (size, *maps)
    )
    trainer = Trainer(model, x, t, batch_size=size, seed=0, verbose=False)
    batch = trainer.backend.asarray(host.arange(size))
    with nullcontext() if place.kernels is None else use_kernels(place.kernels):
        steps = _rate(lambda: trainer.run_batch(batch), trainer.backend, options.seconds)
        passes = _rate(lambda: model.predict(x), trainer.backend, options.seconds)
    return steps, steps * size, passes * size


def _rate(call: Callable[[], Any], backend: Any, seconds: float) -> float:
    """Return calls per second, the median of several blocks, after a first call."""
    call()
    backend.synchronize()
    rates = []
    for _ in range(_BLOCKS):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / _BLOCKS:
            call()
            count += 1
        backend.synchronize()
        rates.append(count / (time.perf_counter() - start))
    return median(rates)
