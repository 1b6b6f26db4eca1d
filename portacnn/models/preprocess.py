"""``Normalize``: how a model's images become numbers. It is a part of the model: declared once,
saved in its file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from portacnn.arguments import AnswersKeywords, listed, real
from portacnn.errors import ArgumentError, ModelFormatError, ShapeError
from portacnn.layers.base import Shape

_WIDEST = 1e30  # what float32 holds, with room to spare


@dataclass(frozen=True)
class Normalize(AnswersKeywords):
    """(pixels * scale - mean) / std, for images of uint8.

        model.preprocess = Normalize()  # 0..255 -> 0..1, as load_mnist(normalize=True) does
        # torchvision's
        model.preprocess = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    It is computed as (pixels - mean / scale) / (std / scale), in the model's dtype: with mean 0 and
    std 1 that is pixels / 255, to the bit.

    Args:
        scale: above 0.
        mean: after scaling: one number, or one for each channel.
        std: above 0: one number, or one for each channel.

    Raises:
        ArgumentError: other values, or such as float32 cannot hold together.
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
                f"mean and std must have one number for each channel; got {self.mean} and "
                f"{self.std}",
                "Normalize",
            )
        mean, std = self.in_pixels(1)
        if not all(1 / _WIDEST < value < _WIDEST for value in std) or any(
            abs(value) > _WIDEST for value in mean
        ):
            raise ArgumentError(
                f"scale, mean and std must be numbers that float32 can hold together: {self}"
            )

    def in_pixels(self, channels: int) -> tuple[list[float], list[float]]:
        """Mean and std of every channel, in units of the pixels."""
        mean, std = (
            value if isinstance(value, tuple) else (value,) * channels
            for value in (self.mean, self.std)
        )
        return [m / self.scale for m in mean], [s / self.scale for s in std]

    def check(self, sample: Shape) -> None:
        """Raise ShapeError where images of shape ``sample`` have another number of channels."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if isinstance(values, tuple) and len(values) != sample[0]:
                raise ShapeError(
                    f"preprocess: {name} has {len(values)} numbers, one for each channel; images "
                    "(N, "
                    f"{', '.join(map(str, sample))}) have {sample[0]} channels"
                )

    def description(self) -> dict[str, Any]:
        """As JSON; ``rebuild_preprocess`` reads it."""
        return {"class": "Normalize", "arguments": asdict(self)}


def rebuild_preprocess(described: Any) -> Normalize | None:
    """What ``Normalize.description`` described; None for None. Raises whatever nonsense brings a
    constructor to."""
    if described is None:
        return None
    if described["class"] != "Normalize":
        raise ModelFormatError(f"unknown preprocess {described['class']!r}; upgrade portacnn")
    return Normalize(**described["arguments"])


def _numbers(name: str, value: Any, bounds: dict[str, float]) -> float | tuple[float, ...]:
    """One number, or a tuple of several: of any sequence, and of any library's."""
    value = listed(value)
    try:
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            return tuple(real(f"{name}[{i}]", number, **bounds) for i, number in enumerate(value))
        return real(name, value, **bounds)
    except ArgumentError as error:
        raise error.at("Normalize")
