"""``Layer``: the interface of every layer, for those who use layers and those who write them.

A layer is made in two steps. Its constructor checks its arguments and allocates nothing. ``build``
then plans the network from the root, and draws the parameters (``building``). A parameter's array
stays the same object until ``to`` or ``replace``: optimizers and ``load_state_dict`` write into it,
and ``backward`` writes into the gradient's.

A layer runs as an op does: ``y, cache = layer.forward(x)``, ``dx = layer.backward(dy, cache)``.
Everything a backward pass needs is in the cache. A forward pass changes nothing of the layer but
running statistics in training. So one layer may stand in several places of a network, and several
threads may run one network.

The class states the interface. The work is done beside it: ``building`` plans and builds,
``replacing`` exchanges a layer, ``state`` loads, copies and pickles, ``network`` stores parameters
and gradients in flat arrays, ``running`` runs a layer in a container.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from inspect import Parameter as Argument
from inspect import signature
from math import prod
from typing import Any, ClassVar, Self

from portacnn.arguments import AnswersKeywords
from portacnn.errors import ArgumentError, StateError
from portacnn.flat import Flat, Named
from portacnn.init import Initializer, rule
from portacnn.layers import building, freezing, network, replacing
from portacnn.layers import state as states
from portacnn.layers.children import Children, check_alias
from portacnn.layers.limits import count_layer
from portacnn.layers.network import Network
from portacnn.layers.passes import moment
from portacnn.layers.running import Handle, run
from portacnn.layers.specs import Buffer, Parameter, Place, Shape
from portacnn.layers.state import Mismatch
from portacnn.runtime import Array, Backend, HostArray, backend_of
from portacnn.selection import Selection
from portacnn.text import shown

__all__ = ["Layer", "Shape"]


class Layer(AnswersKeywords):
    """A piece of a network with parameters of its own, or children that have some.

    A subclass defines ``infer``, ``forward`` and ``backward``. docs/layers.md has an example.

    Attributes:
        path: the layer's place in its network, such as "layer1.0.conv1"; "" for the root. Of
            several places it is the first.
        params, grads, buffers: its own arrays by name; a gradient exists from the first backward
            pass on.
        children: its layers by name, in the order in which they run.
        declared, declared_buffers: the parameters and buffers that ``infer`` declared, by name.
        backend: where the arrays are; None until it is built.
        dtype: of the parameters.
        seed: of ``build``, for layers that draw in a forward pass.
        step: how many training forward passes it has counted, see ``draw``.
        input_shape, output_shape: of one sample at its first place, known once it is built.
        places: all its places, the first one first.
        hooks: the functions that see its outputs, see ``on_output``.
        tied: by name, the parameters that belong to another layer, see ``tie``.
        frozen: names of its own parameters and buffers that training does not change, see
            ``freeze``.
        replaced: by path below this layer, what ``replace`` put where its constructor had made
            another; files describe the network with it.
        revision: of a network: how often it was built, and changed by ``replace``.
        belongs_to: the built network that it is a part of; None if there is none.
        constant_arrays: see ``constants``; by name, library and device.
    """

    known: ClassVar[dict[str, type["Layer"]]] = {}
    """Every class of layers by name, for reading models from files."""

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        """Register a class of layers for files, unless it is abstract."""
        if not abstract and not cls.kind().startswith("_"):
            Layer.known[cls.kind()] = cls

    @classmethod
    def kind(cls) -> str:
        """Return the class's name in files: the bare name for portacnn's own classes, with the
        module for others."""
        own = cls.__module__.partition(".")[0] == "portacnn"
        return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Set the attributes, so that a subclass need not call ``super().__init__()``."""
        count_layer()
        self = super().__new__(cls, *args, **kwargs)
        self._made_with = (args, kwargs)
        self.path = ""
        self.params, self.grads, self.buffers = {}, {}, {}
        self._children = Children()
        self.declared, self.declared_buffers, self.tied = {}, {}, {}
        self.backend, self.dtype = None, "float32"
        self.input_shape = self.output_shape = ()
        self.places, self.hooks, self.replaced = [], (), {}
        self.frozen = frozenset()
        self.seed = self.step = self.revision = 0
        self.belongs_to, self.constant_arrays = None, {}
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
    frozen: frozenset[str]
    backend: Backend | None
    dtype: str
    input_shape: Shape
    output_shape: Shape
    places: list[Place]
    hooks: tuple[Callable[[Array], object], ...]
    replaced: dict[str, "Layer"]
    seed: int
    step: int
    revision: int
    belongs_to: Network | None
    constant_arrays: dict[tuple[str, str, str], Array]

    # --- what a subclass defines ------------------------------------------------------------------

    def infer(self, shape: Shape) -> Shape:
        """Check one sample's shape, ``declare`` the parameters, and return the output's shape."""
        raise NotImplementedError

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        """x (N, *input_shape) -> y (N, *output_shape), and the cache for ``backward``.

        Args:
            train: use this batch's statistics; apply dropout.
            keep: without it the cache is None.
        """
        raise NotImplementedError

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        """The output's gradient and the cache -> the input's gradient; parameters' gradients are
        written into ``grads``.

        Without ``need_dx`` the input's gradient may be None. A container's cache can be used once:
        its contents are freed during the backward pass.
        """
        raise NotImplementedError

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        """Return a function that computes ``self(x)`` for batches of x's shape and dtype, with as
        little overhead for each call as possible.

        It is valid as long as the layer's parameters are the same arrays, and calls no hooks. The
        next call may overwrite the array that it returned.
        """
        return lambda x: self.forward(x, keep=False)[0]

    # --- running it -------------------------------------------------------------------------------

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Return the output alone: a forward pass that keeps nothing."""
        return run(self, x, train, False)[0]

    def on_output(self, function: Callable[[Array], object]) -> Handle:
        """Call ``function(y)`` with each output of this layer from now on, in training and in
        predictions.

        The layer is then not fused with others. The function is called for outputs in a container,
        ``layer(x)``, a prediction or a ``Trainer``, not for a direct call of ``layer.forward``. In
        a step that a backend has captured (``compile_step``) it is called during capture only.

        Returns:
            A handle: ``handle.remove()`` ends it.
        """
        self.hooks = (*self.hooks, function)
        return Handle(self, function)

    # --- what a subclass uses ---------------------------------------------------------------------

    def declare(
        self, name: str, shape: Shape, init: Initializer, *, fan_in: int = 1, fan_out: int = 1
    ) -> None:
        """In ``infer``: declare a parameter of this shape, drawn by this rule."""
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
        """In ``infer``: declare a buffer of this shape, filled with ``value``.

        Args:
            name, shape, value: of the buffer.
            dtype: by default the network's.
            optional: a state without it is complete; loading then leaves the buffer as it is.
        """
        self.declared_buffers[name] = Buffer(shape, value, dtype, optional)

    def adopt(self, name: str, layer: "Layer") -> None:
        """In a container's constructor: make ``layer`` the child called ``name``."""
        self.children.put(name, layer)

    def kept(self, cache: Any) -> Any:
        """In a ``backward`` that passes its cache to no op: return the cache. Raises StateError if
        it is None."""
        if cache is None:
            raise StateError("expected a cache, got None; call forward with keep=True", self.where)
        return cache

    def constants(self, name: str, values: Callable[[], Any], dtype: str, like: Array) -> Array:
        """Return an array of constants, such as indices, in like's library and on its device. It is
        sent there once.

        Constants are not part of the layer's state. A captured step may read them, so they live as
        long as the layer.

        Args:
            values: returns them as (nested) sequences of numbers.
        """
        backend = backend_of(like)
        key = name, backend.name, backend.place(like.device)
        if key not in self.constant_arrays:
            self.constant_arrays[key] = backend.xp.asarray(
                values(), dtype=backend.dtype(dtype), device=like.device
            )
        return self.constant_arrays[key]

    def draw(self) -> tuple[Any, Any, str]:
        """In a training ``forward``: return (step, first, path) for the next draw, see
        ``ops.dropout``.

        They follow from ``at_step``. Without one, the layer counts its draws.
        """
        now = moment()
        if now is not None:
            return now.draw(self)
        self.step += 1
        return self.step - 1, 0, self.path

    def add_grads(self, **grads: Array | None) -> None:
        """In ``backward``: add gradients of parameters, by name. None, and names of no parameter,
        are left out.

        The first gradient of a backward pass is written into the parameter's gradient array,
        further ones are added to it.
        """
        own = {
            name: grad for name, grad in grads.items() if grad is not None and name in self.params
        }
        if own:
            network.add_grads(self, own)

    def tie(self, name: str, other: "Layer", other_name: str | None = None) -> None:
        """Before the network is built: make the parameter ``name`` the parameter ``other_name`` of
        another layer.

        The two are one array, which the network has at the other layer's path; their gradients are
        added.
        """
        owner, owner_name = other.tied.get(other_name or name, (other, other_name or name))
        if self.backend is not None or owner is self:
            raise StateError(
                "a parameter is tied to another layer's, before the network is built", self.where
            )
        self.tied[name] = owner, owner_name

    # --- building ---------------------------------------------------------------------------------

    def build(
        self,
        input_shape: Sequence[int],
        *,
        device: str | Backend | None = None,
        dtype: str = "float32",
        seed: int | None = None,
    ) -> Self:
        """Check all shapes for samples of ``input_shape``, draw the parameters on ``device``, and
        return the layer.

        Args:
            input_shape: of one sample, without the batch: (C, H, W).
            device: see ``portacnn.resolve``.
            dtype: "float32" or "float64".
            seed: the same seed draws the same bits on every backend; None takes a new one.

        Raises:
            ShapeError: names the layer's path, the expected and the received shape. Nothing has
                changed then.
            BackendError, ArgumentError: for the other arguments.
        """
        building.build(self, input_shape, device, dtype, seed)
        return self

    def plan(self, shape: Shape, path: str = "") -> Shape:
        """Set the paths of this layer and all below it, and check every shape; return the output's
        shape. Allocates nothing.

        A layer in several places has the path of the first one; the same parameters must fit in the
        others.
        """
        return building.plan(self, shape, path)

    @contextmanager
    def planned(self, input_shape: Sequence[int]) -> Iterator[Self]:
        """Within it, paths and shapes are those for samples of ``input_shape``. Allocates
        nothing."""
        with building.planned(self, input_shape):
            yield self

    def to(self, device: str | Backend) -> Self:
        """Move everything to another device or backend, in place, and return the layer. Gradients
        are dropped."""
        building.move(self, device)
        return self

    def is_built(self) -> bool:
        """Return whether it has its arrays."""
        return self.backend is not None

    def check_built(self) -> None:
        """Raise StateError if it is not built, and so has no parameters yet."""
        if self.backend is None:
            self.home  # noqa: B018 (raises)

    @property
    def home(self) -> Backend:
        """Return the backend that it is on. Raises StateError if it is not built."""
        if self.backend is None:
            raise StateError(
                "not built yet: call build(input_shape, device=...) on the network first",
                self.where,
            )
        return self.backend

    @property
    def is_root(self) -> bool:
        """Return whether it is the root of a built network."""
        return self.belongs_to is not None and self.belongs_to.root() is self

    # --- the tree ---------------------------------------------------------------------------------

    @property
    def children(self) -> Children:
        """Return its layers by name, in the order in which they run. Changing them raises
        StateError once the network is made."""
        return self._children

    @children.setter
    def children(self, layers: Mapping[str, "Layer"]) -> None:
        self._children.update()  # raises StateError if they are sealed
        self._children = Children(layers)

    def walk(self) -> Iterator["Layer"]:
        """Yield this layer and all below it, parents first, in the order in which they run; each
        once, even if it has several places."""
        seen, waiting = set(), [self]
        while waiting:
            layer = waiting.pop()
            if layer not in seen:
                seen.add(layer)
                yield layer
                waiting.extend(reversed(layer.children.values()))

    def __getattr__(self, name: str) -> Any:
        """Return the child of this name: ``model.fc``. A child that is called as an attribute of
        the class is read from ``children`` alone."""
        children = vars(self).get("_children", {})  # none yet while a pickle is read
        if name in children:
            return children[name]
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Raises StateError if it would bypass the children once the network is
        made."""
        if not name.startswith("_"):
            held = self._sealed_layer(name)
            if held is not None and value is held:
                return
            if held is not None or (isinstance(value, Layer) and self._children.sealed):
                check_alias(self, name, held, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._sealed_layer(name) is not None:
            raise StateError(
                f"the layer {name!r} cannot be removed; make a new network without it", self.where
            )
        super().__delattr__(name)

    def _sealed_layer(self, name: str) -> "Layer | None":
        """Return the layer that this name stands for, as an attribute or a child, if the children
        are sealed."""
        own = vars(self)
        children = own.get("_children")
        if children is None or not children.sealed:
            return None
        held = own.get(name, children.get(name))
        return held if isinstance(held, Layer) else None

    @property
    def where(self) -> str:
        """Return ``conv2 (Conv2d)``, for error messages."""
        return f"{shown(self.path)} ({type(self).__name__})" if self.path else type(self).__name__

    def full_name(self, name: str) -> str:
        """Return the path of its parameter, buffer or child called ``name``: "conv1.weight"."""
        return f"{self.path}.{name}" if self.path else name

    def child_path(self, name: str) -> str:
        """Return the path of the child called ``name``."""
        return self.full_name(name)

    def layer_at(self, path: str) -> "Layer":
        """Return the layer below this one at a path. Raises ArgumentError if there is none."""
        if path == self.path:
            return self
        chain, name = replacing.find(self, path)
        return chain[-1][0].children[name]

    def replace(self, path: str, layer: "Layer") -> "Layer":
        """Put ``layer`` in the place of the one at ``path``, in a network that is built or not;
        return the one that was there.

        All other layers keep their weights. The new one's are drawn from the network's seed and its
        path. A layer that was built before (one of this network inside the new layer, or one that
        was taken out of another network) keeps its own. All shapes are checked first; an error
        changes nothing. Gradients are dropped. Parameters may become other arrays, so an existing
        ``Trainer`` raises StateError. An optimizer continues with parameters of the same path and
        shape, and raises for others.

        Args:
            path: of a layer below this one: "fc", "layer1.0.conv1".
            layer: of any class.

        Raises:
            ArgumentError: there is no layer at this path, or ``layer`` is not a layer.
            ShapeError: the network does not fit together with it. StateError: it is a part of
                another network.
        """
        if self.belongs_to is not None and not self.is_root:
            if (root := self.belongs_to.root()) is None:
                raise StateError("the network that it is a part of is deleted", self.where)
            return root.replace(self.full_name(path), layer)
        if not isinstance(layer, Layer):
            raise ArgumentError(f"expected a layer for {path!r}, got {layer!r}", self.where)
        return replacing.replace(self, path, layer)

    # --- training only a part ---------------------------------------------------------------------

    def freeze(self, what: Selection = "*") -> Self:
        """Freeze parameters: training does not change them any more. Return the layer.

            model.freeze()  # all of it
            model.unfreeze("fc")  # but its head

        A frozen parameter gets no gradient, no update and no weight decay. A backward pass ends at
        the first layer that has something to train, and training keeps nothing for the layers
        before it. A batch norm whose running statistics are selected (by "bn1" or "bn1.*", not by
        "bn1.weight") keeps them, and normalizes with them in training too. Dropout is not affected.
        A parameter that several layers share is frozen by any of its paths. Files hold what is
        frozen.

        Args:
            what: patterns of paths, as in ``optim.selector``: "features.*", "conv1", "bn*"; or a
                function of (path, array). Only what lies in this layer is selected. The default is
                all of it.

        Raises:
            StateError: if it is not built.
            ArgumentError: if a pattern matches nothing. Nothing has changed then.
        """
        freezing.change(self, what, True)
        return self

    def unfreeze(self, what: Selection = "*") -> Self:
        """End the effect of ``freeze`` for these parameters and statistics. Return the layer.

        Arguments and errors are those of ``freeze``.
        """
        freezing.change(self, what, False)
        return self

    # --- state ------------------------------------------------------------------------------------

    def own_params(self) -> dict[str, Array]:
        """Return its parameters without those that belong to another layer (``tie``)."""
        return (
            {name: array for name, array in self.params.items() if name not in self.tied}
            if self.tied
            else self.params
        )

    def named_parameters(self) -> Named:
        """Return every parameter by its path, such as "conv1.weight": the arrays themselves."""
        return self._named(
            lambda layer: layer.own_params(), self.belongs_to.params if self.belongs_to else ()
        )

    def named_gradients(self) -> Named:
        """Return the gradients of the last backward pass by the path of their parameter: the arrays
        themselves."""
        return self._named(
            lambda layer: {
                name: layer.grads[name] for name in layer.own_params() if name in layer.grads
            },
            self.belongs_to.grads if self.belongs_to else (),
        )

    def named_buffers(self) -> Named:
        """Return every buffer, such as a batch norm's running mean, by its path: the arrays
        themselves."""
        return self._named(
            lambda layer: layer.buffers, self.belongs_to.buffers if self.belongs_to else ()
        )

    def _named(
        self, arrays_of: Callable[["Layer"], Mapping[str, Array]], flats: tuple[Flat, ...]
    ) -> Named:
        return Named.of(
            {
                layer.full_name(name): array
                for layer in self.walk()
                for name, array in arrays_of(layer).items()
            },
            flats,
        )

    def named_state(self) -> dict[str, Array]:
        """Return every parameter and buffer by its path, in PyTorch's order: the arrays
        themselves."""
        return {
            layer.full_name(name): array
            for layer in self.walk()
            for arrays in (layer.own_params(), layer.buffers)
            for name, array in arrays.items()
        }

    def state_dict(self) -> dict[str, HostArray]:
        """Return copies of every parameter and buffer as NumPy arrays, by path; names and shapes
        are PyTorch's."""
        home = self.home
        return {path: home.to_host(array) for path, array in self.named_state().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Mismatch:
        """Write the values of a ``state_dict``, NumPy arrays, into this layer's own arrays.

        Args:
            state: arrays by path.
            strict: without it, what is missing stays as it is and what is unexpected is left out.

        Returns:
            The paths that were missing and those that were unexpected; none if ``strict``.

        Raises:
            ModelFormatError: lists everything that is missing, unexpected, of another shape or not
                an array; or values beyond the range of the layer's dtype. Nothing has changed then.
        """
        return states.load_state(self, state, strict)

    def __getstate__(self) -> dict[str, Any]:
        return states.pickled(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        states.unpickle(self, state)

    def __copy__(self) -> Self:
        """Return a deep copy: no two layers share arrays or children."""
        return deepcopy(self)

    # --- description ------------------------------------------------------------------------------

    @property
    def parameter_count(self) -> int:
        """Return how many trainable values this layer itself has, without its children; known once
        it is planned."""
        return sum(
            prod(spec.shape) for name, spec in self.declared.items() if name not in self.tied
        )

    @property
    def least_batch(self) -> int:
        """Return how many samples a batch must have at least for training this layer itself; known
        once it is planned."""
        return 1

    @property
    def least_predicted(self) -> int:
        """Return how many samples a batch must have at least outside training."""
        return 1

    def multiply_adds(self) -> int:
        """Return how many multiply-adds this layer itself computes for one sample's forward pass;
        known once it is planned.

        Convolutions and linear maps count, without their biases, as is usual in papers. All else is
        0.
        """
        return 0

    def is_described_by_children(self) -> bool:
        """Return whether ``arguments`` names its present children; else they are those that its
        constructor makes."""
        return False

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the constructor's arguments without defaults: those of ``*args``, and the others
        by name."""
        args, kwargs = self._made_with
        parameters = signature(type(self)).parameters
        several: list[Any] = []
        named: dict[str, Any] = {}
        for name, value in signature(type(self)).bind(*args, **kwargs).arguments.items():
            if parameters[name].kind is Argument.VAR_POSITIONAL:
                several.extend(value)
            elif parameters[name].kind is Argument.VAR_KEYWORD:
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
