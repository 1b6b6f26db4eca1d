"""Planted faults of a layer, each found by the check that is named for it."""

from typing import Any

import numpy as np
import pytest

from portacnn.layers import Layer
from portacnn.layers.passes import moment
from portacnn.onnx import GraphBuilder, emitter
from portacnn.testing import check_layer

MUTANTS: dict[str, tuple[str, str, type[Layer]]] = {}
"""By name: the check that finds it, words of its message, and the layer."""


class Gate(Layer):
    """x (N, C, *S) -> x * (1 + factor), factor (C, *S); right in everything."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def infer(self, shape):
        self.declare("factor", shape, "zeros")
        return shape

    def forward(self, x, *, train=False, keep=True):
        return x * (1.0 + self.scale * self.params["factor"]), x if keep else None

    def backward(self, dy, cache, *, need_dx=True):
        x = self.kept(cache)
        self.add_grads(factor=self.scale * self.home.xp.sum(dy * x, axis=0))
        return dy * (1.0 + self.scale * self.params["factor"]) if need_dx else None


@emitter(Gate)
def emit_gate(graph: GraphBuilder, layer: Layer, x: str) -> str:
    factor = graph.add("Add", [graph.weight(layer, "factor"), graph.constant(1.0)])
    return graph.add("Mul", [x, factor])


def mutant(check: str, words: str) -> Any:
    def add(kind: type[Layer]) -> type[Layer]:
        MUTANTS[kind.__name__] = check, words, kind
        return kind

    return add


@mutant("shapes", "infer gives (2, 4, 4, 5) for 2 samples, forward (2, 3, 4, 5)")
class WrongPadding(Gate):
    def infer(self, shape):
        super().infer(shape)
        return (shape[0] + 1, *shape[1:])


@mutant("gradient", "gradient of x: its slope along a direction is")
class TransposedGradient(Gate):
    def backward(self, dy, cache, *, need_dx=True):
        dx = super().backward(dy, cache)
        return self.home.xp.flip(dx, axis=2)


@mutant("gradient", "backward gives no gradient of factor")
class NoGradientOfAParameter(Gate):
    def backward(self, dy, cache, *, need_dx=True):
        return dy * (1.0 + self.scale * self.params["factor"])


@mutant("gradient in training", "gradient of x: its slope")
class GradientOfInferenceInTraining(Gate):
    def forward(self, x, *, train=False, keep=True):
        y, cache = super().forward(x, train=train, keep=keep)
        return (y * 2.0 if train else y), cache


@mutant("shared use", "gradient of factor, of a layer used twice")
class GradientsThatDoNotAddUp(Gate):
    def backward(self, dy, cache, *, need_dx=True):
        self.grads["factor"] = self.home.xp.sum(dy * cache, axis=0)
        return dy * (1.0 + self.params["factor"])


@mutant("state unchanged", "forward sets the attribute 'x'")
class StateOnTheLayer(Gate):
    def forward(self, x, *, train=False, keep=True):
        self.x = x
        return super().forward(x, train=train, keep=keep)


@mutant("two threads", "gradient of factor, in a thread")
class CacheThatThreadsShare(Gate):
    last: list[Any] = []  # noqa: RUF012

    def forward(self, x, *, train=False, keep=True):
        self.last[:] = [x]
        return super().forward(x, train=train, keep=keep)

    def backward(self, dy, cache, *, need_dx=True):
        import time

        time.sleep(0.002)
        return super().backward(dy, self.last[0])


@mutant("inputs unchanged", "it has changed its input dy")
class WritesIntoTheGradient(Gate):
    def backward(self, dy, cache, *, need_dx=True):
        dx = super().backward(dy, cache)
        dy *= 2.0
        return dx


@mutant("without a cache", "forward with keep=False returns a cache")
class AlwaysKeeps(Gate):
    def forward(self, x, *, train=False, keep=True):
        return super().forward(x, train=train, keep=True)


@mutant("batch of 0 and 1", "ZeroDivisionError")
class NoEmptyBatch(Gate):
    def forward(self, x, *, train=False, keep=True):
        y, cache = super().forward(x, train=train, keep=keep)
        return y * (1 + 0 // x.shape[0]), cache


@mutant("memory layouts", "output, batch_last")
class AssumesContiguousMemory(Gate):
    def forward(self, x, *, train=False, keep=True):
        if isinstance(x, np.ndarray) and not x.flags.c_contiguous:
            x = x.ravel(order="K").reshape(x.shape)
        return super().forward(x, train=train, keep=keep)


@mutant("memory layouts", "output, batch_last, in training")
class MaskThatDependsOnStrides(Gate):
    def forward(self, x, *, train=False, keep=True):
        y, cache = super().forward(x, train=train, keep=keep)
        if train and x.strides[0] < x.strides[1]:
            y = y * np.where(np.arange(x.shape[-1]) % 2, 2.0, 0.0)
        return y, cache


@mutant("dtypes", "the output of float32 inputs is float64")
class Float64Leak(Gate):
    def forward(self, x, *, train=False, keep=True):
        y, cache = super().forward(x, train=train, keep=keep)
        return y * self.home.xp.ones((), dtype=self.home.xp.float64), cache


@mutant("randomness", "the output of the same training step, once more")
class GlobalRandomness(Gate):
    generator = np.random.default_rng()

    def forward(self, x, *, train=False, keep=True):
        y, cache = super().forward(x, train=train, keep=keep)
        return (y * self.generator.random() if train and moment() is not None else y), cache


@mutant("prepared", "prepare(x)(x) after an update")
class PreparedFromOldWeights(Gate):
    def prepare(self, x):
        factor = 1.0 + self.params["factor"]
        return lambda x: x * factor


@mutant("copied", "the output of a copy")
class CopiesThatShare(Gate):
    def __deepcopy__(self, memo):
        if self.backend is None:
            return type(self)(self.scale)
        return self


@mutant("saved and loaded", "the output of the loaded model")
class StateThatNoFileHolds(Gate):
    count = 0

    def __init__(self) -> None:
        type(self).count += 1
        super().__init__(float(self.count))

    def infer(self, shape):
        self.declare("factor", shape, "ones")
        return shape


@mutant("device array_api_strict:device1", "a transfer to the host: __float__")
class TransferInAStep(Gate):
    def forward(self, x, *, train=False, keep=True):
        if float(self.home.xp.max(x)) > 1e30:
            raise ValueError
        return super().forward(x, train=train, keep=keep)


@mutant("device array_api_strict:device1", "")
class NumpyInALayer(Gate):
    def forward(self, x, *, train=False, keep=True):
        return np.multiply(x, 1.0 + self.params["factor"]), x if keep else None


@mutant("onnx", "the output of onnxruntime")
class WrongOnnx(Gate):
    def forward(self, x, *, train=False, keep=True):
        y, cache = super().forward(x, train=train, keep=keep)
        return y + 1.0, cache


@emitter(WrongOnnx)
def emit_wrong(graph: GraphBuilder, layer: Layer, x: str) -> str:
    return emit_gate(graph, layer, x)


DEVICES = ["array_api_strict:device1"]


def test_there_are_twenty():
    assert len(MUTANTS) >= 20


def test_the_layer_without_a_fault_passes():
    report = check_layer(Gate(), (3, 4, 5), devices=DEVICES)
    report.raise_if_wrong()
    assert {finding.status for finding in report.findings} <= {"passed", "near", "exact", "skipped"}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found_by_its_name(name: str):
    check, words, kind = MUTANTS[name]
    if check == "onnx":
        pytest.importorskip("onnxruntime")
    report = check_layer(kind, (3, 4, 5), devices=DEVICES, only=check)
    assert report[check].status == "wrong", report
    assert words in report[check].message, report
    assert f'only="{check}")' in str(report)
