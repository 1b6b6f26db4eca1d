"""Normalizations to test with, and their definition in loops."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest

from portacnn import ops
from support.checks import (
    normal,
)
from support.matrix import Here

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


def by_definition(x, sets, weight, bias, place, dy, eps, given=None):
    """Every step by itself: (y, dx, dweight, dbias, statistics).

    sets: lists of indices into x whose numbers share a mean; place: index -> the weight's index;
    given: (mean, var) for each set, where they do not come from x.
    """
    y, dx = np.zeros(x.shape), np.zeros(x.shape)
    dweight, dbias = np.zeros(weight.shape), np.zeros(bias.shape)
    statistics = []
    for number, members in enumerate(sets):
        values = [float(x[i]) for i in members]
        if given is None:
            mean = math.fsum(values) / len(values)
            var = math.fsum((v - mean) ** 2 for v in values) / len(values)
        else:
            mean, var = given[number]
        statistics.append((mean, var))
        spread = math.sqrt(var + eps)
        hats = [(v - mean) / spread for v in values]
        for i, hat in zip(members, hats, strict=True):
            y[i] = weight[place(i)] * hat + bias[place(i)]
            dweight[place(i)] += dy[i] * hat
            dbias[place(i)] += dy[i]
        # d hat_a / d x_b, a matrix
        ups = np.array([dy[i] * weight[place(i)] for i in members])
        jacobian = np.eye(len(members))
        if given is None:
            jacobian -= 1 / len(members) + np.outer(hats, hats) / len(members)
        for i, value in zip(members, ups @ jacobian / spread, strict=True):
            dx[i] = value
    return y, dx, dweight, dbias, statistics


def indices(shape):
    return list(product(*(range(n) for n in shape)))


@dataclass(frozen=True)
class Case:
    """One normalization: ``op``, the shape of x, and its own number or shape."""

    op: str
    shape: tuple[int, ...]
    own: Any = None
    eps: float = 1e-5
    affine: bool = True
    arguments: dict = field(default_factory=dict)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.own) if self.op == "layer_norm" else (self.shape[1],)

    def sets(self) -> list:
        """The indices that share statistics."""
        by: dict[Any, list] = {}
        for i in indices(self.shape):
            lead = len(self.shape) - len(self.weight_shape)
            key = {
                "batch_norm": lambda i=i: i[1],
                "instance_norm": lambda i=i: i[:2],
                "group_norm": lambda i=i: (i[0], i[1] // (self.shape[1] // self.own)),
                "layer_norm": lambda i=i, lead=lead: i[:lead],
            }[self.op]()
            by.setdefault(key, []).append(i)
        return list(by.values())

    def place(self) -> Callable:
        if self.op == "layer_norm":
            lead = len(self.shape) - len(self.weight_shape)
            return lambda i: i[lead:]
        return lambda i: (i[1],)

    def hosts(self, seed: int = 0) -> tuple:
        x = 3 + 2 * normal(*self.shape, seed=seed)
        if not self.affine:
            return x, None, None
        return (
            x,
            normal(*self.weight_shape, seed=seed + 1),
            normal(*self.weight_shape, seed=seed + 2),
        )

    def call(self, module: Any, x: Any, weight: Any, bias: Any, **more: Any) -> Any:
        function = getattr(module, self.op)
        options = {"eps": self.eps, **more}
        if self.op == "batch_norm":
            return function(x, None, None, weight, bias, training=True, **options)
        if self.op == "instance_norm":
            return function(x, None, None, weight, bias, **options)
        return function(x, self.own, weight, bias, **options)

    def backward(self, dy: Any, cache: Any, **options: Any) -> tuple:
        return getattr(ops, self.op + "_backward")(dy, cache, **options)


CASES = {
    "batch, images": Case("batch_norm", (3, 4, 2, 3)),
    "batch, vectors": Case("batch_norm", (5, 3)),
    "batch, one sample": Case("batch_norm", (1, 3, 2, 2)),
    "batch, volumes": Case("batch_norm", (2, 2, 2, 3, 2), eps=0.1),
    "batch, plain": Case("batch_norm", (3, 2, 4), affine=False),
    # strides say little of the memory format
    "batch, axes of one": Case("batch_norm", (1, 2, 1, 2)),
    "instance": Case("instance_norm", (3, 2, 4, 3)),
    "instance, plain": Case("instance_norm", (2, 3, 5), affine=False),
    "group": Case("group_norm", (3, 6, 2, 3), 3),
    "group, one for all": Case("group_norm", (2, 4, 3), 1, eps=0.01),
    "group, one each": Case("group_norm", (2, 3, 4), 3),
    "group, vectors": Case("group_norm", (2, 6), 2),
    "group, plain": Case("group_norm", (2, 4, 2, 2), 2, affine=False),
    "layer, vectors": Case("layer_norm", (4, 5), (5,)),
    "layer, images": Case("layer_norm", (3, 2, 3, 4), (2, 3, 4)),
    "layer, rows": Case("layer_norm", (2, 3, 2, 4), (4,)),
    "layer, two axes": Case("layer_norm", (2, 3, 2, 4), (2, 4)),
    "layer, all of it": Case("layer_norm", (3, 4), (3, 4)),
    "layer, plain": Case("layer_norm", (2, 3, 4), (4,), affine=False),
}


cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# --- running statistics ---------------------------------------------------------------------------


def writeable(here: Here, host: Any, dtype: str = "float64") -> Any:
    return here.backend.asarray(np.asarray(host), dtype)
