"""``ModelInfo``: metadata of a model, which its files store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

from portacnn.arguments import AnswersKeywords, as_float, listed, told
from portacnn.data.rows import form
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.layers.base import Shape
from portacnn.models.preprocess import Normalize
from portacnn.runtime import Array, backend_of, is_float

LONGEST = 200
"""The maximum number of characters of a class name, a task or a figure's name."""
_MOST = 100_000  # classes
_MOST_FIGURES = 1000
_SAMPLE = 256  # images used to find the input range
_OWN = ("class_names", "task", "figures", "input_range")


@dataclass(frozen=True)
class ModelInfo(AnswersKeywords):
    """Metadata of a model: class names, task, figures and input format. See ``Model.info``.

        >>> ModelInfo(class_names=["cat", "dog"]).class_names
        ('cat', 'dog')

    Args:
        class_names: the name of each output, in order; empty if unknown.
        task: "multiclass", "multilabel", "regression", "embedding" or another word; empty if
            unknown. A ``Trainer`` sets it.
        figures: numbers by name, such as {"test_accuracy": 0.98}. A ``Trainer`` sets the figures of
            the epoch whose weights the model has.
        input_range: the minimum and maximum of the floating-point training images; empty if
            unknown. A ``Trainer`` sets it.
        input_shape: of one sample. This and the following attributes are read from the model.
        layout: of ``input_shape``: "CHW" (channels, height, width), or shorter or longer by the
            number of axes.
        dtype: of weights and floating-point images.
        preprocess: maps uint8 images to the network's input; None takes floating-point images only.
        version: of the portacnn that wrote the model's file; the installed version if there is no
            file.

    Raises:
        ArgumentError: if a text is too long or not printable, a name occurs twice, or a figure is
            not a finite number.
    """

    class_names: Sequence[str] = ()
    task: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    input_range: Sequence[float] = ()
    input_shape: Shape = ()
    layout: str = ""
    dtype: str = ""
    preprocess: Normalize | None = None
    version: str = ""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "class_names", _names(self.class_names))
            object.__setattr__(self, "figures", _figures(self.figures))
            object.__setattr__(self, "input_range", _range(self.input_range))
            _text("task", self.task, least=0)
            _text("version", self.version, least=0)
        except ArgumentError as error:
            raise error.at("ModelInfo")

    def description(self) -> dict[str, Any]:
        """Return the values that are not read from the model, and the version, as JSON values."""
        described = {
            "class_names": list(self.class_names),
            "task": self.task,
            "figures": dict(self.figures),
            "input_range": list(self.input_range),
            "version": self.version,
        }
        return {name: value for name, value in described.items() if value}


def rebuild_info(described: Any) -> ModelInfo:
    """Return the ``ModelInfo`` of a ``ModelInfo.description``; an empty one for None. Raises
    ModelFormatError if the description is invalid."""
    if described is None:
        return ModelInfo()
    if not isinstance(described, dict):
        raise ModelFormatError(f"the model's info must be an object, got {told(described)}")
    try:
        return ModelInfo(
            **{name: described[name] for name in (*_OWN, "version") if name in described}
        )
    except ArgumentError as error:
        raise ModelFormatError(error.message) from error


def layout_of(shape: Shape) -> str:
    """Return the axes of one sample as letters."""
    return {1: "C", 2: "CL", 3: "CHW", 4: "CDHW"}.get(len(shape), "")


def last_figures(history: Mapping[str, Sequence[Any]], epoch: int) -> dict[str, float]:
    """Return the finite figures of the training and test sets after an epoch, counted from 1."""
    found = {
        name: values[epoch - 1]
        for name, values in history.items()
        if name.startswith(("train_", "test_")) and 0 < epoch <= len(values)
    }
    numbers = {name: float(v) for name, v in found.items() if isinstance(v, int | float)}
    return {"epochs": float(epoch)} | {n: v for n, v in numbers.items() if isfinite(v)}


def range_of(images: Array) -> tuple[float, ...]:
    """Return the minimum and maximum of the first images; () if they are not floating point. Call
    it within ``Backend.active`` of the images' device."""
    home = backend_of(form(images))
    if not is_float(home.xp, images.dtype) or 0 in images.shape:
        return ()
    some = images[: min(_SAMPLE, images.shape[0]), ...]
    ends = home.xp.stack([home.xp.min(some), home.xp.max(some)])
    return tuple(home.to_host(ends).tolist())


def _range(given: Any) -> tuple[float, ...]:
    given = listed(given)
    numbers = [as_float(end) for end in given] if isinstance(given, list | tuple) else [nan]
    if len(numbers) not in (0, 2) or not all(map(isfinite, numbers)) or numbers != sorted(numbers):
        raise ArgumentError(
            f"input_range must be (minimum, maximum), such as (0.0, 1.0), got {told(given)}"
        )
    return tuple(numbers)


def _names(given: Any) -> tuple[str, ...]:
    given = listed(given)
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) > _MOST:
        raise ArgumentError(
            f"class_names must be a list of at most {_MOST} names, got {told(given)}"
        )
    for number, name in enumerate(given):
        _text(f"class_names[{number}]", name)
    if len(set(given)) != len(given):
        twice = next(name for number, name in enumerate(given) if name in given[:number])
        raise ArgumentError(f"class_names must be unique, got {twice!r} twice")
    return tuple(given)


def _figures(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping) or len(given) > _MOST_FIGURES:
        raise ArgumentError(
            f"figures must be at most {_MOST_FIGURES} numbers by name, got {told(given)}"
        )
    for name, value in given.items():
        _text("the name of a figure", name)
        if not isfinite(as_float(value)):
            raise ArgumentError(f"figures[{name!r}] must be a finite number, got {told(value)}")
    return {name: as_float(value) for name, value in given.items()}


def _text(what: str, given: Any, least: int = 1) -> None:
    if not isinstance(given, str) or not least <= len(given) <= LONGEST or not given.isprintable():
        raise ArgumentError(
            f"{what} must be printable text of {least} to {LONGEST} characters, got {told(given)}"
        )
