"""Training steps as a whole: a CUDA graph on a GPU, one function that ``torch.compile`` compiles on
the CPU.

Both do the same work on the same memory each time. The arrays that stay (parameters, statistics,
gradients, the optimizer's state, the data set) are used where they lie. The batch and the numbers
of the state (``StepState``), which become 0-dimensional tensors, int64 or float64, are arguments.
The first steps of a kind run as usual, so that everything that is created once exists when the
third one is recorded. Recording executes nothing. If it fails, the steps continue as usual, and one
warning says why.

On CUDA the arguments are copied to tensors with fixed addresses, and the results out of the graph's
memory, which is a pool of its own. A graph runs the same kernels as the step itself, so results are
equal bit by bit.

On the CPU, the tensor operations of the step are recorded (``torch.fx``) on tensors without memory.
An operation that would read a value on the host fails then, and is named in the warning.
``torch.compile`` makes C++ of them, which changes the order of some sums.

An array that the step makes and keeps (``self.mean = self.mean * 0.5 + x``) has no value after the
recording, and a replay reads the array before it. If the step only makes it anew each time, the
steps continue as usual. If it reads it, or adds to a list, a StateError is raised.
"""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from inspect import isframe
from struct import pack
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from portacnn.backends.steps import arrays_of, code_of, place_of, rebuilt, sorted_out
from portacnn.errors import StateError
from portacnn.ops.dispatch import kernel_choice, precision
from portacnn.runtime import Array, Backend

WARM = 2
"""The number of steps of a kind that run as usual before one is recorded."""
MOST = 4
"""The most kinds that are recorded; steps of other kinds run as usual."""
_log = logging.getLogger("portacnn")
_aten = torch.ops.aten
_DTYPES = {"q": torch.int64, "d": torch.float64}

_Step = Callable[[list[Array], list[Array]], Any]
"""The step as a function of its arrays and of its numbers as tensors."""
_Replay = Callable[[list[Array], list[Any]], Any]
"""The recorded step as a function of its arrays and its numbers."""


class WholeStep:
    """``step(*arrays, state)``, recorded and replayed. ``state`` is a dataclass; the head of this
    file explains how it is handled.

    The kind of a step is defined by the number, shapes, dtypes and strides of its arrays, by the
    fields of the state that are neither numbers nor arrays, and by the kernel set and precision in
    use. A step may return tensors, and tuples and lists of them.

    Attributes:
        graphs: the number of kinds that are replayed.
        reason: why recording was given up, or None.
    """

    def __init__(self, backend: Backend, step: Callable[..., Any]) -> None:
        self._backend, self._step = backend, step
        self._record = {"cuda": _graph, "cpu": _compiled}.get(backend.device.type)
        self.reason: str | None = None
        self._refused: str | None = None
        self._calls: dict[Any, int] = {}
        self._replays: dict[Any, _Replay] = {}
        if self._record is None:
            self._give_up("it is supported on CUDA and on the CPU")

    @property
    def graphs(self) -> int:
        return len(self._replays)

    def __call__(self, *arguments: Any) -> Any:
        if self._refused is not None:
            raise StateError(self._refused)
        *batch, state = arguments
        numbers, held, fixed = sorted_out(state, torch.Tensor)
        arrays = [*batch, *held.values()]
        key = (len(batch), fixed, tuple(map(_kind, arrays)), kernel_choice(), precision())
        if (known := self._replays.get(key)) is not None:
            return known(arrays, list(numbers.values()))
        if self.reason is not None or (key not in self._calls and len(self._calls) == MOST):
            return self._step(*arguments)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= WARM:
            return self._step(*arguments)
        made = _Made()

        def step(arrays: list[Array], words: list[Array]) -> Any:
            made.note([*arrays, *words])
            own = dict(zip(held, arrays[len(batch) :], strict=True))
            own |= dict(zip(numbers, words, strict=True))
            with made:
                return self._step(*arrays[: len(batch)], replace(state, **own))

        begun = time.perf_counter()
        replay: _Replay | None = None
        try:
            assert self._record is not None
            with torch.no_grad():
                replay = self._record(step, arrays, list(numbers.values()))
            if made.kept():
                replay, reason = None, f"it keeps an array that it makes: {made.holders()}"
            else:
                result = replay(arrays, list(numbers.values()))
        except Exception as error:
            replay, reason = None, f"{place_of(error, __file__)}: {_reason(error)}"
        if replay is not None:
            self._replays[key] = replay
            _log.info(
                "a training step on %s was compiled in %.1f s",
                self._backend,
                time.perf_counter() - begun,
            )
            return result
        # Outside the except block, where no exception keeps memory alive. If the step fails here
        # too, the error is not caused by recording, and recording is not given up.
        result = self._as_usual(made, arguments)
        self._give_up(reason)
        return result

    def _as_usual(self, made: "_Made", arguments: tuple[Any, ...]) -> Any:
        """Run the step without a recording, after one that failed.

        Raises:
            StateError: if the step reads an array that the recording has made, or does not replace
                it. Such an array has no value.
        """
        if not made.kept():
            return self._step(*arguments)
        holders = made.holders()
        try:
            with _Unread(made):
                result = self._step(*arguments)
            if not made.kept():
                return result
            holders = made.holders()
        except _ReadError:
            pass
        self._refused = (
            f"a training step on {self._backend} keeps an array that it makes ({holders}), which "
            "cannot be recorded, and the array has no value now; write to an array that exists "
            "instead (array[...] = new), or make the Trainer with compile_step=False"
        )
        raise StateError(self._refused)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._replays.clear()
        _log.warning(
            "a training step on %s cannot be compiled; training continues without, which may be "
            "slower: %s",
            self._backend,
            reason,
        )


class _Made(TorchDispatchMode):
    """Notes the arrays that are made while it is active, without keeping them alive: results, and
    tensors without memory (``FakeTensor``).
    """

    def __init__(self) -> None:
        super().__init__()
        self._arrays = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        # A view of memory that stays is as good as that, if it has memory.
        if not func.is_view or self.has(given):
            self._note([one for one in _tensors(found) if not any(one is arg for arg in given)])
        else:
            self.note(_tensors(found))
        return found

    def note(self, arrays: list[Array]) -> None:
        """Note those of these arrays that have no memory."""
        self._note([array for array in arrays if isinstance(array, FakeTensor)])

    def _note(self, arrays: list[Array]) -> None:
        for array in arrays:
            self._arrays[array] = None

    def has(self, arrays: list[Array]) -> bool:
        return any(array in self._arrays for array in arrays)

    def kept(self) -> bool:
        """Return whether any of these arrays is still alive."""
        if self._alive():
            gc.collect()
        return bool(self._alive())

    def _alive(self) -> list[Array]:
        return list(self._arrays.keys())

    def holders(self) -> str:
        """Return what holds these arrays, for an error message: "Norm.mean"."""
        arrays = self._alive()[:3]
        found = {name: None for array in arrays for name in _holders(array, arrays)}
        return ", ".join(found) or "unknown"


class _ReadError(Exception):
    """Raised if a step reads an array that has no value."""


class _Unread(TorchDispatchMode):
    """Raises an error if one of these arrays is read."""

    def __init__(self, made: _Made) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._made.has(_tensors((args, kwargs))):
            raise _ReadError
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[Array]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _holders(array: Array, but: list[Array]) -> list[str]:
    """Return the attributes that hold an array, else the types of what does."""
    near = [one for one in gc.get_referrers(array) if one is not but and not isframe(one)]
    far = [owner for one in near if isinstance(one, dict) for owner in gc.get_referrers(one)]
    names = []
    for owner in (*near, *far):
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if value is array:
                names.append(f"{type(owner).__name__}.{name}")
    return names or [f"a {type(one).__name__}" for one in near]


def _kind(array: Array) -> tuple[Any, ...]:
    return tuple(array.shape), array.dtype, array.stride(), array.device


def _reason(error: BaseException) -> str:
    kind = type(error).__name__
    if "DataDependent" in kind:
        return "it reads a value of a tensor on the host"
    # PyTorch's first line is "backend='inductor' raised:"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.endswith("raised:")]
    return f"{kind}: {lines[0]}" if lines else kind


# --- CUDA -----------------------------------------------------------------------------------------


def _graph(step: _Step, arrays: list[Array], numbers: list[Any]) -> _Replay:
    """Return the step as a CUDA graph."""
    inputs = [array.clone() for array in arrays]
    codes = [code_of(type(number)) for number in numbers]
    words = torch.zeros((max(len(codes), 1),), dtype=torch.int64, device=inputs[0].device)
    views = [words[i].view(_DTYPES[code]) for i, code in enumerate(codes)]
    graph = torch.cuda.CUDAGraph()
    # other threads may use the device meanwhile
    with torch.cuda.graph(
        graph, pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local"
    ):
        result = step(inputs, views)
        # other objects, so that those of the step are freed if it does not keep them
        found = [array.detach() for array in arrays_of(result, torch.Tensor)]
    result = rebuilt(result, iter([None] * len(found)))

    def replay(arrays: list[Array], numbers: list[Any]) -> Any:
        for there, array in zip(inputs, arrays, strict=True):
            there.copy_(array)
        if numbers:
            bits = pack(f"={''.join(codes)}", *numbers)
            words.copy_(torch.frombuffer(bytearray(bits), dtype=torch.int64))
        graph.replay()
        return rebuilt(result, iter([array.clone() for array in found]))

    return replay


# --- the CPU --------------------------------------------------------------------------------------


def _compiled(step: _Step, arrays: list[Array], numbers: list[Any]) -> _Replay:
    """Return the step as a function that ``torch.compile`` compiles at its first call."""
    codes = [code_of(type(number)) for number in numbers]

    def tensors(numbers: list[Any]) -> list[Array]:
        return [
            torch.tensor(number, dtype=_DTYPES[code])
            for code, number in zip(codes, numbers, strict=True)
        ]

    try:
        module, held, result = _traced(step, arrays, tensors(numbers))
    finally:
        # PyTorch's tracer leaves exceptions in reference cycles. Their tracebacks hold the frames
        # of the callers, and so the Trainer and its data.
        gc.collect()
    function = torch.compile(module, dynamic=False, fullgraph=True)

    def replay(arrays: list[Array], numbers: list[Any]) -> Any:
        with torch.no_grad():
            return rebuilt(result, iter(function(*held, *arrays, *tensors(numbers))))

    return replay


def _traced(
    step: _Step, arrays: list[Array], words: list[Array]
) -> tuple[torch.fx.GraphModule, list[Array], Any]:
    """Return the tensor operations of the step, the tensors that they use besides the arguments,
    and the structure of the result.

    The module takes those tensors, the arrays and the numbers, and returns a list.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    result: Any = None

    def flat(*inputs: Array) -> list[Array]:
        nonlocal result
        result = step(list(inputs[: len(arrays)]), list(inputs[len(arrays) :]))
        return arrays_of(result, torch.Tensor)

    trace = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)
    traced = trace(*arrays, *words)
    for node in traced.graph.nodes:
        node.meta.pop("val", None)  # the tensors of the recording
    graph, held = traced.graph, _held(traced)
    start = next(iter(graph.nodes))
    for number, (whole, uses) in enumerate(held):
        with graph.inserting_before(start):
            argument = graph.placeholder(f"held_{number}")
        for node, tensor in uses:
            place = argument
            if tensor is not whole:
                with graph.inserting_before(node):
                    layout = list(tensor.shape), list(tensor.stride()), tensor.storage_offset()
                    place = graph.call_function(_aten.as_strided.default, (argument, *layout))
            node.replace_all_uses_with(place)
            graph.erase_node(node)
    module = torch.fx.GraphModule({}, graph)
    count = len(arrays_of(result, torch.Tensor))
    return module, [whole for whole, _ in held], rebuilt(result, iter([None] * count))


_Uses = list[tuple[torch.fx.Node, Array]]


def _held(traced: torch.fx.GraphModule) -> list[tuple[Array, _Uses]]:
    """Return the tensors that the traced operations use besides their arguments: for each memory
    the whole of it, and the nodes that stand for it or for views of it.

    A parameter is a view of the flat tensor of all parameters. Arguments that share memory would
    make the compiled function slow, so it gets each memory once.
    """
    by_memory: dict[int, _Uses] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(traced, node.target)
            by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append((node, tensor))
    return [(_whole([tensor for _, tensor in uses]), uses) for uses in by_memory.values()]


def _whole(views: list[Array]) -> Array:
    """Return the one of these views that is all of their memory, or make it."""
    first, *_ = views
    storage = first.untyped_storage()
    count = storage.nbytes() // first.element_size()
    for view in views:
        if view.dtype == first.dtype and view.numel() == count and view.is_contiguous():
            return view
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, 0, (count,))
