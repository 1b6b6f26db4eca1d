"""Steps for the tests of CUDA graphs: a line fitted on the device, and its data."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class State:
    step: Any
    lr: Any
    ok: Any
    note: str = ""


class Fit:
    """A line fitted by steps with momentum: state that stays on the device, elementwise
    throughout."""

    def __init__(self, home):
        self.home, self.called = home, 0
        self.w = home.asarray(np.zeros(3))
        self.v = None

    def __call__(self, x, y, state):
        xp = self.home.xp
        self.called += 1
        if self.v is None:
            self.v = xp.zeros_like(self.w)
        error = xp.sum(x * self.w, axis=1) - y
        ok = state.ok & xp.all(xp.isfinite(error))
        gradient = xp.mean(x * error[:, None], axis=0)
        self.v[...] = xp.where(ok, 0.9 * self.v + gradient / (1.0 + state.step), self.v)
        self.w[...] = self.w - state.lr * self.v
        return xp.mean(error * error), ok

    def weights(self):
        return self.home.to_host(self.w).tobytes()


def data(number, size=8):
    rng = np.random.default_rng(number)
    x = rng.standard_normal((size, 3))
    return x, x @ np.array([1.0, -2.0, 3.0])


def run(home, step, count, size=8, first=0, between=lambda: None):
    """So many steps; their losses."""
    losses = []
    with home.active():
        ok = home.xp.ones((), dtype=home.xp.bool)
        for number in range(first, first + count):
            x, y = (home.asarray(a) for a in data(number, size))
            loss, ok = step(x, y, State(number, 0.1 / (1 + number), ok))
            losses.append(loss)
            between()
        return [home.to_host(loss).tobytes() for loss in losses]
