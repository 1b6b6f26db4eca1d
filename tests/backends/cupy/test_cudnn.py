"""Convolution by way of cuDNN: what is asked of it, the values (torch, in float64, is the measure),
and when it is not asked."""

import logging
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import conv as cupy_conv
from portacnn.backends.cupy import cudnn as cupy_cudnn
from portacnn.backends.cupy import geometry
from portacnn.errors import ArgumentError, BackendError
from portacnn.ops import dispatch
from portacnn.ops.windows import Windows
from support.cuda_rig import Rig, close, needs_compiler, rigged
from support.cudnn_stub import Stub
from support.drawing import Drawn

torch = pytest.importorskip("torch", reason="torch is the measure here")

SQUARE = Windows.of((6, 5), 3, 1, 1)


class DeviceArray(np.ndarray):
    """With ``.data.ptr``, as CuPy's have it."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


class Bench:
    """The stand-ins of one test: ``cudnn``, and what of ``cupy`` is asked for."""

    def __init__(self, rig: Rig, stub: Stub) -> None:
        self.rig, self.cudnn = rig, stub
        self.capturing, self.stream = False, 7

    def cupy(self, stand_in: Any) -> None:
        def ascontiguousarray(array: np.ndarray) -> np.ndarray:
            if not array.flags.c_contiguous:
                copy = self.rig.empty(array.shape, array.dtype)
                copy[...] = array
                array = copy
            return array.view(DeviceArray)

        def where(*args: Any) -> np.ndarray:
            return np.where(*args).view(DeviceArray)

        stand_in.empty = lambda shape, dtype=float: self.rig.empty(shape, dtype).view(DeviceArray)
        stand_in.ascontiguousarray = ascontiguousarray
        stand_in.add, stand_in.maximum, stand_in.where = np.add, np.maximum, where
        stand_in.cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(id=self.cudnn.device),
            get_current_stream=lambda: SimpleNamespace(
                ptr=self.stream, is_capturing=lambda: self.capturing
            ),
        )

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.cudnn.executed]

    def step(
        self, windows: Windows = SQUARE, n: int = 2, c: int = 3, o: int = 4, dtype: str = "float32"
    ) -> Any:
        """A convolution of random numbers, forward and backward, compared with torch's."""
        return convolve(self, windows, n, c, o, 1, dtype, "conv")


def forget() -> None:
    for function in (cupy_cudnn.choice, cupy_cudnn._library, cupy_cudnn._handle):
        function.cache_clear()
    cupy_cudnn._graphs.clear()


@contextmanager
def bench(word: str | None = "all", module: Any = None) -> Iterator[Bench]:
    stub = Stub()
    with pytest.MonkeyPatch.context() as patch, rigged() as rig:
        patch.setitem(sys.modules, "cudnn", stub if module is None else module)
        if word is None:
            patch.delenv("PORTACNN_CUDNN", raising=False)
        else:
            patch.setenv("PORTACNN_CUDNN", word)
        made = Bench(rig, stub)
        made.cupy(sys.modules["cupy"])
        forget()
        try:
            yield made
        finally:
            forget()


def by_torch(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    windows: Windows,
    groups: int,
    kind: str,
) -> tuple[Any, Callable[[np.ndarray], list[np.ndarray]]]:
    """The result, and a function from its gradient to those of x, weight and bias. One axis is made
    two."""
    one = 2 - len(windows.size)
    given = [
        torch.tensor(np.asarray(a, "float64"), requires_grad=True)
        for a in (x, weight, bias)
        if a is not None
    ]
    pads = [side for pair in reversed(((0, 0),) * one + windows.pads) for side in pair]
    image, kernels = (a.unsqueeze(2) if one else a for a in given[:2])
    stride, dilation = ((1,) * one + axis for axis in (windows.stride, windows.dilation))
    y = torch.nn.functional.pad(image, pads)
    y = torch.nn.functional.conv2d(
        y, kernels, given[2] if len(given) > 2 else None, stride, dilation=dilation, groups=groups
    )
    if kind != "conv":
        y = y.relu()
    if kind == "pool":
        y = torch.nn.functional.max_pool2d(y, 2)
    if one:
        y = y.squeeze(2)

    def backward(dy: np.ndarray) -> list[np.ndarray]:
        return [
            g.numpy()
            for g in torch.autograd.grad(y, given, torch.tensor(np.asarray(dy, "float64")))
        ]

    return y.detach().numpy(), backward


def convolve(
    made: Bench,
    windows: Windows,
    n: int,
    c: int,
    o: int,
    groups: int,
    dtype: str,
    kind: str,
    seed: int = 0,
) -> tuple[Any, Any]:
    """c and o of one group. Bias and, for other kinds than "conv", ReLU are in it; for "pool", 2x2
    pooling."""
    draw = np.random.default_rng(seed).standard_normal
    last = (*range(1, 2 + len(windows.size)), 0)
    x = made.rig.array(draw((n, c * groups, *windows.size)), dtype, last)
    weight = made.rig.array(draw((o * groups, c, *windows.kernel)), dtype)
    bias = made.rig.array(draw(o * groups), dtype) if seed % 2 == 0 else None
    wanted, backward = by_torch(x, weight, bias, windows, groups, kind)
    if kind == "conv":
        y, saved = cupy_conv.conv(x, weight, bias, windows, groups, keep=True)
    else:
        pool = Windows.of(windows.out, 2, 2) if kind == "pool" else None
        y, saved = cupy_conv.conv_relu(x, weight, bias, windows, groups, pool, keep=True)
    sizes = [None if a is None else np.abs(a) for a in (x, weight, bias)]
    terms, backward_terms = by_torch(*sizes, windows, groups, "conv")  # type: ignore[arg-type]
    close(y, wanted, dtype, terms)
    dy = made.rig.array(draw(wanted.shape), dtype, last)
    got, right = cupy_conv.conv_backward(dy, saved), backward(dy)
    assert (got[2] is None) == (bias is None)
    for one, other, size in zip(
        got, right, backward_terms(np.ones(terms.shape) * np.abs(dy).max()), strict=False
    ):
        close(one, other, dtype, size)
    return y, got


# --- values ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data(), st.sampled_from(["float32", "float64"]), st.sampled_from(["conv", "relu"]))
def test_values(data: st.DataObject, dtype: str, kind: str):
    windows = Drawn(data.draw, "small").windows(data.draw(st.integers(1, 2)), 6)
    groups, c, o = (data.draw(st.integers(1, top)) for top in (3, 3, 3))
    n, seed, precision = data.draw(
        st.tuples(st.integers(1, 3), st.integers(0, 99), st.sampled_from(["float32", "tf32"]))
    )
    with bench() as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "precision", lambda: precision, raising=False)
        convolve(made, windows, n, c, o, groups, dtype, kind, seed)
        assert made.kinds == ["fprop", "wgrad", "dgrad"]
        assert not made.rig.launches


def test_values_through_pooling():
    with bench() as made:
        convolve(made, Windows.of((8, 6), 3, 1, 1), 3, 2, 4, 1, "float64", "pool")
        assert made.kinds == ["fprop", "wgrad", "dgrad"]
        assert not made.rig.launches


def test_without_dx():
    with bench() as made:
        x, weight = (
            made.rig.array(np.ones((2, 3, 6, 5)), "float32"),
            made.rig.array(np.ones((4, 3, 3, 3)), "float32"),
        )
        y, saved = cupy_conv.conv(x, weight, None, SQUARE, 1, keep=True)
        dx, dweight, dbias = cupy_conv.conv_backward(
            made.rig.array(np.ones(y.shape), "float32"), saved, need_dx=False
        )
        assert dx is None
        assert dbias is None
        assert dweight[0, 0, 1, 1] == 2 * 6 * 5
        assert made.kinds == ["fprop", "wgrad"]


# --- what cuDNN is told ---------------------------------------------------------------------------


def test_tensors_of_float32():
    """Image (2, 6, 8, 7), 3 groups, filter (9, 2, 3, 2): planes lie together."""
    windows = Windows.of((8, 7), (3, 2), (2, 1), ((1, 1), (0, 1)), (1, 2))
    with bench() as made:
        convolve(made, windows, 2, 2, 3, 3, "float32", "conv")
        fprop, wgrad, dgrad = made.cudnn.built
    assert [graph.kind for graph in (fprop, wgrad, dgrad)] == ["fprop", "wgrad", "dgrad"]
    x, w, y = (
        ([2, 6, 8, 7], [336, 56, 7, 1]),
        ([9, 2, 3, 2], [12, 6, 2, 1]),
        ([2, 9, 4, 6], [216, 24, 6, 1]),
    )
    wanted = {"fprop": (x, w, y), "wgrad": (x, y, w), "dgrad": (y, w, x)}
    for graph in (fprop, wgrad, dgrad):
        tensors = [*graph.inputs.values(), graph.result]
        assert tuple((t.dim, t.stride) for t in tensors) == wanted[graph.kind]
        assert [t.uid for t in tensors] == [1, 2, 3]
        assert {t.data_type for t in tensors} == {"FLOAT"}
        # Rows: 8 + 1 + 1 has room for (10 - 3) // 2 + 1 = 4. Columns: nothing before, one behind.
        assert graph.attributes == {
            "pre_padding": [1, 0],
            "post_padding": [1, 1],
            "stride": [2, 1],
            "dilation": [1, 2],
            "compute_data_type": "FLOAT",
        }
        assert {
            "TENSOR_CORE",
            "NONDETERMINISTIC",
            "DOWN_CONVERT_INPUTS",
            "REDUCED_PRECISION_REDUCTION",
        } <= graph.notes
        assert graph.limit == cupy_cudnn.WORKSPACE


def test_tensors_of_tf32_have_their_channels_side_by_side(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "precision", lambda: "tf32", raising=False)
    with bench() as made:
        made.step()
        image, weight = made.cudnn.built[0].inputs.values()
        assert (image.dim, image.stride) == ([2, 3, 6, 5], [90, 1, 15, 3])
        assert (weight.dim, weight.stride) == ([4, 3, 3, 3], [27, 1, 9, 3])
        assert "TENSOR_CORE" not in made.cudnn.built[0].notes
        assert "NONDETERMINISTIC" in made.cudnn.built[0].notes


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "behind"),
    [
        (32, 3, 2, (1, 1), 1),  # the last padding is not read: alike on both sides all the same
        (32, 3, 2, (0, 1), 1),  # 0 on both sides gives 15 in place of 16
        (7, 2, 2, (0, 0), 0),  # an input is left over
        (5, 3, 1, (2, 0), 0),
        (9, 4, 5, (3, 0), 0),  # 3 on both sides gives 3 in place of 2, and an input is left over
    ],
)
def test_padding_behind(size: int, kernel: int, stride: int, padding: tuple[int, int], behind: int):
    windows = Windows.of((size,), kernel, stride, (padding,))
    plan = geometry.plan_of(windows, 1, 1, 1, 1, False, 4)
    assert plan is not None
    assert cupy_cudnn.pads(plan) == ([0, padding[0]], [0, behind])


@pytest.mark.parametrize("number", range(4))
def test_arrays_that_begin_anywhere(number: int):
    """A network's weights lie one after the other, as parts of one array: a pointer may be a
    multiple of no more than a number."""
    with bench() as made:
        array, moved = made.rig.array, []

        def shifted(
            host: np.ndarray, dtype: str, order: tuple[int, ...] | None = None
        ) -> np.ndarray:
            given = array(host, dtype, order)
            if len(moved) == number or order is not None:
                moved.append(given)
                return given
            memory = made.rig.empty(given.size + 1, dtype)[1:].reshape(given.shape)
            memory[...] = given
            moved.append(memory)
            return memory.view(DeviceArray)

        made.rig.array = shifted  # type: ignore[method-assign]
        made.step()
        assert any(a.ctypes.data % 16 for a in moved)
        assert made.kinds == ["fprop", "wgrad", "dgrad"]


# --- plans, handles, streams ----------------------------------------------------------------------


def test_a_graph_is_built_once(monkeypatch: pytest.MonkeyPatch):
    with bench() as made:
        made.step()
        made.step()
        assert len(made.cudnn.built) == 3
        assert len(made.cudnn.executed) == 6
        made.step(n=3)
        made.step(dtype="float64")
        made.step(windows=Windows.of((6, 5), 3))
        convolve(made, SQUARE, 2, 3, 4, 2, "float32", "conv")  # each of two groups is like the one
        assert len(made.cudnn.built) == 15
        monkeypatch.setattr(dispatch, "precision", lambda: "tf32", raising=False)
        made.step()
        assert len(made.cudnn.built) == 18


def test_a_handle_for_each_device_follows_the_stream():
    with bench() as made:
        made.step()
        made.stream = 9
        made.step()
        made.cudnn.device, made.stream = 1, 7
        made.step()
        assert len(made.cudnn.handles) == 2
        assert [at for _, *at in made.cudnn.executed] == [[0, 7]] * 3 + [[0, 9]] * 3 + [[1, 7]] * 3
        assert len(made.cudnn.built) == 6


@needs_compiler
def test_nothing_is_built_while_a_stream_is_captured():
    with bench() as made:
        made.capturing = True
        made.step()
        assert not made.cudnn.built
        assert len(made.rig.launches) >= 3
        made.capturing = False
        made.step()
        launches, made.capturing = len(made.rig.launches), True
        made.step()
        assert made.kinds == ["fprop", "wgrad", "dgrad"] * 2
        assert len(made.rig.launches) == launches


# --- what cuDNN refuses ---------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("refused", ["fprop", "wgrad", "dgrad"])
@pytest.mark.parametrize("kind", ["conv", "relu", "pool"])
def test_a_refused_plan_is_ours_with_one_warning(
    refused: str, kind: str, caplog: pytest.LogCaptureFixture
):
    with bench() as made, caplog.at_level(logging.WARNING, "portacnn"):
        made.cudnn.refused = {refused}
        for seed in (0, 1):
            convolve(made, Windows.of((8, 6), 3, 1, 1), 2, 3, 4, 1, "float32", kind, seed)
        assert refused not in made.kinds
        assert made.rig.launches
    (record,) = caplog.records
    assert f"cuDNN does not support {refused} of float32" in record.getMessage()
    assert "no valid engine configs" in record.getMessage()


# --- the switch -----------------------------------------------------------------------------------


def plan(n: int = 128, c: int = 64, o: int = 64, side: int = 32, kernel: int = 3) -> geometry.Plan:
    made = geometry.plan_of(Windows.of((side, side), kernel, 1, kernel // 2), c, o, 1, n, False, 4)
    assert made is not None
    return made


@pytest.mark.parametrize("word", [None, "", "0"])
def test_off_unless_asked_for(word: str | None):
    with bench(word) as made:
        assert not cupy_cudnn.takes(plan())
        assert not made.cudnn.handles


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [
        ({}, True),  # 4.8e9 multiply-adds, 288 a number
        ({"n": 32}, False),  # 1.2e9
        ({"c": 256, "o": 256, "kernel": 1}, False),  # 8.6e9, but 128 a number
        ({"c": 16, "o": 16, "n": 4096}, False),  # 9.7e9, 72 a number
        ({"c": 1, "o": 30, "side": 28, "kernel": 5, "n": 100}, False),
    ],
    ids=["large", "few images", "1x1", "few channels", "mnist"],
)
def test_large_ones_are_taken(sizes: dict[str, int], taken: bool):
    with bench("1"):
        assert cupy_cudnn.takes(plan(**sizes)) is taken
    with bench("all"):
        assert cupy_cudnn.takes(plan(**sizes))


@pytest.mark.parametrize("word", ["bfloat16", "float16"])
def test_half_precision_stays_with_our_kernels(word: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "precision", lambda: word, raising=False)
    with bench("all"):
        assert not cupy_cudnn.takes(plan())


def test_an_unknown_word_names_the_choices():
    with (
        bench("yes"),
        pytest.raises(ArgumentError, match="PORTACNN_CUDNN must be one of 0, 1, all; got 'yes'"),
    ):
        cupy_cudnn.takes(plan())


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    with bench("1") as made:
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.delitem(sys.modules, "cudnn")
        with pytest.raises(BackendError, match=r'pip install "portacnn\[cudnn\]"') as caught:
            made.step()
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra in ("cudnn", "cudnn12", "cuda12"):
        assert f"portacnn[{extra}]" in str(caught.value)
        assert extra in extras


def test_a_package_without_its_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cudnn.py").write_text(
        "raise OSError('libcudnn.so.9: cannot open shared object file')"
    )
    with bench("1"):
        monkeypatch.delitem(sys.modules, "cudnn")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(
            BackendError,
            match=r"does not load: libcudnn.*nvidia-cudnn-cu13 or "
            r"nvidia-cudnn-cu12",
        ):
            cupy_cudnn.takes(plan())
