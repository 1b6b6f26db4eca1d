"""Compute the expected results of every op and write portacnn/testing/figures.safetensors.

The results come from PyTorch in float64 (``figures_torch.py``), or from plain loops for the ops
that PyTorch lacks (``figures_loops.py``). Run it after a change of ``portacnn/testing/examples.py``
or ``draws.py``. A new op needs a definition in one of the two files.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import figures_loops
import figures_torch
import numpy as np
import torch
from torch import nn

from portacnn.runtime import resolve
from portacnn.seeds import permutation
from portacnn.testing.examples import EXAMPLES, Arguments, Example, arrays_of, call, mapped
from portacnn.testing.figures import (
    FILE,
    Figure,
    arguments_of,
    fingerprint,
    gradient_of,
    write,
)
from portacnn.testing.training_checks import MOMENTUM, RECIPE, images, network

CASES = 3
"""Figures of each row of EXAMPLES."""
LARGEST = 300
"""The largest number of elements of all results of a figure: the file goes into the wheel."""
SEEDS = range(400)


def by_torch(example: Example, arguments: Arguments) -> list[Any]:
    """Return the results in the order of ``Example.results``."""
    leaves: list[list[torch.Tensor]] = []

    def leaf(array: np.ndarray) -> torch.Tensor:
        made = torch.tensor(array)
        return made.requires_grad_() if array.dtype.kind == "f" else made

    given = {
        name: mapped(value, leaf if name in example.differentiable else torch.tensor)
        for name, value in arguments.items()
    }
    leaves = [
        [one for one in (given[name] if isinstance(given[name], list) else [given[name]])]
        for name in example.differentiable
        if given.get(name) is not None
    ]
    y = call(figures_torch.DEFINITIONS[example.op], given)
    results = [y.detach().numpy()]
    if example.differentiable:
        y.backward(torch.as_tensor(gradient_of(tuple(y.shape))))
        # an op of a list has one gradient for all
        results += [
            (np.zeros(own[0].shape) if own[0].grad is None else own[0].grad.numpy())
            for own in leaves
        ]
    return results + [array.numpy() for array in arrays_of([given.get(n) for n in example.writes])]


def results_of(example: Example, arguments: Arguments) -> tuple[str, list[Any]]:
    """Return the source, and the results."""
    if example.op in figures_torch.DEFINITIONS:
        return "PyTorch", by_torch(example, arguments)
    definition = figures_loops.DEFINITIONS[example.op]
    return "loops", definition(gradient_of, **mapped(arguments, np.copy))


def figures(name: str) -> Iterator[Figure]:
    """Yield the first figures of one row that are small enough."""
    found = 0
    for seed in SEEDS:
        arguments = arguments_of(name, seed)
        if sum(a.size for a in arrays_of(list(arguments.values()))) > 10 * LARGEST:
            continue
        source, results = results_of(EXAMPLES[name], arguments)
        if sum(result.size for result in results) <= LARGEST:
            yield Figure(name, seed, source, fingerprint(arguments), results)
            found += 1
            if found == CASES:
                return
    if not found:
        raise SystemExit(f"{name}: no seed gives results of at most {LARGEST} elements")


class Block(nn.Module):
    """x + conv(x), then ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.conv(x)).relu()


def training() -> Figure:
    """Return the losses of the training that ``training_checks`` repeats, made by PyTorch from the
    same weights and batches."""
    x, t = images(dtype="float64")
    model = network(resolve("numpy"), "float64")
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(),
        nn.Flatten(),
        nn.Linear(64, 4),
    ).double()
    weights = dict(zip(net.state_dict(), model.state_dict().values(), strict=True))
    net.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    optimizer = torch.optim.SGD(net.parameters(), **MOMENTUM)
    losses, size = [], RECIPE["batch_size"]
    for epoch in range(RECIPE["epochs"]):
        order = permutation(RECIPE["seed"], epoch, len(x))
        for first in range(0, len(x), size):
            batch = order[first : first + size]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(torch.tensor(x[batch])), torch.tensor(t[batch]))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    mark = fingerprint({"x": x.astype("float32"), "t": t})
    return Figure("training", 0, "PyTorch", mark, [np.array(losses)])


def main() -> None:
    made = [figure for name in EXAMPLES for figure in figures(name)]
    made.append(training())
    write(made)
    print(f"{len(made)} figures of {len(EXAMPLES)} rows: {FILE} ({FILE.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
