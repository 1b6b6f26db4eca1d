"""Planted faults of an adapter and its kernels, each found by the check that is named for it."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portacnn.ops.dispatch import OPS
from portacnn.ops.windows import Windows
from portacnn.runtime import Backend, Kernel, backend_of
from portacnn.testing import arrays, check_backend

Plant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, tuple[str, str, Plant]] = {}
"""By name: the check that finds it, words of its message, and what plants it."""


def mutant(check: str, words: str) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        MUTANTS[plant.__name__.replace("_", " ")] = check, words, plant
        return plant

    return add


def override(patch: pytest.MonkeyPatch, name: str, forward: Any = None, backward: Any = None):
    """A kernel made of the portable pair: ``forward`` and ``backward`` change what it returns."""
    import toyarray_portacnn

    op = OPS[name]

    def run(*args: Any, **options: Any) -> Any:
        return forward(op.forward, *args, **options)

    def back(*args: Any, **options: Any) -> Any:
        return backward(op.portable_backward, *args, **options)

    kernel = Kernel(run if forward else op.forward, back if backward else op.portable_backward)
    patch.setitem(toyarray_portacnn.KERNELS, name, kernel)


def backend_class() -> Any:
    import toyarray_portacnn

    return toyarray_portacnn.ToyBackend


def library() -> Any:
    import toyarray

    return toyarray


# --- kernels --------------------------------------------------------------------------------------


@mutant("ops: conv2d", "result, float32")
def wrong_padding(patch):
    def forward(portable, x, weight, bias, windows, groups, **options):
        w = windows
        swapped = [(after, before) for before, after in w.pads]
        w = Windows.of(w.size, w.kernel, w.stride, swapped, w.dilation)
        return portable(x, weight, bias, w, groups, **options)

    override(patch, "conv", forward)


@mutant("ops: conv2d", "gradient of weight")
def transposed_gradient(patch):
    def backward(portable, dy, saved, **options):
        dx, dweight, dbias = portable(dy, saved, **options)
        return dx, library().flip(dweight, axis=tuple(range(2, dweight.ndim))), dbias

    override(patch, "conv", backward=backward)


@mutant("ops: linear", "gradient of bias")
def mean_instead_of_sum(patch):
    def backward(portable, dy, saved, **options):
        dx, dweight, dbias = portable(dy, saved, **options)
        return dx, dweight, None if dbias is None else dbias / dy.shape[0]

    override(patch, "linear", backward=backward)


@mutant("ops: max_pool2d", "gradient of x")
def gradient_to_the_last_of_equal_values(patch):
    xp = library()

    def forward(portable, x, windows, **options):
        flipped = Windows.of(
            windows.size,
            windows.kernel,
            windows.stride,
            [
                ((out - 1) * s + d * (k - 1) + 1 - n - before, before)
                for n, k, s, d, out, (before, _) in zip(
                    *(windows.size, windows.kernel, windows.stride, windows.dilation),
                    *(windows.out, windows.pads),
                    strict=True,
                )
            ],
            windows.dilation,
        )
        axes = tuple(range(2, x.ndim))
        y, saved = portable(xp.flip(x, axis=axes), flipped, **options)
        return xp.flip(y, axis=axes), saved

    def backward(portable, dy, saved, **options):
        axes = tuple(range(2, dy.ndim))
        return xp.flip(portable(xp.flip(dy, axis=axes), saved, **options), axis=axes)

    override(patch, "max_pool", forward, backward)


@mutant("ops: relu", "a transfer to the host: __bool__ of Array")
def a_transfer_in_a_kernel(patch):
    def forward(portable, x, **options):
        if library().any(x > 1e30):
            return NotImplemented
        return portable(x, **options)

    override(patch, "relu", forward)


@mutant("ops: sigmoid", "expected float32, got float64")
def float64_leak(patch):
    def forward(portable, x, **options):
        y, saved = portable(x, **options)
        return library().astype(y, library().float64), saved

    override(patch, "sigmoid", forward)


@mutant("ops: tanh", "of the largest value off")
def low_precision(patch):
    def forward(portable, x, **options):
        y, saved = portable(x, **options)
        return library().astype(library().astype(y, library().float16), x.dtype), saved

    override(patch, "tanh", forward)


@mutant("ops: elu", "it has changed its input x")
def writes_into_its_input(patch):
    def forward(portable, x, *args, **options):
        result = portable(x, *args, **options)
        x += 1.0
        return result

    override(patch, "elu", forward)


@mutant("ops: silu", "batch_last, kernels auto")
def assumes_contiguous_memory(patch):
    def forward(portable, x, **options):
        as_stored = np.sort(np.abs(x.memory.strides))[::-1]
        if list(x.memory.strides) != list(as_stored):
            x = library().asarray(x.memory.ravel(order="K").reshape(x.shape))
        return portable(x, **options)

    override(patch, "silu", forward)


@mutant("ops: batch_norm", "running_var after it")
def biased_running_variance(patch):
    def forward(portable, x, running_mean=None, running_var=None, *args, **options):
        before = None if running_var is None else running_var + 0.0
        result = portable(x, running_mean, running_var, *args, **options)
        if before is not None and options.get("training"):
            count = x.size // x.shape[1]
            running_var[...] = before * 0.7 + (running_var - before * 0.7) * ((count - 1) / count)
        return result

    override(patch, "batch_norm", forward)


@mutant("ops: sgd_update", "params after it")
def update_of_a_step_that_is_not_finite(patch):
    def forward(portable, params, grads, *, lr, weight_decay=0.0, ok=None):
        return portable(params, grads, lr=lr, weight_decay=weight_decay)

    override(patch, "sgd_update", forward)


@mutant("ops: relu", "with keep=False it keeps a cache")
def cache_of_inference(patch):
    override(patch, "relu", lambda portable, x, *, keep: portable(x, keep=True))


@mutant("randomness: same masks", "another mask for float32, batch_last")
def mask_that_depends_on_strides(patch):
    def forward(portable, x, *args, **options):
        y, saved = portable(x, *args, **options)
        order = np.argsort(-np.abs(x.memory.strides), kind="stable")
        if saved is None and list(order) != sorted(order):
            y = library().flip(y, axis=0)
        return y, saved

    override(patch, "drop", forward)


@mutant("randomness: same masks", "another mask")
def mask_from_32_bits_of_the_step(patch):
    def forward(portable, x, p, length, key, step, first, *, keep):
        return portable(x, p, length, key, step % 2**31, first % 2**31, keep=keep)

    override(patch, "drop", forward)


@mutant("randomness: split masks", "the part from sample 1")
def mask_that_ignores_the_position(patch):
    def forward(portable, x, p, length, key, step, first, *, keep):
        return portable(x, p, length, key, step, 0, keep=keep)

    override(patch, "drop", forward)


@mutant("adapter: kernels fit", "relu, forward: expected (x, *, keep=True), got (x, keep=True)")
def kernel_of_another_signature(patch):
    import toyarray_portacnn

    kernel = Kernel(lambda x, keep=True: None, OPS["relu"].portable_backward)
    patch.setitem(toyarray_portacnn.KERNELS, "relu", kernel)


@mutant("adapter: in threads", "a convolution in a thread")
def scratch_memory_that_threads_share(patch):
    scratch: list[Any] = [None]

    def forward(portable, x, weight, *args, **options):
        scratch[0] = x + 0.0 * len(scratch)
        mine = scratch[0]
        time.sleep(0.001)
        if mine is not scratch[0]:
            return portable(scratch[0] * 2.0, weight, *args, **options)
        return portable(scratch[0], weight, *args, **options)

    override(patch, "conv", forward)


# --- the adapter ----------------------------------------------------------------------------------


@mutant("adapter: asarray copies", "whose source changed later")
def asarray_shares_memory(patch):
    def asarray(self, host, dtype=None):
        return library().Array(np.asarray(host, dtype=dtype))

    patch.setattr(backend_class(), "asarray", asarray)


@mutant("adapter: to host copies", "whose copy was written to")
def to_host_shares_memory(patch):
    patch.setattr(backend_class(), "to_host", lambda self, array: array.memory)


@mutant("adapter: views", "whose slice was written to")
def views_that_are_copies(patch):
    kind = library().Array
    read = kind.__getitem__
    patch.setattr(kind, "__getitem__", lambda self, key: kind(read(self, key).memory.copy()))


@mutant("adapter: keeps dtypes", "mean: expected float32, got float64")
def mean_in_float64(patch):
    mean = library().mean
    patch.setattr(
        library(), "mean", lambda x, **options: library().astype(mean(x, **options), np.float64)
    )


@mutant("adapter: stays on device", "zeros: expected it on toy:0, got toy:1")
def zeros_on_another_device(patch):
    library_class = library().Array

    class Elsewhere(library_class):
        device = "toy:1"

    patch.setattr(library(), "zeros", lambda shape, **options: Elsewhere(np.zeros(shape, "f4")))


@mutant("training: 20 steps, float32", "a transfer to the host: Backend.to_host")
def a_transfer_in_a_step(patch):
    def forward(portable, arrays):
        backend = backend_of(arrays[0])
        backend.to_host(arrays[0])
        return portable(arrays)

    override(patch, "all_finite", forward)


@mutant("training: compiled step", "losses: ")
def compiled_step_of_the_first_batch(patch):
    def compile_step(self, step, example):
        *first, _ = example
        return lambda *arguments: step(*first, arguments[-1])

    patch.setattr(backend_class(), "compile_step", compile_step)


@mutant("files: model saved and loaded", "expected")
def weights_that_lose_bits(patch):
    def share(self, host):
        return self.asarray(host.astype("float16").astype(host.dtype))

    def to_host(self, array):
        host = array.fetch()
        return host.astype("float16").astype(host.dtype) if host.dtype.kind == "f" else host

    patch.setattr(backend_class(), "to_host", to_host)


# --- tests ----------------------------------------------------------------------------------------


def test_there_are_twenty():
    assert len(MUTANTS) >= 20


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found_by_its_name(toy: str, name: str):
    check, words, plant = MUTANTS[name]
    assert check_backend(toy, only=check).ok
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        report = check_backend(toy, only=check)
    assert report[check].status == "wrong", report
    assert words in report[check].message, report
    assert f'check_backend("toyarray:toy:0", only="{check}")' in str(report)


def test_a_library_without_float64_is_refused_what_needs_it(
    toy: str, monkeypatch: pytest.MonkeyPatch
):
    made, words = library().asarray, {}

    def asarray(obj: Any, **options: Any) -> Any:
        array = made(obj, **options)
        if array.dtype == "float64":
            raise TypeError("no float64 here")
        return array

    monkeypatch.setattr(library(), "asarray", asarray)
    monkeypatch.setattr(arrays, "_REFUSED", {})
    for check in ("adapter: has float64", "tasks: mse", "ops: silu", "training: 20 steps, float32"):
        words[check] = check_backend(toy, only=check)[check]
    told = "\n".join(map(str, words.values()))
    assert [f.status for f in words.values()] == ["refused", "refused", "near", "near"], told
    assert "float64 on toyarray on toy:0: TypeError: no float64 here" in str(words["tasks: mse"])


def test_the_default_step_is_no_compiled_one(toy: str):
    assert backend_class().compile_step is Backend.compile_step
    assert check_backend(toy, only="training: compiled").findings[0].status == "skipped"
