"""``Layer``: what every layer is. State in plain dictionaries, a ``forward`` and a ``backward``
that a person can read.

A layer is made in two steps. Its constructor checks its numbers and allocates nothing. ``build``
then walks the tree from the root: it gives every layer its path, checks each shape against the
next, and only when all fits draws the parameters, each from the seed and its own path. A
parameter's array stays the same object until ``to`` or ``replace``: optimizers and
``load_state_dict`` write into it, and so does ``backward`` into the gradient's.

A layer runs as an op does: ``y, cache = layer.forward(x)``, ``dx = layer.backward(dy, cache)``. All
that a backward pass needs is in the cache; a forward pass leaves nothing on the layer but running
statistics in training. So one layer may stand in several places of a network, and several threads
may run one network.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from inspect import Parameter as Parameter_
from inspect import signature
from math import prod
from typing import Any, ClassVar, NamedTuple, Self
from weakref import ref

from portacnn.arguments import told, wholes
from portacnn.errors import ArgumentError, ModelFormatError, PortacnnError, ShapeError, StateError
from portacnn.flat import Flat, Named
from portacnn.init import Initializer, rule
from portacnn.layers.limits import count_layer, count_output, count_taps
from portacnn.layers.passes import Gradients, current_gradients, is_recomputing, moment
from portacnn.runtime import (
    Array,
    Backend,
    HostArray,
    backend_of,
    describe,
    dtype_name,
    resolve,
    taken,
)
from portacnn.seeds import check_seed, generator
from portacnn.text import listed, quoted, shown

Shape = tuple[int, ...]
"""The shape of one sample: (C, H, W), or (F,)."""


class Parameter(NamedTuple):
    """What ``infer`` says of a parameter before there is one."""

    shape: Shape
    init: Initializer
    fan_in: int
    fan_out: int


class Buffer(NamedTuple):
    """What ``infer`` says of a buffer: state that is no parameter, and starts with the same number
    everywhere."""

    shape: Shape
    value: float
    dtype: str | None  # None for the network's
    optional: bool  # whether a state without it is whole: then it stays as it is


class Children(dict[str, "Layer"]):
    """A layer's children by name. Once they are ``sealed`` they stay as they are, since what runs
    was made of them."""

    sealed = False

    def _change(self, *args: Any, **kwargs: Any) -> Any:
        raise StateError(
            "the layers of a network are exchanged by network.replace(path, layer); to add or "
            "remove some, make a new network "
            "and give it the weights with load_state_dict(state, strict=False)"
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


class Place(NamedTuple):
    """One of the places where a layer stands in its network, and the shapes of one sample there."""

    path: str
    input_shape: Shape
    output_shape: Shape


class Handle:
    """What ``Layer.on_output`` gives: ``remove`` ends the calls."""

    def __init__(self, layer: "Layer", function: Callable[[Array], object]) -> None:
        self._layer, self._function, self._removed = layer, function, False

    def remove(self) -> None:
        """Call the function no more."""
        hooks = list(self._layer.hooks)
        # once: the same function may have been given several times, each with its own handle
        if self._function in hooks and not self._removed:
            hooks.remove(self._function)
        self._layer.hooks, self._removed = tuple(hooks), True


class Mismatch(NamedTuple):
    """Paths that a state lacks, and paths in it that a network does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Network:
    """What all layers of a built network share. They do not know its root, which knows them: they
    would keep each other alive.

    Attributes:
        params, buffers, grads: what the arrays lie in, where they do; gradients from the first
            backward pass on.
    """

    def __init__(self) -> None:
        self.params: tuple[Flat, ...] = ()
        self.buffers: tuple[Flat, ...] = ()
        self.grads: tuple[Flat, ...] = ()
        self.root: Callable[[], Layer | None] = lambda: None  # a weak reference


class Layer:
    """A piece of a network with parameters of its own, or children that have some.

    A subclass writes ``infer``, ``forward`` and ``backward``. docs/layers.md has an example.

    Attributes:
        path: the layer's place in its network, such as "layer1.0.conv1"; "" for the root. Of
            several places it is the first.
        params, grads, buffers: its own arrays by name; a gradient exists from the first backward
            pass on.
        children: its layers by name, in the order in which they run.
        declared, declared_buffers: what ``infer`` has said of its parameters and buffers, by name.
        backend: where it lives; None until it is built.
        seed: what ``build`` was given, for layers that draw while they run.
        step: how many training forward passes it has counted, see ``draw``.
        input_shape, output_shape: of one sample at its first place, known once it is built.
        places: all its places, the first one first.
        hooks: the functions that see its outputs, see ``on_output``.
        tied: by name, the parameters that are another layer's, see ``tie``.
        revision: of a network: how often it was built, and changed by ``replace``.
    """

    known: ClassVar[dict[str, type["Layer"]]] = {}
    """Every class of layers by name, for reading models from files."""

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        """Enter a class of layers; not those that others only derive from, which no file may ask
        for."""
        if not abstract and not cls.kind().startswith("_"):
            Layer.known[cls.kind()] = cls

    @classmethod
    def kind(cls) -> str:
        """The class's name in files: portacnn's own go by their bare name, others by their module's
        too."""
        own = cls.__module__.partition(".")[0] == "portacnn"
        return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        count_layer()
        self = super().__new__(cls)
        self._made_with = (args, kwargs)
        self.path = ""
        self.params, self.grads, self.buffers = {}, {}, {}
        self._children = Children()
        self.declared, self.declared_buffers, self.tied = {}, {}, {}
        self.backend, self.dtype = None, "float32"
        self.input_shape = self.output_shape = ()
        self.places, self.hooks, self.replaced = [], (), {}
        self.seed = self.step = self.revision = 0
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
    declared: dict[str, Parameter]
    declared_buffers: dict[str, Buffer]
    tied: dict[str, tuple["Layer", str]]
    backend: Backend | None
    dtype: str
    input_shape: Shape
    output_shape: Shape
    places: list[Place]
    hooks: tuple[Callable[[Array], object], ...]
    # by path from here: what took the place of layers that its constructor made
    replaced: dict[str, "Layer"]
    seed: int
    step: int
    revision: int
    _tables: dict[tuple[str, str, str], Array]  # by name, library and device
    _network: "_Network | None"  # the one it was built in
    _is_root: bool

    @property
    def children(self) -> Children:
        """Its layers by name, in the order in which they run. Raises StateError on changing them
        once the network is made."""
        return self._children

    @children.setter
    def children(self, layers: Mapping[str, "Layer"]) -> None:
        self._children.update()  # which raises StateError where they are sealed
        self._children = Children(layers)

    # --- what a subclass writes -------------------------------------------------------------------

    def infer(self, shape: Shape) -> Shape:
        """Check one sample's shape, ``declare`` the parameters it asks for, and give the output's
        shape."""
        raise NotImplementedError

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        """x (N, *input_shape) -> y (N, *output_shape), and the cache: what ``backward`` needs, None
        without ``keep``.

        Args:
            train: use this batch's statistics, drop out.
            keep: keep what ``backward`` needs.
        """
        raise NotImplementedError

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        """The gradient of a forward pass's output, and its cache -> that of its input; parameters'
        gradients go to ``grads``.

        Without ``need_dx`` the input's gradient may be left out (None). A container's cache can be
        used once: what is in it is let go of on the way.
        """
        raise NotImplementedError

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        """A function that is ``self(x)`` for one batch after another just like x, made cheap to
        call where there is a way to.

        It holds as long as the layer's parameters are the same arrays, and calls no hooks. What it
        returns may lie in memory that its next call uses again.
        """
        return lambda x: self.forward(x, keep=False)[0]

    # --- running it -------------------------------------------------------------------------------

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """The output alone: a forward pass that keeps nothing."""
        return run(self, x, train, False)[0]

    def on_output(self, function: Callable[[Array], object]) -> Handle:
        """Call ``function(y)`` with each output of this layer from now on, in training and in
        predictions.

        The layer then runs by itself, where it would be one op together with others. It is called
        for what a container, ``layer(x)``, a prediction or a ``Trainer`` runs, not for
        ``layer.forward`` called by hand; a step that a backend has recorded (``compile_step``)
        calls it while it is recorded only.

        Returns:
            A handle: ``handle.remove()`` ends it.
        """
        self.hooks = (*self.hooks, function)
        return Handle(self, function)

    # --- what a subclass uses ---------------------------------------------------------------------

    def declare(
        self, name: str, shape: Shape, init: Initializer, *, fan_in: int = 1, fan_out: int = 1
    ) -> None:
        """In ``infer``: this layer will have a parameter of this shape, drawn by this rule."""
        rule(init)
        self.declared[name] = Parameter(shape, init, fan_in, fan_out)

    def declare_buffer(
        self,
        name: str,
        shape: Shape,
        value: float,
        dtype: str | None = None,
        *,
        optional: bool = False,
    ) -> None:
        """In ``infer``: this layer will have a buffer of this shape, full of ``value``.

        Args:
            name, shape, value: of the buffer.
            dtype: by default the network's.
            optional: a state without it is whole: loading leaves the buffer as it is.
        """
        self.declared_buffers[name] = Buffer(shape, value, dtype, optional)

    def adopt(self, name: str, layer: "Layer") -> None:
        """In a container's constructor: make ``layer`` the child called ``name``."""
        dict.__setitem__(self.children, name, layer)

    def kept(self, cache: Any) -> Any:
        """In ``backward``, where no op looks at it first: the cache itself. Raises StateError if
        nothing was kept."""
        if cache is None:
            raise StateError(
                "nothing was kept for backward; call forward with keep=True", self.where
            )
        return cache

    def constants(self, name: str, values: Callable[[], Any], dtype: str, like: Array) -> Array:
        """Constants of the layer's own, such as indices, in like's library and on its device: sent
        there once.

        They are no part of the layer's state. A captured step may read them, so they stay as long
        as the layer does.

        Args:
            values: gives them as (nested) sequences of numbers.
        """
        backend = backend_of(like)
        key = name, backend.name, backend.place(like.device)
        if key not in self._tables:
            self._tables[key] = backend.xp.asarray(
                values(), dtype=backend.dtype(dtype), device=like.device
            )
        return self._tables[key]

    def draw(self) -> tuple[Any, Any, str]:
        """In a training ``forward``: step, first and path of what is drawn now (see
        ``ops.dropout``).

        They follow from ``at_step``. Without one, the layer counts its draws.
        """
        now = moment()
        if now is not None:
            return now.draw(self)
        self.step += 1
        return self.step - 1, 0, self.path

    def add_grads(self, **grads: Array | None) -> None:
        """In ``backward``: give parameters their gradients, by name; None, and names of no
        parameter, are left out.

        The first one of a backward pass is written into the gradient's lasting array, further ones
        are added to it.
        """
        own = {
            name: grad for name, grad in grads.items() if grad is not None and name in self.params
        }
        if not own:
            return
        current = current_gradients()
        with self.home.active():
            for name, grad in own.items():
                owner, key = self.tied.get(name, (self, name))
                owner._add_grad(key, grad, current)

    def _add_grad(self, name: str, grad: Array, current: Gradients | None) -> None:
        place, arrays = (self, name), self.grads
        if current is not None and current.own is not None:
            if place in current.own:
                current.own[place] += grad
            else:  # not the array that came: it may lie in a workspace
                current.own[place] = self.home.xp.asarray(grad, copy=True)
            return
        if current is not None and place in current.written:
            arrays[name] += grad
            return
        if name not in arrays:
            arrays[name] = self._room_for_grad(name)
        arrays[name][...] = grad
        if current is not None:
            current.written.add(place)

    def _room_for_grad(self, name: str) -> Array:
        """An array for this parameter's gradient: beside those of the others, where the parameters
        lie so."""
        network, path, param = self._network or _Network(), self.full_name(name), self.params[name]
        for number, flat in enumerate(network.params):
            if flat.views.get(path) is param:
                network.grads = network.grads or tuple(flat.like() for flat in network.params)
                return network.grads[number].views[path]
        return self.home.xp.empty_like(param)

    def tie(self, name: str, other: "Layer", other_name: str | None = None) -> None:
        """Before it is built: let the parameter ``name`` be the parameter ``other_name`` of another
        layer of the network.

        The two are one array, which the network has at the other layer's path; their gradients are
        added up.
        """
        owner, owner_name = other.tied.get(other_name or name, (other, other_name or name))
        if self.backend is not None or owner is self:
            raise StateError(
                "a parameter is tied to another layer's, before the network is built", self.where
            )
        self.tied[name] = owner, owner_name

    # --- building ---------------------------------------------------------------------------------

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
        """Check all shapes for samples of ``input_shape``, then draw the parameters on ``device``;
        return the layer.

        Args:
            input_shape: of one sample, without the batch: (C, H, W).
            device: see ``portacnn.resolve``.
            dtype: "float32" or "float64".
            seed: draws are the same bits on every backend for the same seed; None takes a fresh
                one.

        Raises:
            ShapeError: the layer's path, what it expected and what came; nothing has been changed
                then.
            BackendError, ArgumentError: for the other arguments.
        """
        if _not_building.get():
            return self
        if dtype not in ("float32", "float64"):
            raise ArgumentError(f'dtype must be "float32" or "float64", got {dtype!r}')
        shape = _sample_shape(input_shape, self.where)
        count_output(shape)
        backend, seed = resolve(device), check_seed(seed)
        layers = list(self.walk())
        network = self._network if self._is_root else None
        for layer in layers:
            layer._check_free(network)
        restore = _snapshot(layers)
        try:
            self.plan(shape)
            _check_ties(layers)
            state = _state.get()
            if state is not None:
                declared = {
                    layer.full_name(name): spec.shape
                    for layer in layers
                    for specs in (layer.declared, layer.declared_buffers)
                    for name, spec in specs.items()
                    if name not in layer.tied
                }
                check_state(declared, state, self.where, optional=self._optional())
        except PortacnnError:
            restore()
            raise
        network = self._own_network()
        for layer in layers:
            layer.seed, layer.step = seed, 0
            layer._settle(network, backend, dtype, *layer._drawn(backend, dtype, seed, state))
        self._lay_flat()
        self.revision += 1
        return self

    def _own_network(self) -> "_Network":
        """What its layers share, with this layer as the root."""
        network = self._network if self._is_root and self._network else _Network()
        network.root, self._is_root = ref(self), True
        return network

    def _check_free(self, network: "_Network | None") -> None:
        """Raise StateError if it is a part of another network than this one."""
        if self._network is not None and self._network is not network:
            raise StateError(
                "was built as a part of another network; give this one a layer of its own, or take "
                "it out of the other: "
                "network.replace(path, another_layer)",
                self.where,
            )

    def _drawn(
        self, backend: Backend, dtype: str, seed: int, state: Mapping[str, HostArray] | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """First values of the parameters and buffers that it has declared: those of ``state``, or
        drawn."""
        params, buffers = {}, {}
        for name, (shape, init, fan_in, fan_out) in self.declared.items():
            if name in self.tied:
                continue
            path = self.full_name(name)
            drawn = (
                rule(init)(generator(seed, path), shape, fan_in, fan_out)
                if state is None
                else state[path]
            )
            if tuple(drawn.shape) != shape:
                raise ArgumentError(
                    f"the initializer of {name} gave {drawn.shape}, not {shape}", self.where
                )
            params[name] = _first(backend, drawn, dtype)
        with backend.active():
            for name, (shape, value, own, _) in self.declared_buffers.items():
                given = None if state is None else state.get(self.full_name(name))
                buffers[name] = (
                    backend.xp.full(
                        shape, value, dtype=backend.dtype(own or dtype), device=backend.device
                    )
                    if given is None
                    else _first(backend, given, own or dtype)
                )
        return params, buffers

    def _settle(
        self,
        network: "_Network",
        backend: Backend,
        dtype: str,
        params: dict[str, Array],
        buffers: dict[str, Array],
    ) -> None:
        """Take these arrays, as a part of this network."""
        self._network, self.backend, self.dtype, self.children.sealed = (
            network,
            backend,
            dtype,
            True,
        )
        self.params, self.buffers, self.grads, self._tables = params, buffers, {}, {}
        self._is_root = network.root() is self

    def _lay_flat(self) -> None:
        """Move all parameters into one array, and all buffers of a dtype into another, where the
        library lets them stay views."""
        backend, layers, network = self.home, list(self.walk()), self._network or _Network()
        network.params, network.buffers = (
            _flat(
                backend,
                {
                    layer.full_name(name): (holder, name)
                    for layer, holder, names in held
                    for name in names
                },
            )
            for held in (
                [(x, x.params, x.own_params()) for x in layers],
                [(x, x.buffers, x.buffers) for x in layers],
            )
        )
        network.grads = ()
        for layer in layers:
            for name, (owner, owner_name) in layer.tied.items():
                layer.params[name] = owner.params[owner_name]

    def plan(self, shape: Shape, path: str = "") -> Shape:
        """Give this layer and all below their paths, check every shape on the way; allocates
        nothing.

        A layer that stands in several places gets its path in the first one; in the others the same
        parameters must fit.
        """
        planned = _planned.get()
        if planned is None:
            token = _planned.set(set())
            try:
                return self.plan(shape, path)
            finally:
                _planned.reset(token)
        if self in planned:
            return self._plan_again(shape, path)
        planned.add(self)
        self.path, self.declared, self.declared_buffers, self.places = path, {}, {}, []
        output = self._inferred(shape)
        self.input_shape, self.output_shape = shape, output
        self.places.append(Place(path, shape, output))
        return output

    def _inferred(self, shape: Shape) -> Shape:
        try:
            count_taps(getattr(self, "kernel_size", ()))
            output = self.infer(shape)
            count_output(output)
        except PortacnnError as error:
            raise error.at(self.where)
        return output

    def _plan_again(self, shape: Shape, path: str) -> Shape:
        """``plan`` in one more place."""
        # layers in layers, each in two places, would be more than anybody wants to run
        count_layer()
        first = self.declared, self.declared_buffers
        self.declared, self.declared_buffers = {}, {}
        try:
            output = self._inferred(shape)
            needed = [
                {name: spec.shape for specs in both for name, spec in specs.items()}
                for both in (first, (self.declared, self.declared_buffers))
            ]
        finally:
            self.declared, self.declared_buffers = first
        if needed[0] != needed[1]:
            raise ShapeError(
                f"stands in several places; for samples {shape} at {path!r} it would have "
                f"{needed[1]}, it has {needed[0]}",
                self.where,
            )
        self.places.append(Place(path, shape, output))
        return output

    @contextmanager
    def planned(self, input_shape: Sequence[int]) -> Iterator[Self]:
        """Within it, paths and shapes are those for samples of ``input_shape``; then all is as it
        was. Allocates nothing."""
        shape = _sample_shape(input_shape, self.where)
        restore = _snapshot(list(self.walk()))
        try:
            self.plan(shape)
            yield self
        finally:
            restore()

    def child_path(self, name: str) -> str:
        """The path of the child called ``name``."""
        return self.full_name(name)

    def walk(self) -> Iterator["Layer"]:
        """This layer and all below it, parents first, in the order in which they run; each once,
        however many places it has."""
        seen, waiting = set(), [self]
        while waiting:
            layer = waiting.pop()
            if layer not in seen:
                seen.add(layer)
                yield layer
                waiting.extend(reversed(layer.children.values()))

    def to(self, device: str | Backend) -> Self:
        """Move everything to another device or backend, in place, and return the layer. Gradients
        are dropped."""
        backend = resolve(device)
        for layer in self.walk():
            home = layer.home
            for arrays in (layer.params, layer.buffers):
                for name, array in arrays.items():
                    if name not in layer.tied:
                        arrays[name] = backend.asarray(home.to_host(array))
            layer.backend, layer.grads, layer._tables = backend, {}, {}
        self._lay_flat()
        return self

    @property
    def home(self) -> Backend:
        """Where it lives. Raises StateError if it is not built."""
        if self.backend is None:
            raise StateError(
                "not built yet: call build(input_shape, device=...) on the network first",
                self.where,
            )
        return self.backend

    def check_built(self) -> None:
        """Raise StateError if it is not built, and so has no parameters yet."""
        if self.backend is None:
            self.home  # noqa: B018 (which says so)

    # --- changing a network -----------------------------------------------------------------------

    def replace(self, path: str, layer: "Layer") -> "Layer":
        """Put ``layer`` where the one at ``path`` is, in a network that is built or not yet;
        returns the one that was there.

        All other layers keep their weights. The new one's are drawn from the network's seed and its
        path, but what was built before (a layer of this network inside the new one, or one that was
        taken out of another network) keeps its own. All shapes are checked first, and nothing is
        changed on an error. Gradients are dropped; parameters may become other arrays, so a
        ``Trainer`` of before raises StateError. An optimizer goes on with what has the same path
        and shape, and raises for others.

        Args:
            path: of a layer below this one: "fc", "layer1.0.conv1".
            layer: of any class.

        Raises:
            ArgumentError: there is no layer at this path, or ``layer`` is none.
            ShapeError: the network does not fit together with it. StateError: it is a part of
                another network.
        """
        if self._network is not None and not self._is_root:
            if (root := self._network.root()) is None:
                raise StateError("the network that it is a part of is deleted", self.where)
            return root.replace(self.full_name(path), layer)
        if not isinstance(layer, Layer):
            raise ArgumentError(f"expected a layer for {path!r}, got {layer!r}", self.where)
        chain, name = self._find(path)
        holder, before = chain[-1][0], list(self.walk())
        old, coming = holder.children[name], list(layer.walk())
        if any(above in coming for above, _ in chain):
            raise ArgumentError("a layer cannot be put into itself", layer.where)
        for inner in coming:
            inner._check_free(self._network)
        restore = _snapshot([*before, *coming])
        drawn = {}
        holder.adopt(name, layer)
        try:
            if self.backend is not None:
                self.plan(self.input_shape)
                after = list(self.walk())
                _check_ties(after)
                drawn = {
                    new: new._drawn(self.backend, self.dtype, self.seed, None)
                    for new in after
                    if not new.is_built()
                }
                for kept in after:
                    if kept.is_built():
                        kept._check_fits()
                        if kept._network is not self._network:
                            drawn[kept] = kept._brought(self.backend, self.dtype)
        except BaseException:
            holder.adopt(name, old)
            restore()
            raise
        gone = set(before) - set(self.walk())
        for one in gone:
            one._leave()
        for inner, arrays in drawn.items():
            inner.seed = self.seed
            inner._settle(self._own_network(), self.home, self.dtype, *arrays)
        if self.backend is not None:
            for inner in self.walk():
                inner.grads = {}
            self._lay_flat()
        for inner in self.walk():  # attributes that name it, too
            if old in gone:
                vars(inner).update(
                    {alias: layer for alias, value in vars(inner).items() if value is old}
                )
        _note_replaced(chain, path, layer)
        self.revision += 1
        return old

    def layer_at(self, path: str) -> "Layer":
        """The layer below this one at a path. Raises ArgumentError if there is none."""
        if path == self.path:
            return self
        chain, name = self._find(path)
        return chain[-1][0].children[name]

    def is_built(self) -> bool:
        """Whether it has its arrays."""
        return self.backend is not None

    def _find(self, path: str) -> tuple[list[tuple["Layer", str]], str]:
        """The layers from this one down to that whose child has the path, each with its own, and
        the child's name."""
        waiting: list[list[tuple[Layer, str]]] = [[(self, self.path)]]
        seen = set()
        while waiting:
            chain = waiting.pop()
            holder, own = chain[-1]
            if (holder, own) in seen:
                continue
            seen.add((holder, own))
            held, holder.path = holder.path, own  # it may have none yet, or stand in several places
            try:
                paths = {name: holder.child_path(name) for name in holder.children}
                names = {name: holder.full_name(name) for name in holder.children}
            finally:
                holder.path = held
            for name, found in paths.items():
                # some add no segment: they can be named all the same
                if path in (found or None, names[name]):
                    return chain, name
            below = (
                (name, found)
                for name, found in paths.items()
                if not found or path.startswith(f"{found}.")
            )
            waiting.extend(
                [*chain, (holder.children[name], found)] for name, found in reversed(list(below))
            )
        known = [layer.path for layer in self.walk() if layer.path] or list(self.children)
        raise ArgumentError(
            f"there is no layer at {quoted(path)}; there are {listed(known, 32)}", self.where
        )

    def _check_fits(self) -> None:
        """Raise ShapeError if its arrays are not those that it has declared."""
        for specs, arrays in ((self.declared, self.params), (self.declared_buffers, self.buffers)):
            needed = {name: spec.shape for name, spec in specs.items()}
            has = {name: tuple(array.shape) for name, array in arrays.items()}
            if needed != has:
                raise ShapeError(
                    f"keeps its weights, {has}, and would have to have {needed} after the change; "
                    "replace it as well",
                    self.where,
                )

    def _brought(self, backend: Backend, dtype: str) -> tuple[dict[str, Array], dict[str, Array]]:
        """Copies of its parameters and buffers on another backend."""
        params = {
            name: backend.asarray(self.home.to_host(p), dtype)
            for name, p in self.own_params().items()
        }
        buffers = {
            name: backend.asarray(self.home.to_host(b), self.declared_buffers[name].dtype or dtype)
            for name, b in self.buffers.items()
        }
        return params, buffers

    def _leave(self) -> None:
        """Belong to no network any more, with arrays of its own."""
        self._network, self._is_root, self.grads, self.tied = None, False, {}, {}
        if self.backend is not None:
            with self.backend.active():
                for arrays in (self.params, self.buffers):
                    for name, array in arrays.items():
                        arrays[name] = self.backend.xp.asarray(array, copy=True)

    # --- state ------------------------------------------------------------------------------------

    def full_name(self, name: str) -> str:
        """The path of its parameter, buffer or child called ``name``: "conv1.weight"."""
        return f"{self.path}.{name}" if self.path else name

    def own_params(self) -> dict[str, Array]:
        """Its parameters but for those that are another layer's (``tie``)."""
        return (
            {name: array for name, array in self.params.items() if name not in self.tied}
            if self.tied
            else self.params
        )

    def named_parameters(self) -> Named:
        """Every parameter by its path, such as "conv1.weight": the arrays themselves."""
        return Named.of(
            {
                layer.full_name(name): array
                for layer in self.walk()
                for name, array in layer.own_params().items()
            },
            self._network.params if self._network else (),
        )

    def named_gradients(self) -> Named:
        """The gradients of the last backward pass by the path of their parameter: the arrays
        themselves."""
        return Named.of(
            {
                layer.full_name(name): layer.grads[name]
                for layer in self.walk()
                for name in layer.own_params()
                if name in layer.grads
            },
            self._network.grads if self._network else (),
        )

    def named_state(self) -> dict[str, Array]:
        """Every parameter and buffer by its path, in PyTorch's order: the arrays themselves."""
        return {
            layer.full_name(name): array
            for layer in self.walk()
            for arrays in (layer.own_params(), layer.buffers)
            for name, array in arrays.items()
        }

    def named_buffers(self) -> Named:
        """Every buffer, such as a batch norm's running mean, by its path: the arrays themselves."""
        return Named.of(
            {
                layer.full_name(name): array
                for layer in self.walk()
                for name, array in layer.buffers.items()
            },
            self._network.buffers if self._network else (),
        )

    def state_dict(self) -> dict[str, HostArray]:
        """Copies of every parameter and buffer as NumPy arrays, by path; names and shapes are
        PyTorch's."""
        home = self.home
        return {path: home.to_host(array) for path, array in self.named_state().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Mismatch:
        """Write a ``state_dict``'s values, NumPy arrays, into this layer's own arrays.

        Args:
            state: arrays by path.
            strict: without it, what is missing stays as it is and what is unexpected is left out.

        Returns:
            What was missing and what was unexpected: nothing where it is ``strict``.

        Raises:
            ModelFormatError: lists everything that is missing, unexpected, of another shape or no
                array; or numbers beyond the range of the layer's dtype. Nothing has changed then.
        """
        home, own = self.home, self.named_state()
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
            layer.full_name(name)
            for layer in self.walk()
            for name, declared in layer.declared_buffers.items()
            if declared.optional
        }

    # --- copies and pickles -----------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: parameters and buffers as NumPy arrays, the backend by its
        name.

        Left out are gradients, what was kept for a backward pass, functions that observe the layer,
        and the network around it: a part of a network is copied by itself.
        """
        state = {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}
        if self.backend is not None:
            for kind in ("params", "buffers"):
                state[kind] = {
                    name: self.backend.to_host(array) for name, array in state[kind].items()
                }
        # Rules that weights were drawn by may be functions that no pickle takes. Building declares
        # all of it anew.
        state["declared"] = {
            name: declared._replace(init="default") for name, declared in self.declared.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # old kinds of pickles call no __new__
        self.grads, self.hooks, self._tables, self._network = {}, (), {}, None
        vars(self).update(state)
        if self.backend is not None:
            for arrays in (self.params, self.buffers):
                for name, array in arrays.items():
                    arrays[name] = self.backend.asarray(array)
        if self._is_root:
            network = self._own_network()
            for layer in self.walk():
                layer._network = network
            self._lay_flat()

    def __copy__(self) -> Self:
        """A whole copy: no two layers share arrays or children."""
        return deepcopy(self)

    # --- description ------------------------------------------------------------------------------

    @property
    def parameter_count(self) -> int:
        """How many numbers this layer itself learns, those of its children left out; known once it
        is planned."""
        return sum(
            prod(spec.shape) for name, spec in self.declared.items() if name not in self.tied
        )

    @property
    def least_batch(self) -> int:
        """How many samples a batch must have at least for this layer itself to be trained on it;
        known once it is planned."""
        return 1

    @property
    def least_predicted(self) -> int:
        """How many samples a batch must have at least for this layer itself to be used out of
        training."""
        return 1

    def multiply_adds(self) -> int:
        """How often this layer itself multiplies and adds in one sample's forward pass; known once
        it is planned.

        Counted as is usual in papers: convolutions and linear maps, without their biases. All else
        is 0.
        """
        return 0

    def is_described_by_children(self) -> bool:
        """Whether ``arguments`` names its children as they are now; else they are those that its
        constructor makes."""
        return False

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """What the constructor was called with, defaults left out: what came under ``*``, and the
        rest by name."""
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
        words = [repr(value) for value in several] + [
            f"{name}={value!r}" for name, value in named.items()
        ]
        return f"{type(self).__name__}({', '.join(words)})"


def _flat(backend: Backend, places: Mapping[str, tuple[dict[str, Array], str]]) -> tuple[Flat, ...]:
    """Arrays by path, each in the dictionary and under the name where it is to be found: moved into
    one array for each dtype."""
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
    """The first values of a parameter or buffer. Where ``_lay_flat`` will copy them to their place,
    they need no copy before."""
    if backend.views_alias and str(host.dtype) == dtype:
        return backend.share(host)
    return backend.asarray(host, dtype)


def run(layer: Layer, x: Any, train: bool, keep: bool) -> tuple[Array, Any]:
    """A layer's ``forward`` as containers call it: errors say where they happened and what came,
    hooks see the output."""
    try:
        y, cache = layer.forward(x, train=train, keep=keep)
    except PortacnnError as error:
        if not layer.children:
            error.at(layer.where, over=True)
            if "input " not in error.message and not isinstance(x, list):
                error.message += f" (input {describe(x)})"
        raise
    if layer.hooks and not is_recomputing():
        for hook in layer.hooks:
            hook(y)
    return y, cache


class Trail(list[tuple[Any, Any]]):
    """A container's cache: what ran, in its order, each with its own cache. A backward pass takes
    them out from the end."""

    used = False

    @staticmethod
    def taken(cache: Any, where: str) -> "Trail":
        """The cache that a container's ``backward`` was given. Raises StateError if it was used, or
        nothing was kept."""
        if not isinstance(cache, Trail):
            raise StateError(
                f"expected what forward kept for backward (keep=True), got {type(cache).__name__}",
                where,
            )
        if cache.used:
            raise StateError(
                "this cache has been used: each backward pass needs a forward pass of its own",
                where,
            )
        cache.used = True
        return cache


_planned: ContextVar[set[Layer] | None] = ContextVar("portacnn_planned", default=None)
"""The layers that have their path already, while a network is planned."""


def _check_ties(layers: list[Layer]) -> None:
    """Raise unless each tied parameter is that of another layer here, of the shape that it would
    have itself."""
    for layer in layers:
        for name, (owner, owner_name) in layer.tied.items():
            if (
                name not in layer.declared
                or owner not in layers
                or owner_name not in owner.declared
            ):
                raise StateError(
                    f"{name} is tied to {owner_name} of {owner.where}, and they are not two "
                    "parameters of this network",
                    layer.where,
                )
            shapes = layer.declared[name].shape, owner.declared[owner_name].shape
            if shapes[0] != shapes[1]:
                raise ShapeError(
                    f"{name} would be {shapes[0]}; {owner.full_name(owner_name)}, to which it is "
                    f"tied, is {shapes[1]}",
                    layer.where,
                )


_NOT_COPIED = {"_network", "_tables", "hooks", "grads", "forward", "backward"}

# --- building from a file -------------------------------------------------------------------------

_not_building: ContextVar[bool] = ContextVar("portacnn_not_building", default=False)


@contextmanager
def not_building() -> Iterator[None]:
    """Within it ``build`` does nothing: a model that builds itself can be changed first."""
    token = _not_building.set(True)
    try:
        yield
    finally:
        _not_building.reset(token)


_state: ContextVar[Mapping[str, HostArray] | None] = ContextVar("portacnn_state", default=None)


@contextmanager
def building_from(state: Mapping[str, HostArray]) -> Iterator[None]:
    """Within it, ``build`` takes parameters from ``state`` and draws none; ``state`` must fit
    before any is allocated."""
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
        ModelFormatError: with everything that is missing or unexpected, if it is ``strict``, that
            has another shape, or that is no array of numbers.
    """
    if not isinstance(state, Mapping):
        raise ModelFormatError(
            f"expected arrays by path, as state_dict() gives them, got a {type(state).__name__}",
            where,
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
            if path not in foreign
            and hasattr(state[path], "shape")
            and tuple(state[path].shape) != own[path]
        ],
        "no array that NumPy can hold (convert it to float32)": [
            f"{path} ({state[path].dtype})"
            for path in common
            if path in foreign and hasattr(state[path], "dtype")
        ],
    }
    if any(problems.values()):
        named = "; ".join(f"{what}: {listed(paths)}" for what, paths in problems.items() if paths)
        raise ModelFormatError(f"the state does not fit this network. {named}", where)
    return mismatch


def _snapshot(layers: list[Layer]) -> Callable[[], None]:
    """What brings back everything that ``plan`` is about to change."""
    names = ("path", "input_shape", "output_shape", "places", "declared", "declared_buffers")
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
        raise ShapeError(
            f"input_shape must be positive numbers without the batch, got {told(shape)}", where
        ) from error


def _note_replaced(chain: list[tuple[Layer, str]], path: str, layer: Layer) -> None:
    """Have descriptions know of a replacement: where a class's own constructor made its layers, it
    notes what is another now."""
    maker, own = next(
        (pair for pair in chain if not pair[0].is_described_by_children()), (None, "")
    )
    if maker is None or any(above in maker.replaced.values() for above, _ in chain):
        return
    path = path.removeprefix(f"{own}.") if own else path
    for other in [
        other for other in maker.replaced if other == path or other.startswith(f"{path}.")
    ]:
        del maker.replaced[other]
    maker.replaced[path] = layer
