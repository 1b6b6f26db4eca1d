"""``Layer``: what every layer is. State in plain dictionaries, a ``forward`` and a ``backward`` that a person can read.

A layer is made in two steps. Its constructor checks its numbers and allocates nothing. ``build`` then walks the tree from
the root: it gives every layer its path, checks each shape against the next, and only when all fits draws the parameters,
each from the seed and its own path. A parameter's array stays the same object until ``to``: optimizers and
``load_state_dict`` write into it, and so does ``backward`` into the gradient's.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from inspect import Parameter as Parameter_
from inspect import signature
from math import prod
from typing import Any, ClassVar, NamedTuple, Self

from portacnn.arguments import told, wholes
from portacnn.errors import ArgumentError, ModelFormatError, PortacnnError, ShapeError, StateError
from portacnn.flat import Flat, Named
from portacnn.init import Initializer, rule
from portacnn.layers.limits import count_layer, count_output, count_taps
from portacnn.runtime import Array, Backend, HostArray, backend_of, dtype_name, resolve, taken
from portacnn.seeds import check_seed, generator
from portacnn.text import listed, shown

Shape = tuple[int, ...]
"""The shape of one sample: (C, H, W), or (F,)."""


class Parameter(NamedTuple):
    """What ``infer`` says of a parameter before there is one."""

    shape: Shape
    init: Initializer
    fan_in: int
    fan_out: int


class Buffer(NamedTuple):
    """What ``infer`` says of a buffer: state that is no parameter, and starts with the same number everywhere."""

    shape: Shape
    value: float
    dtype: str | None  # None for the network's
    optional: bool  # whether a state without it is whole: then it stays as it is


class Children(dict[str, "Layer"]):
    """A layer's children by name. Once they are ``sealed`` they stay as they are, since what runs was made of them."""

    sealed = False

    def _change(self, *args: Any, **kwargs: Any) -> Any:
        raise StateError(
            "the layers of a network cannot be exchanged, added or removed; make a new network of the layers that it is to "
            "have, and give it the weights with load_state_dict(state, strict=False)"
        )

    def __setitem__(self, name: str, layer: "Layer") -> None:
        if self.sealed:
            self._change()
        super().__setitem__(name, layer)

    def update(self, *args: Any, **kwargs: Any) -> None:
        if self.sealed:
            self._change()
        for name, layer in dict(*args, **kwargs).items():
            self[name] = layer

    __delitem__ = __ior__ = pop = popitem = clear = setdefault = _change

    def __reduce__(self) -> Any:
        return _restored, (dict(self), self.sealed)


def _restored(layers: Mapping[str, "Layer"], sealed: bool) -> Children:
    """Children that were copied or pickled."""
    made = Children(layers)
    made.sealed = sealed
    return made


class Mismatch(NamedTuple):
    """Paths that a state lacks, and paths in it that a network does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Network:
    """What all layers of a built network share. They do not know its root, which knows them: they would keep each other alive.

    Attributes:
        params, buffers, grads: what the arrays lie in, where they do; gradients from the first backward pass on.
    """

    def __init__(self) -> None:
        self.params: tuple[Flat, ...] = ()
        self.buffers: tuple[Flat, ...] = ()
        self.grads: tuple[Flat, ...] = ()


class Layer:
    """A piece of a network with parameters of its own, or children that have some.

    A subclass writes ``infer``, ``forward`` and ``backward``. A forward that keeps hands its op's cache to ``_keep``; the
    backward takes it with ``_kept``, which forgets it.

    Attributes:
        path: the layer's place in its network, such as "layer1.0.conv1"; "" for the root.
        params, grads, buffers: its own arrays by name; a gradient exists from the first backward pass on.
        children: its layers by name, in the order in which they run.
        backend: where it lives; None until it is built.
        seed: what ``build`` was given, for layers that draw while they run.
        step, first: where training is, see ``at_step``.
        input_shape, output_shape: of one sample, known once it is built.
    """

    known: ClassVar[dict[str, type["Layer"]]] = {}
    """Every class of layers by name, for reading models from files."""

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        """Enter a class of layers; not those that others only derive from, which no file may ask for."""
        if not abstract and not cls.kind().startswith("_"):
            Layer.known[cls.kind()] = cls

    @classmethod
    def kind(cls) -> str:
        """The class's name in files: portacnn's own go by their bare name, others by their module's too."""
        own = cls.__module__.partition(".")[0] == "portacnn"
        return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        count_layer()
        self = super().__new__(cls)
        self._made_with = (args, kwargs)
        self.path = ""
        self.params, self.grads, self.buffers = {}, {}, {}
        self._children = Children()
        self.backend, self.dtype = None, "float32"
        self.input_shape = self.output_shape = ()
        self.seed, self.step, self.first = 0, 0, 0
        self._declared, self._declared_buffers = {}, {}
        self._cache = None
        self._tables = {}
        self._network = None
        self._is_root = False
        return self

    _made_with: tuple[tuple[Any, ...], dict[str, Any]]
    path: str
    params: dict[str, Array]
    grads: dict[str, Array]
    buffers: dict[str, Array]
    _children: Children
    backend: Backend | None
    dtype: str
    input_shape: Shape
    output_shape: Shape
    seed: int
    step: Any
    first: Any
    _declared: dict[str, Parameter]
    _declared_buffers: dict[str, Buffer]
    _cache: Any
    _tables: dict[tuple[str, str, str], Array]  # by name, library and device
    _network: "_Network | None"  # the one it was built in
    _is_root: bool

    @property
    def children(self) -> Children:
        """Its layers by name, in the order in which they run. Raises StateError on changing them once the network is made."""
        return self._children

    @children.setter
    def children(self, layers: Mapping[str, "Layer"]) -> None:
        self._children.update()  # which raises StateError where they are sealed
        self._children = Children(layers)

    # --- what a subclass writes -------------------------------------------------------------------------------------

    def infer(self, shape: Shape) -> Shape:
        """Check one sample's shape, ``declare`` the parameters it asks for, and give the output's shape."""
        raise NotImplementedError

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        """x (N, *input_shape) -> y (N, *output_shape).

        Args:
            train: use this batch's statistics, drop out.
            keep: keep what ``backward`` needs; by default as ``train``.
        """
        raise NotImplementedError

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        """The gradient of the last kept forward's output -> that of its input; parameters' gradients go to ``grads``.

        Without ``need_dx`` the input's gradient may be left out (None).
        """
        raise NotImplementedError

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        """``forward(x, keep=False)`` for one batch after another just like x, made cheap to call where there is a way to.

        It holds as long as the layer's parameters are the same arrays. What it gives back may lie in memory that its next
        call uses again.
        """
        return lambda x: self.forward(x, keep=False)

    # --- what a subclass uses ---------------------------------------------------------------------------------------

    def declare(self, name: str, shape: Shape, init: Initializer, *, fan_in: int = 1, fan_out: int = 1) -> None:
        """In ``infer``: this layer will have a parameter of this shape, drawn by this rule."""
        rule(init)
        self._declared[name] = Parameter(shape, init, fan_in, fan_out)

    def declare_buffer(
        self, name: str, shape: Shape, value: float, dtype: str | None = None, *, optional: bool = False
    ) -> None:
        """In ``infer``: this layer will have a buffer of this shape, full of ``value``.

        Args:
            name, shape, value: of the buffer.
            dtype: by default the network's.
            optional: a state without it is whole: loading leaves the buffer as it is.
        """
        self._declared_buffers[name] = Buffer(shape, value, dtype, optional)

    def _keep(self, cache: Any) -> None:
        if cache is not None:
            self._cache = cache

    def _kept(self) -> Any:
        if self._cache is None:
            raise StateError(
                "backward needs a forward before it that kept its cache: forward(x, train=True), or keep=True",
                self.where,
            )
        cache, self._cache = self._cache, None
        return cache

    def _table(self, name: str, values: Callable[[], Any], dtype: str, like: Array) -> Array:
        """Constants of the layer's own, such as indices, in like's library and on its device: sent there once.

        They are no part of the layer's state. A captured step may read them, so they stay as long as the layer does.

        Args:
            values: gives them as (nested) sequences of numbers.
        """
        backend = backend_of(like)
        key = name, backend.name, backend.place(like.device)
        if key not in self._tables:
            self._tables[key] = backend.xp.asarray(values(), dtype=backend.dtype(dtype), device=like.device)
        return self._tables[key]

    def forget(self) -> None:
        """Drop whatever this layer and those below kept for a backward pass that will not come."""
        for layer in self.walk():
            layer._cache = None

    def _write_grads(self, **grads: Array | None) -> None:
        """Put gradients where they belong: into the same arrays as ever, once there are some."""
        own = {name: grad for name, grad in grads.items() if name in self.params}
        if not own:
            return
        with self._home().active():
            for name, grad in own.items():
                if name not in self.grads:  # not the array that came: it may lie in a workspace
                    self.grads[name] = self._room_for_grad(name)
                self.grads[name][...] = grad

    def _room_for_grad(self, name: str) -> Array:
        """An array for this parameter's gradient: beside those of the others, where the parameters lie so."""
        network, path, param = self._network or _Network(), self._full(name), self.params[name]
        for number, flat in enumerate(network.params):
            if flat.views.get(path) is param:
                network.grads = network.grads or tuple(flat.like() for flat in network.params)
                return network.grads[number].views[path]
        return self.backend.xp.empty_like(param)  # type: ignore[union-attr]

    # --- building ---------------------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        """``conv2 (Conv2d)``, for error messages."""
        return f"{shown(self.path)} ({type(self).__name__})" if self.path else type(self).__name__

    def build(
        self,
        input_shape: Sequence[int],
        *,
        device: str | Backend | None = None,
        dtype: str = "float32",
        seed: int | None = None,
    ) -> Self:
        """Check all shapes for samples of ``input_shape``, then draw the parameters on ``device``; gives back itself.

        Args:
            input_shape: of one sample, without the batch: (C, H, W).
            device: see ``portacnn.resolve``.
            dtype: "float32" or "float64".
            seed: draws are the same bits on every backend for the same seed; None takes a fresh one.

        Raises:
            ShapeError: the layer's path, what it expected and what came; nothing has been changed then.
            BackendError, ArgumentError: for the other arguments.
        """
        if dtype not in ("float32", "float64"):
            raise ArgumentError(f'dtype must be "float32" or "float64", got {dtype!r}')
        shape = _sample_shape(input_shape, self.where)
        count_output(shape)
        backend, seed = resolve(device), check_seed(seed)
        layers = list(self.walk())
        network = self._network if self._is_root else None
        for layer in layers:
            if layer._network is not None and layer._network is not network:
                raise StateError(
                    "was built as a part of another network; give this one a layer of its own", layer.where
                )
        restore = _snapshot(layers)
        try:
            self.plan(shape)
            state = _state.get()
            if state is not None:
                declared = {
                    layer._full(name): spec.shape
                    for layer in layers
                    for specs in (layer._declared, layer._declared_buffers)
                    for name, spec in specs.items()
                }
                check_state(declared, state, self.where, optional=self._optional())
        except PortacnnError:
            restore()
            raise
        network = network or _Network()
        self._is_root = True
        for layer in layers:
            layer._network, layer.children.sealed = network, True
            layer.backend, layer.dtype, layer.grads, layer._cache = backend, dtype, {}, None
            layer.seed, layer.step, layer.first = seed, 0, 0
            for name, (param_shape, init, fan_in, fan_out) in layer._declared.items():
                path = layer._full(name)
                drawn = (
                    rule(init)(generator(seed, path), param_shape, fan_in, fan_out) if state is None else state[path]
                )
                if tuple(drawn.shape) != param_shape:
                    raise ArgumentError(f"the initializer of {name} gave {drawn.shape}, not {param_shape}", layer.where)
                layer.params[name] = _first(backend, drawn, dtype)
            with backend.active():
                for name, (buffer_shape, value, own, _) in layer._declared_buffers.items():
                    given = None if state is None else state.get(layer._full(name))
                    layer.buffers[name] = (
                        backend.xp.full(buffer_shape, value, dtype=backend.dtype(own or dtype), device=backend.device)
                        if given is None
                        else _first(backend, given, own or dtype)
                    )
        self._lay_flat()
        return self

    def _lay_flat(self) -> None:
        """Move all parameters into one array, and all buffers of a dtype into another, where the library lets them stay views."""
        backend, layers, network = self._home(), list(self.walk()), self._network or _Network()
        network.params, network.buffers = (
            _flat(backend, {layer._full(name): (holder, name) for layer, holder in held for name in holder})
            for held in ([(x, x.params) for x in layers], [(x, x.buffers) for x in layers])
        )
        network.grads = ()

    def plan(self, shape: Shape, path: str = "") -> Shape:
        """Give this layer and all below their paths, check every shape on the way; allocates nothing."""
        self.path, self._declared, self._declared_buffers = path, {}, {}
        try:
            count_taps(getattr(self, "kernel_size", ()))
            output = self.infer(shape)
            count_output(output)
        except PortacnnError as error:
            raise error.at(self.where)
        self.input_shape, self.output_shape = shape, output
        return output

    @contextmanager
    def planned(self, input_shape: Sequence[int]) -> Iterator[Self]:
        """Within it, paths and shapes are those for samples of ``input_shape``; then all is as it was. Allocates nothing."""
        shape = _sample_shape(input_shape, self.where)
        restore = _snapshot(list(self.walk()))
        try:
            self.plan(shape)
            yield self
        finally:
            restore()

    def child_path(self, name: str) -> str:
        """The path of the child called ``name``."""
        return self._full(name)

    def walk(self) -> Iterator["Layer"]:
        """This layer and all below it, parents first, in the order in which they run."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def at_step(self, step: Any, first: Any = 0) -> None:
        """Tell this layer and all below where training is: what dropout draws in the next forward depends on it, and on no more.

        Args:
            step: of training. Left to themselves, layers that draw count their training forwards.
            first: the position in the global batch of the first sample of the next forward: for one of several pieces of a
                batch, in gradient accumulation or on another rank.

        Both are numbers, or 0-dimensional integer arrays on the network's device.
        """
        for layer in self.walk():
            layer.step, layer.first = step, first

    def to(self, device: str | Backend) -> Self:
        """Move everything to another device or backend, in place; gives back itself. Gradients and caches are dropped."""
        backend = resolve(device)
        for layer in self.walk():
            home = layer._home()
            for arrays in (layer.params, layer.buffers):
                for name, array in arrays.items():
                    arrays[name] = backend.asarray(home.to_host(array))
            layer.backend, layer.grads, layer._cache, layer._tables = backend, {}, None, {}
        self._lay_flat()
        return self

    def _home(self) -> Backend:
        if self.backend is None:
            raise StateError("not built yet: call build(input_shape, device=...) on the network first", self.where)
        return self.backend

    # --- state ------------------------------------------------------------------------------------------------------

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def named_parameters(self) -> Named:
        """Every parameter by its path, such as "conv1.weight": the arrays themselves."""
        return Named.of(
            {layer._full(name): array for layer in self.walk() for name, array in layer.params.items()},
            self._network.params if self._network else (),
        )

    def named_gradients(self) -> Named:
        """The gradients of the last backward pass by the path of their parameter: the arrays themselves."""
        return Named.of(
            {
                layer._full(name): layer.grads[name]
                for layer in self.walk()
                for name in layer.params
                if name in layer.grads
            },
            self._network.grads if self._network else (),
        )

    def named_state(self) -> dict[str, Array]:
        """Every parameter and buffer by its path, in PyTorch's order: the arrays themselves."""
        return {
            layer._full(name): array
            for layer in self.walk()
            for arrays in (layer.params, layer.buffers)
            for name, array in arrays.items()
        }

    def named_buffers(self) -> Named:
        """Every buffer, such as a batch norm's running mean, by its path: the arrays themselves."""
        return Named.of(
            {layer._full(name): array for layer in self.walk() for name, array in layer.buffers.items()},
            self._network.buffers if self._network else (),
        )

    def state_dict(self) -> dict[str, HostArray]:
        """Copies of every parameter and buffer as NumPy arrays, by path; names and shapes are PyTorch's."""
        home = self._home()
        return {path: home.to_host(array) for path, array in self.named_state().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Mismatch:
        """Write a ``state_dict``'s values, NumPy arrays, into this layer's own arrays.

        Args:
            state: arrays by path.
            strict: without it, what is missing stays as it is and what is unexpected is left out.

        Returns:
            What was missing and what was unexpected: nothing where it is ``strict``.

        Raises:
            ModelFormatError: lists everything that is missing, unexpected, of another shape or no array; or numbers beyond the
                range of the layer's dtype. Nothing has changed then.
        """
        home, own = self._home(), self.named_state()
        shapes = {path: tuple(array.shape) for path, array in own.items()}
        mismatch = check_state(shapes, state, self.where, strict, self._optional())
        with home.active():
            arrays = {
                path: taken(home, state[path], array.dtype, f"{self.where}: {path}")
                for path, array in own.items()
                if path in state
            }
            for path, array in arrays.items():
                own[path][...] = array
        return mismatch

    def _optional(self) -> set[str]:
        """The paths of buffers that a state may lack."""
        return {
            layer._full(name)
            for layer in self.walk()
            for name, declared in layer._declared_buffers.items()
            if declared.optional
        }

    # --- copies and pickles -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: parameters and buffers as NumPy arrays, the backend by its name.

        Left out are gradients, what was kept for a backward pass, functions that observe the layer, and the network around it:
        a part of a network is copied by itself.
        """
        state = {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}
        if self.backend is not None:
            for kind in ("params", "buffers"):
                state[kind] = {name: self.backend.to_host(array) for name, array in state[kind].items()}
        # Rules that weights were drawn by may be functions that no pickle takes. Building declares all of it anew.
        state["_declared"] = {name: declared._replace(init="default") for name, declared in self._declared.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.grads, self._tables, self._cache, self._network = (
            {},
            {},
            None,
            None,
        )  # old kinds of pickles call no __new__
        vars(self).update(state)
        if self.backend is not None:
            for arrays in (self.params, self.buffers):
                for name, array in arrays.items():
                    arrays[name] = self.backend.asarray(array)
        if self._is_root:
            network = _Network()
            for layer in self.walk():
                layer._network = network
            self._lay_flat()

    def __copy__(self) -> Self:
        """A whole copy: no two layers share arrays or children."""
        return deepcopy(self)

    # --- description ------------------------------------------------------------------------------------------------

    @property
    def parameter_count(self) -> int:
        """How many numbers this layer itself learns, those of its children left out; known once it is planned."""
        return sum(prod(parameter.shape) for parameter in self._declared.values())

    @property
    def least_batch(self) -> int:
        """How many samples a batch must have at least for this layer itself to be trained on it; known once it is planned."""
        return 1

    @property
    def least_predicted(self) -> int:
        """How many samples a batch must have at least for this layer itself to be used out of training."""
        return 1

    def multiply_adds(self) -> int:
        """How often this layer itself multiplies and adds in one sample's forward pass; known once it is planned.

        Counted as is usual in papers: convolutions and linear maps, without their biases. All else is 0.
        """
        return 0

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """What the constructor was called with, defaults left out: what came under ``*``, and the rest by name."""
        args, kwargs = self._made_with
        parameters = signature(type(self)).parameters
        several: list[Any] = []
        named: dict[str, Any] = {}
        for name, value in signature(type(self)).bind(*args, **kwargs).arguments.items():
            if parameters[name].kind is Parameter_.VAR_POSITIONAL:
                several.extend(value)
            elif parameters[name].kind is Parameter_.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return several, named

    def __repr__(self) -> str:
        several, named = self.arguments()
        words = [repr(value) for value in several] + [f"{name}={value!r}" for name, value in named.items()]
        return f"{type(self).__name__}({', '.join(words)})"


def _flat(backend: Backend, places: Mapping[str, tuple[dict[str, Array], str]]) -> tuple[Flat, ...]:
    """Arrays by path, each in the dictionary and under the name where it is to be found: moved into one array for each dtype."""
    if not backend.views_alias:
        return ()
    kinds: dict[str, dict[str, Shape]] = {}
    for path, (holder, name) in places.items():
        kinds.setdefault(dtype_name(holder[name]), {})[path] = tuple(holder[name].shape)
    flats = tuple(Flat(backend, shapes, dtype) for dtype, shapes in kinds.items())
    with backend.active():
        for flat in flats:
            for path, view in flat.views.items():
                holder, name = places[path]
                view[...] = holder[name]
                holder[name] = view
    return flats


def _first(backend: Backend, host: HostArray, dtype: str) -> Array:
    """The first values of a parameter or buffer. Where ``_lay_flat`` will copy them to their place, they need no copy before."""
    if backend.views_alias and str(host.dtype) == dtype:
        return backend.share(host)
    return backend.asarray(host, dtype)


_NOT_COPIED = {"_network", "_tables", "_cache", "grads", "forward", "backward"}

# --- building from a file -------------------------------------------------------------------------------------------

_state: ContextVar[Mapping[str, HostArray] | None] = ContextVar("portacnn_state", default=None)


@contextmanager
def building_from(state: Mapping[str, HostArray]) -> Iterator[None]:
    """Within it, ``build`` takes parameters from ``state`` and draws none; ``state`` must fit before any is allocated."""
    token = _state.set(state)
    try:
        yield
    finally:
        _state.reset(token)


def check_state(
    own: Mapping[str, Shape],
    state: Mapping[str, Any],
    where: str,
    strict: bool = True,
    optional: Container[str] = (),
) -> Mismatch:
    """Compare a state with the shapes of a network's own arrays by path.

    Raises:
        ModelFormatError: with everything that is missing or unexpected, if it is ``strict``, that has another shape, or that is
            no array of numbers.
    """
    if not isinstance(state, Mapping):
        raise ModelFormatError(
            f"expected arrays by path, as state_dict() gives them, got a {type(state).__name__}", where
        )
    mismatch = Mismatch(
        [path for path in own if path not in state and path not in optional],
        [path for path in state if path not in own],
    )
    common = [path for path in own if path in state]
    foreign = {path for path in common if isinstance(getattr(state[path], "dtype", ""), str)}
    problems = {
        "missing": mismatch.missing_keys if strict else [],
        "unexpected": mismatch.unexpected_keys if strict else [],
        "no array (numpy.asarray makes one of numbers)": [
            f"{path}, a {type(state[path]).__name__}"
            for path in own
            if path in state and not hasattr(state[path], "shape")
        ],
        "of another shape": [
            f"{path} {tuple(state[path].shape)} (expected {own[path]})"
            for path in common
            if path not in foreign and hasattr(state[path], "shape") and tuple(state[path].shape) != own[path]
        ],
        "no array that NumPy can hold (convert it to float32)": [
            f"{path} ({state[path].dtype})" for path in common if path in foreign and hasattr(state[path], "dtype")
        ],
    }
    if any(problems.values()):
        named = "; ".join(f"{what}: {listed(paths)}" for what, paths in problems.items() if paths)
        raise ModelFormatError(f"the state does not fit this network. {named}", where)
    return mismatch


def _snapshot(layers: list[Layer]) -> Callable[[], None]:
    """What brings back everything that ``plan`` is about to change."""
    names = ("path", "input_shape", "output_shape", "_declared", "_declared_buffers")
    before = [[getattr(layer, name) for name in names] for layer in layers]

    def restore() -> None:
        for layer, values in zip(layers, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(layer, name, value)

    return restore


def _sample_shape(shape: Sequence[int], where: str) -> Shape:
    try:
        return wholes("input_shape", shape, 1)
    except ArgumentError as error:
        raise ShapeError(f"input_shape must be positive numbers without the batch, got {told(shape)}", where) from error
