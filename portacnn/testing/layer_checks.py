"""``check_layer``: what portacnn asks of a layer.

The checks run on NumPy, in float64 where gradients are compared with central differences; then on
the other devices of this machine.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.layers import Layer, at_step, gradients_of, one_backward_pass
from portacnn.models import Model, load
from portacnn.runtime import Backend, available_backends, dtype_name, resolve
from portacnn.testing.adapter_checks import expect, same
from portacnn.testing.arrays import LAYOUTS, check_kind, error_of, laid_out, unchanged
from portacnn.testing.gradients import check_slope, distinct
from portacnn.testing.report import Check, NotApplicable, Report, perform
from portacnn.testing.threads import in_two_threads
from portacnn.testing.transfers import no_transfers

Shape = tuple[int, ...]
FAR = {"float32": 1e-4, "float64": 1e-10}
"""How far results may be from those in float64, relative to the largest."""


def check_layer(
    layer: Layer | Callable[[], Layer],
    input_shape: Sequence[int],
    *,
    inputs: Callable[[Shape], Any] = distinct,
    devices: Sequence[str] | None = None,
    only: str | None = None,
) -> Report:
    """Check a layer of your own.

        >>> from portacnn.layers import Linear
        >>> from portacnn.testing import check_layer
        >>> check_layer(Linear(4, 2), (4,), devices=[]).ok
        True

    Checks: shapes, gradients by central differences in float64, use in two places and in two
    threads, batches of 0 and 1, memory layouts, dtypes, that nothing it was given changes, the
    other devices without transfers to the host, freezing, copies, model files, and ONNX against
    onnxruntime where both are installed.

    Args:
        layer: not built; or a function that returns a new one.
        input_shape: of one sample, small: (3, 6, 5).
        inputs: a function of a shape (N, *input_shape) that returns float64 inputs; default:
            distinct values between -1 and 1. Gradients need inputs away from kinks.
        devices: names for ``resolve``; default: those of this machine.
        only: the name of a check or a pattern (``check_backend``).
    """
    given = layer
    make = (lambda: deepcopy(given)) if isinstance(given, Layer) else given
    subject = _Subject(make, tuple(input_shape), inputs)
    places = available_devices() if devices is None else devices
    checks: dict[str, Callable[[], float | None]] = {
        "shapes": subject.shapes,
        "gradient": lambda: subject.gradient(train=False),
        "gradient in training": lambda: subject.gradient(train=True),
        "without a cache": subject.without_a_cache,
        "inputs unchanged": subject.inputs_unchanged,
        "state unchanged": subject.state_unchanged,
        "shared use": subject.shared_use,
        "two threads": subject.two_threads,
        "batch of 0 and 1": subject.small_batches,
        "memory layouts": subject.memory_layouts,
        "dtypes": subject.dtypes,
        "randomness": subject.randomness,
        "prepared": subject.prepared,
        "frozen": subject.frozen,
        "copied": subject.copied,
        "saved and loaded": subject.saved,
        **{f"device {place}": lambda place=place: subject.device(place) for place in places},  # type: ignore[misc]
        "onnx": subject.onnx,
    }
    told = repr(make())
    return perform(
        told,
        [
            Check(name, run, f'check_layer({told}, {tuple(input_shape)}, only="{name}")')
            for name, run in checks.items()
        ],
        only,
    )


def available_devices() -> list[str]:
    """Return the devices of this machine that ``resolve`` accepts, without NumPy's: each one that
    has a library, and array-api-strict's imitation of a GPU."""
    found = []
    for info in available_backends():
        if info.reason is None and info.name != "numpy":
            places = [place for place in info.devices if place not in ("cpu", "device2")]
            found += [f"{info.name}:{place}" for place in places or info.devices]
    return found


class _Subject:
    """The layer under check.

    Attributes:
        make: returns a new layer.
        shape: of one sample.
        inputs: see ``check_layer``.
    """

    def __init__(
        self, make: Callable[[], Layer], shape: Shape, inputs: Callable[[Shape], Any]
    ) -> None:
        self.make, self.shape, self.inputs = make, shape, inputs

    def x(self, count: int, dtype: str = "float64") -> Any:
        return np.asarray(self.inputs((count, *self.shape)), dtype)

    def built(self, device: str = "numpy", dtype: str = "float64") -> Layer:
        """Return a new layer with parameters that differ from each other and from 0 and 1."""
        layer = self.make().build(self.shape, device=device, dtype=dtype, seed=0)
        state = layer.state_dict()
        for number, path in enumerate(layer.named_parameters()):
            values = np.random.default_rng(number).standard_normal(state[path].shape)
            state[path] = (0.5 + 0.2 * values).astype(np.float32).astype(dtype)
        layer.load_state_dict(state)
        return layer

    def dy(self, count: int, dtype: str = "float64") -> Any:
        """Return the gradient of the output, a number of eighths."""
        with self.make().planned(self.shape) as layer:
            shape = (count, *layer.output_shape)
        return (np.random.default_rng(1).integers(-8, 9, shape) / 8).astype(dtype)

    def passes(
        self, layer: Layer, x: Any, dy: Any, train: bool, step: int = 3
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run forward and backward; return the results as NumPy arrays by name."""
        home = layer.home
        with at_step(step):
            y, cache = layer.forward(x, train=train)
        with one_backward_pass():
            dx = layer.backward(dy, cache)
        found = {"output": y, "gradient of x": dx}
        found |= {f"gradient of {path}": g for path, g in layer.named_gradients().items()}
        return {name: home.to_host(array) for name, array in found.items()}

    @contextmanager
    def kept_statistics(self, layer: Layer) -> Iterator[None]:
        """Restore the layer's buffers afterwards."""
        home = layer.home
        before = {path: home.to_host(array) for path, array in layer.named_buffers().items()}
        yield
        for path, array in layer.named_buffers().items():
            array[...] = home.asarray(before[path])

    # --- the passes -------------------------------------------------------------------------------

    def shapes(self) -> None:
        """infer returns the shape of what forward computes."""
        layer = self.built()
        for count in (2, 3):
            for train in (False, True):
                y, cache = layer.forward(self.x(count), train=train)
                expected = (count, *layer.output_shape)
                expect(
                    tuple(y.shape) == expected,
                    f"infer gives {expected} for {count} samples, forward {tuple(y.shape)}",
                )
                dx: Any = layer.backward(np.ones_like(y), cache)
                expect(dx is not None, "backward returns None, although need_dx is set")
                expect(
                    tuple(dx.shape) == (count, *self.shape),
                    f"backward returns {tuple(dx.shape)} for inputs {(count, *self.shape)}",
                )

    def gradient(self, train: bool) -> float:
        """backward agrees with central differences, for x and each parameter."""
        layer, x, dy, worst = self.built(), self.x(3), self.dy(3), 0.0
        with self.kept_statistics(layer):
            found = self.passes(layer, x, dy, train)
        missing = set(layer.named_parameters()) - set(layer.named_gradients())
        expect(not missing, f"backward gives no gradient of {', '.join(sorted(missing))}")
        places = {"gradient of x": x}
        places |= {f"gradient of {path}": p for path, p in layer.named_parameters().items()}
        for name, place in places.items():

            def loss(values: Any, place: Any = place) -> float:
                before = place.copy()
                place[...] = values
                with self.kept_statistics(layer), at_step(3):
                    y, _ = layer.forward(x, train=train, keep=False)
                total = float((y * dy).sum())  # y may be a view of x
                place[...] = before
                return total

            worst = max(worst, check_slope(found[name], loss, place.copy(), name))
        return worst

    def without_a_cache(self) -> None:
        """keep=False gives the same output and no cache; need_dx=False the same gradients."""
        layer, x, dy = self.built(), self.x(3), self.dy(3)
        expected = self.passes(layer, x, dy, train=False)
        y, cache = layer.forward(x, keep=False)
        expect(cache is None, "forward with keep=False returns a cache")
        error_of(np.asarray(y), expected["output"], 1e-12, "the output with keep=False")
        _, cache = layer.forward(x)
        layer.backward(dy, cache, need_dx=False)
        for path, gradient in layer.named_gradients().items():
            name = f"gradient of {path}"
            error_of(np.asarray(gradient), expected[name], 1e-12, f"{name} with need_dx=False")

    def inputs_unchanged(self) -> None:
        """forward and backward change neither x nor dy."""
        for train in (False, True):
            layer, x, dy = self.built(), self.x(3), self.dy(3)
            with unchanged(layer.home, {"x": x, "dy": dy}):
                self.passes(layer, x, dy, train)

    def state_unchanged(self) -> None:
        """A forward pass changes no attribute, no parameter, and outside training no buffer."""
        layer = self.built()
        for part in layer.walk():
            before = dict(vars(part))
            state = layer.state_dict()
            layer.forward(self.x(3), train=False)
            for name, value in vars(part).items():
                expect(
                    name in before and before[name] is value,
                    f"forward sets the attribute {name!r} of {part.where}; put it into the cache",
                )
            for path, array in layer.state_dict().items():
                same(array, state[path], path)
        layer.forward(self.x(3), train=True)
        parameters = layer.named_parameters()
        for path, array in layer.state_dict().items():
            if path in parameters:
                same(array, state[path], f"{path} after a forward pass in training")

    def shared_use(self) -> None:
        """Two forward passes, then their backward passes in reverse: each has its own results, and
        gradients of parameters add up."""
        layer = self.built()
        several = [(self.x(3), self.dy(3)), (self.x(3)[::-1] * 0.9, self.dy(3) * 0.5)]
        alone = [self.passes(layer, x, dy, train=False) for x, dy in several]
        (_, one), (_, two) = (layer.forward(x) for x, _ in several)
        with one_backward_pass():
            second = layer.backward(several[1][1], two)
            first = layer.backward(several[0][1], one)
        for got, expected in zip((first, second), alone, strict=True):
            error_of(
                np.asarray(got),
                expected["gradient of x"],
                1e-10,
                "gradient of x, of a layer used twice",
            )
        for path, gradient in layer.named_gradients().items():
            name = f"gradient of {path}"
            total = alone[0][name] + alone[1][name]
            error_of(np.asarray(gradient), total, 1e-10, f"{name}, of a layer used twice")

    def two_threads(self) -> None:
        """Two threads may run one layer at once."""
        layer = self.built()
        several = [(self.x(3), self.dy(3)), (self.x(3)[::-1] * 0.9, self.dy(3) * 0.5)]
        alone = [self.passes(layer, x, dy, train=False) for x, dy in several]

        def work(number: int) -> dict[str, Any]:
            x, dy = several[number]
            with gradients_of(layer) as gradients:
                y, cache = layer.forward(x)
                dx = layer.backward(dy, cache)
            got = {"output": y, "gradient of x": dx}
            got |= {f"gradient of {path}": g for path, g in gradients.items()}
            return {name: np.array(array) for name, array in got.items()}

        for number, got in in_two_threads(work):
            for name, array in got.items():
                error_of(array, alone[number][name], 1e-10, f"{name}, in a thread")

    def small_batches(self) -> None:
        """A batch of 0 has results of the right shapes; one of 1 has the first row's."""
        layer = self.built()
        if layer.least_predicted <= 1:
            y = layer(self.x(3)[:1])
            expect(tuple(y.shape) == (1, *layer.output_shape), f"one sample gives {y.shape}")
        y, cache = layer.forward(self.x(3)[:0])
        expect(tuple(y.shape) == (0, *layer.output_shape), f"no sample gives {tuple(y.shape)}")
        dx: Any = layer.backward(np.zeros(y.shape), cache)
        expect(tuple(dx.shape) == (0, *self.shape), f"no sample gives dx {tuple(dx.shape)}")
        for path, gradient in layer.named_gradients().items():
            expect(not np.asarray(gradient).any(), f"no sample: the gradient of {path} is not 0")

    def memory_layouts(self) -> float:
        """Strides of x and dy change nothing; the masks of random layers neither."""
        worst = 0.0
        for train in (False, True):
            expected = self.passes(self.built(), self.x(4), self.dy(4), train)
            for layout in LAYOUTS[1:]:
                layer = self.built()
                x, dy = (laid_out(layer.home, a, layout) for a in (self.x(4), self.dy(4)))
                for name, got in self.passes(layer, x, dy, train).items():
                    told = f"{name}, {layout}{', in training' * train}"
                    worst = max(worst, error_of(got, expected[name], 1e-10, told))
        return worst

    def dtypes(self) -> float:
        """float32 stays float32, float64 float64, and the two agree."""
        worst, expected = 0.0, self.passes(self.built(), self.x(3), self.dy(3), train=False)
        for dtype in FAR:
            layer = self.built(dtype=dtype)
            x, dy = self.x(3, dtype), self.dy(3, dtype)
            y, cache = layer.forward(x)
            dx = layer.backward(dy, cache)
            arrays = {"the output": y, "the gradient of x": dx, **layer.named_gradients()}
            for name, array in arrays.items():
                expect(
                    dtype_name(array) == dtype, f"{name} of {dtype} inputs is {dtype_name(array)}"
                )
            if dtype == "float32":
                for name, got in self.passes(layer, x, dy, train=False).items():
                    worst = max(worst, error_of(got, expected[name], FAR[dtype], name))
        return worst

    def randomness(self) -> None:
        """The same training step gives the same output, to the bit."""

        def output(step: int) -> Any:
            layer = self.built()
            with at_step(step):
                return layer.home.to_host(layer.forward(self.x(4), train=True)[0])

        same(output(3), output(3), "the output of the same training step, once more")

    def prepared(self) -> float:
        """prepare returns a function that computes what forward does."""
        layer, x = self.built(), self.x(3)
        function = layer.prepare(x)
        error = error_of(np.array(function(x)), np.asarray(layer(x)), 1e-10, "prepare(x)(x)")
        for array in layer.named_parameters().values():
            array *= 0.5
        got, expected = np.array(function(x)), np.asarray(layer(x))
        return max(error, error_of(got, expected, 1e-10, "prepare(x)(x) after an update"))

    # --- what happens to a layer ------------------------------------------------------------------

    def frozen(self) -> None:
        """Frozen parameters get no gradient; the input's is the same."""
        layer, x, dy = self.built(), self.x(3), self.dy(3)
        if not layer.named_parameters():
            raise NotApplicable("it has no parameters")
        expected = self.passes(layer, x, dy, train=False)
        frozen = self.built().freeze(lambda path, array: True)
        got = self.passes(frozen, x, dy, train=False)
        for name in ("output", "gradient of x"):
            error_of(got[name], expected[name], 1e-10, f"{name} of a frozen layer")

    def copied(self) -> None:
        """A deep copy computes the same with its own arrays."""
        layer, x = self.built(), self.x(3)
        copy = deepcopy(layer)
        expected = np.array(layer(x))
        for array in layer.named_parameters().values():
            array += 1.0
        error_of(np.array(copy(x)), expected, 1e-10, "the output of a copy")

    def saved(self) -> None:
        """A model with this layer is read from its file, with the same weights and output."""
        x = self.x(3, "float32")
        model = Model(layer=self.make()).build(self.shape, device="numpy", seed=0)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            model.save(file)
            again = load(file, device="numpy")
        state = again.state_dict()
        for path, array in model.state_dict().items():
            expect(path in state, f"the file lacks {path}")
            same(state[path], array, path)
        error_of(np.array(again(x)), np.array(model(x)), 1e-6, "the output of the loaded model")

    def device(self, place: str) -> float:
        """Results on another device agree, and nothing is transferred to the host."""
        home: Backend = resolve(place)
        worst, x, dy = 0.0, self.x(3, "float32"), self.dy(3, "float32")
        expected = self.passes(self.built(), x.astype("f8"), dy.astype("f8"), train=True)
        state = self.built(dtype="float32").state_dict()
        layer = self.make().build(self.shape, device=home, seed=0)
        layer.load_state_dict(state)
        given = home.asarray(x), home.asarray(dy)
        with home.active(), no_transfers(home):
            with at_step(3):
                y, cache = layer.forward(given[0], train=True)
            dx = layer.backward(given[1], cache)
        found = {"output": y, "gradient of x": dx}
        found |= {f"gradient of {path}": g for path, g in layer.named_gradients().items()}
        for name, array in found.items():
            check_kind(home, array, given[0], "float32", name)
            error = error_of(home.to_host(array), expected[name], FAR["float32"], name)
            worst = max(worst, error)
        return worst

    def onnx(self) -> float:
        """The exported layer gives the same in onnxruntime."""
        for name in ("onnx", "onnxruntime"):
            spec = find_spec(name)
            if spec is None or spec.origin is None:  # a folder of that name is no package
                raise NotApplicable(f"{name} is not installed")
        import onnxruntime

        from portacnn.onnx import export

        layer, x = self.built(dtype="float32"), self.x(3, "float32")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "layer.onnx"
            try:
                export(layer, file, input_shape=self.shape)
            except (ArgumentError, ModelFormatError) as error:
                raise NotImplementedError(str(error)) from error
            session = onnxruntime.InferenceSession(str(file))
        (got,) = session.run(None, {session.get_inputs()[0].name: x})
        return error_of(got, np.array(layer(x)), FAR["float32"], "the output of onnxruntime")
