"""Expected results of every op, computed once in float64 by PyTorch or by plain loops, and frozen.

``figures.safetensors`` holds the results of some drawn arguments of each row of ``EXAMPLES``. A
check draws the same arguments again (``arguments_of``), and a fingerprint shows whether they are
the same. So the check needs neither PyTorch nor time for loops, and shares no code with
``portacnn.ops``. ``scripts/freeze_figures.py`` writes the file.

The arguments are rounded to float32 first: the figures hold for float32 and for float64.
"""

import json
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from portacnn.testing.examples import EXAMPLES, Arguments, as_given
from portacnn.testing.random import Random

FILE = Path(__file__).with_name("figures.safetensors")


@dataclass(frozen=True)
class Figure:
    """The expected results of one call.

    Attributes:
        example: the row of ``EXAMPLES``, or "training": the losses of 20 steps.
        seed: of the arguments.
        source: what computed the results: "PyTorch", or "loops".
        fingerprint: of the arguments.
        results: in the order of ``Example.results``: floats in float64.
    """

    example: str
    seed: int
    source: str
    fingerprint: str
    results: list[Any]

    def arguments(self) -> Arguments:
        """Return the arguments, as NumPy arrays.

        Raises:
            AssertionError: if they are not those that the results were computed for.
        """
        found = arguments_of(self.example, self.seed)
        if fingerprint(found) != self.fingerprint:
            raise AssertionError(
                f"the arguments of {self.example} (seed {self.seed}) are not those that the "
                "figures were computed for: another NumPy, or a changed example; run "
                "scripts/freeze_figures.py"
            )
        return found


def arguments_of(example: str, seed: int) -> Arguments:
    """Return drawn arguments whose floats are float64, rounded to float32."""
    return as_given(
        EXAMPLES[example].draw(Random(seed, "small")),
        lambda array: array.astype(np.float32).astype(np.float64),
    )


def gradient_of(shape: tuple[int, ...]) -> Any:
    """Return the gradient of a result, for its backward pass: multiples of 1/8, or 0.75 for a
    0-dimensional result."""
    if not shape:
        return 0.75
    return np.random.default_rng(3).integers(-8, 9, shape) / 8


def fingerprint(arguments: Arguments) -> str:
    """Return a hash of the names and values of arguments."""
    digest = blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype.str}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for name, value in arguments.items():
        add(name)
        add(value)
    return digest.hexdigest()


@cache
def _stored() -> dict[str, list[Figure]]:
    from safetensors import safe_open

    found: dict[str, list[Figure]] = {}
    with safe_open(FILE, framework="np") as file:
        for row in json.loads(file.metadata()["figures"]):
            name, seed, source, mark, count = row
            results = [file.get_tensor(f"{name}/{seed}/{i}") for i in range(count)]
            found.setdefault(name, []).append(Figure(name, seed, source, mark, results))
    return found


def figures_of(example: str) -> list[Figure]:
    """Return the figures of one row of ``EXAMPLES``: an empty list if it has none yet."""
    return _stored().get(example, [])


def write(figures: list[Figure]) -> None:
    """Write the file."""
    from safetensors.numpy import save_file

    rows = [[f.example, f.seed, f.source, f.fingerprint, len(f.results)] for f in figures]
    tensors = {
        f"{f.example}/{f.seed}/{i}": np.asarray(result, order="C")
        for f in figures
        for i, result in enumerate(f.results)
    }
    save_file(tensors, FILE, metadata={"figures": json.dumps(rows)})
