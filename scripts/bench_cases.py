"""What ``bench.py`` compares: contenders and cases, and their words on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench_nets import FIXED, PLAIN, SHAPES
from bench_peers import INFERENCE, OFFERS, WITH_DEVICE

PORTACNN = ("portacnn", "portacnn-onnx")
BATCHES = {**dict.fromkeys(PLAIN, 100), "resnet20": 32, "alexnet": 1}
"""Images of a step or a prediction; 8 for the other nets, and 1 for mode serve."""
MODES = ("train", "infer", "serve", "epoch")
CONTENDERS = (
    "portacnn",
    "portacnn/native",
    "portacnn-onnx",
    "portacnn-onnx/native",
    "torch",
    "torch-channels-last",
    "torch-compile",
    "onnxruntime",
    "tutorials",
)
PRECISIONS = ("tf32", "bfloat16", "float16", "3xtf32")


class UsageError(Exception):
    """An error that the user can fix on the command line."""


@dataclass(frozen=True)
class Contender:
    """The parts of a name such as ``portacnn@cuda/reference``."""

    word: str
    name: str
    device: str | None
    kernels: str | None
    precision: str

    @classmethod
    def of(cls, word: str) -> "Contender":
        rest, slash, last = word.partition("/")
        kernels, precision = (None, last) if last in PRECISIONS else (last or None, "float32")
        name, at, device = rest.partition("@")
        if name not in ("portacnn", *OFFERS):
            raise UsageError(
                f"unknown contender {word!r}; known are portacnn, {', '.join(OFFERS)} (see --help)"
            )
        if at and (name not in (*PORTACNN, *WITH_DEVICE) or not device):
            raise UsageError(
                f"{word!r}: {name} takes no device"
                if device
                else f"{word!r} names no device after @"
            )
        if slash and (name not in PORTACNN or not last):
            raise UsageError(
                f"{word!r}: only portacnn has kernels, as in portacnn/reference, and precisions"
            )
        return cls(word, name, device or None, kernels, precision)

    def lacks(self, net: str, mode: str) -> str | None:
        """Return why the contender cannot run this case, or None."""
        if self.name in INFERENCE and mode not in ("infer", "serve"):
            return "it has inference only"
        if mode == "profile" and self.name != "portacnn":
            return "only portacnn has a profile"
        if mode == "epoch" and net not in PLAIN:
            return "an epoch uses images of MNIST's size, which this net does not support"
        offered = OFFERS.get(self.name, list(SHAPES))
        return None if net in offered else f"it is available with {', '.join(offered)} only"


class Case(NamedTuple):
    """One task for all contenders."""

    net: str
    batch: int
    mode: str
    size: int | None = None

    def __str__(self) -> str:
        return f"{self.place} batch {self.batch} {self.mode}"

    @property
    def place(self) -> str:
        """The net, and the size of its images if it is not its own."""
        return self.net if self.size is None else f"{self.net}@{self.size}"


# --- words of the command line


def words(text: str, known: Sequence[str], what: str) -> list[str]:
    chosen = list(dict.fromkeys(word for word in text.split(",") if word))
    for word in chosen:
        if known and word not in known:
            raise UsageError(f"unknown {what} {word!r}; known are {', '.join(known)}")
    if not chosen:
        raise UsageError(f"no {what} given")
    return chosen


def whole_numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(word) for word in words(text, (), option)]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UsageError(f"--{option} takes whole numbers above 0, such as 1,100; got {text!r}")
    return numbers


def all_cases(
    nets: list[str], modes: list[str], batches: list[int] | None, sizes: list[int] | None
) -> list[Case]:
    """Return the cases in the order in which they run.

    Raises:
        UsageError: a net has one image size only, or 16 does not divide a size of UNet.
    """
    for net in nets:
        if sizes and net in FIXED:
            raise UsageError(f"--sizes: {net} has images of {SHAPES[net][1]} only")
        if sizes and net == "unet" and any(size % 16 for size in sizes):
            raise UsageError("--sizes: unet needs multiples of 16")
    return [
        Case(net, n, mode, size)
        for net in nets
        for size in sizes or [None]
        for mode in modes
        for n in batches or [1 if mode == "serve" else BATCHES.get(net, 8)]
    ]
