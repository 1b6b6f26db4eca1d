"""Preprocessing of uint8 images: ``Normalize``, which is part of the model and saved in its
file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from portacnn.arguments import AnswersKeywords, listed, real
from portacnn.errors import ArgumentError, ModelFormatError, ShapeError
from portacnn.layers.base import Shape

_WIDEST = 1e30  # well within float32's range


@dataclass(frozen=True)
class Normalize(AnswersKeywords):
    """Map uint8 images to (pixels * scale - mean) / std.

        >>> Normalize(mean=0.5, std=0.25).in_pixels(1)  # in units of the pixels
        ([127.5], [63.75])

        model.preprocess = Normalize()  # 0..255 -> 0..1, as load_mnist(normalize=True) does
        # torchvision's
        model.preprocess = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    It is computed as (pixels - mean / scale) / (std / scale), in the model's dtype. With mean 0 and
    std 1 that is exactly pixels / 255.

    Args:
        scale: above 0.
        mean: after scaling: one number, or one per channel.
        std: above 0: one number, or one per channel.

    Raises:
        ArgumentError: if a value is out of range, or float32 cannot hold them together.
    """

    scale: float = 1 / 255
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        bounds: dict[str, dict[str, float]] = {
            "scale": {"above": 0.0},
            "mean": {},
            "std": {"above": 0.0},
        }
        for name, bound in bounds.items():
            object.__setattr__(self, name, _numbers(name, getattr(self, name), bound))
        if not isinstance(self.scale, float):
            raise ArgumentError(f"scale must be one number, got {self.scale!r}", "Normalize")
        if len({len(values) for values in (self.mean, self.std) if isinstance(values, tuple)}) > 1:
            raise ArgumentError(
                f"mean and std must have one number per channel each, got {self.mean} and "
                f"{self.std}",
                "Normalize",
            )
        mean, std = self.in_pixels(1)
        if not all(1 / _WIDEST < value < _WIDEST for value in std) or any(
            abs(value) > _WIDEST for value in mean
        ):
            raise ArgumentError(
                f"scale, mean and std together must stay within float32's range, got {self}"
            )

    def in_pixels(self, channels: int) -> tuple[list[float], list[float]]:
        """Return mean and std of every channel, in units of the pixels."""
        mean, std = (
            value if isinstance(value, tuple) else (value,) * channels
            for value in (self.mean, self.std)
        )
        return [m / self.scale for m in mean], [s / self.scale for s in std]

    def check(self, sample: Shape) -> None:
        """Raise ShapeError if images of shape ``sample`` have another number of channels."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if isinstance(values, tuple) and len(values) != sample[0]:
                raise ShapeError(
                    f"preprocess: {name} has {len(values)} values, one per channel, but images "
                    f"(N, {', '.join(map(str, sample))}) have {sample[0]} channels"
                )

    def description(self) -> dict[str, Any]:
        """Return JSON values that ``rebuild_preprocess`` reads."""
        return {"class": "Normalize", "arguments": asdict(self)}


def rebuild_preprocess(described: Any) -> Normalize | None:
    """Return what ``Normalize.description`` described; None for None. Raises the constructor's
    errors."""
    if described is None:
        return None
    if described["class"] != "Normalize":
        raise ModelFormatError(f"unknown preprocess {described['class']!r}; upgrade portacnn")
    return Normalize(**described["arguments"])


def _numbers(name: str, value: Any, bounds: dict[str, float]) -> float | tuple[float, ...]:
    """Return a float, or a tuple of floats for a sequence. Takes the numbers of any library."""
    value = listed(value)
    try:
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            return tuple(real(f"{name}[{i}]", number, **bounds) for i, number in enumerate(value))
        return real(name, value, **bounds)
    except ArgumentError as error:
        raise error.at("Normalize")
