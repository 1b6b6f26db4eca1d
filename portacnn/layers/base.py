"""``Layer``: the interface of every layer, for users and for authors of layers.

A layer is made in two steps. Its constructor checks its arguments and allocates nothing. ``build``
then plans the network from the root and draws the parameters (``building``). A parameter's array
stays the same object until ``to`` or ``replace``: optimizers and ``load_state_dict`` write into it,
and ``backward`` writes into the gradient's array.

A layer runs like an op: ``y, cache = layer.forward(x)``, ``dx = layer.backward(dy, cache)``. The
cache holds everything the backward pass needs. A forward pass changes no state of the layer except
running statistics in training. So a network may use one layer in several places, and several
threads may run one network.

This module holds the interface. Other modules do the work: ``building`` plans and builds,
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
from portacnn.layers.running import Handle, Prepared, apart, first_result, run
from portacnn.layers.specs import Buffer, Parameter, Place, Shape
from portacnn.layers.state import Mismatch
from portacnn.ops.dispatch import no_cache
from portacnn.ops.fused import Bounds, add_clip
from portacnn.runtime import Array, Backend, HostArray, backend_of
from portacnn.selection import Selection
from portacnn.text import shown

__all__ = ["Layer", "Shape"]


class Layer(AnswersKeywords):
    """A part of a network, with its own parameters or with child layers.

    A subclass defines ``infer``, ``forward`` and ``backward``. docs/layers.md has an example.

    Attributes:
        path: the layer's place in its network, such as "layer1.0.conv1"; "" for the root. A layer
            used in several places has the path of the first.
        params, grads, buffers: the layer's own arrays by name. ``grads`` is empty before the first
            backward pass.
        children: the child layers by name, in the order in which they run.
        declared, declared_buffers: the parameters and buffers that ``infer`` declared, by name.
        backend: the backend of the arrays; None until the layer is built.
        dtype: of the parameters.
        seed: of ``build``; used by layers that draw random values in a forward pass.
        step: the number of training forward passes counted, see ``draw``.
        input_shape, output_shape: of one sample, at the layer's first place; set by ``build``.
        places: all places of the layer, in the order in which they run.
        hooks: the functions called with its outputs, see ``on_output``.
        tied: by name, the parameters that belong to another layer, see ``tie``.
        frozen: the names of the layer's own frozen parameters and buffers, see ``freeze``.
        replaced: by path below this layer, the layers that ``replace`` put instead of layers made
            by the constructor; model files store them.
        revision: of a network: how often it was built or changed by ``replace``.
        belongs_to: the built network that the layer is part of, or None.
        constant_arrays: see ``constants``; by name, library and device.
    """

    known: ClassVar[dict[str, type["Layer"]]] = {}
    """All layer classes by name, used to read models from files."""

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        """Register the class under its name, for model files, unless it is abstract.

        A class with a ``forward`` of its own does not inherit the fast paths that were written for
        its base class's.
        """
        kind = cls.kind()
        private = kind.startswith("_") and "." not in kind  # "__main__.Scale" is a user's
        if not abstract and not private:
            Layer.known[kind] = cls
        for name in ("prepare", "joined", "prepare_joined"):
            makers = [kind for kind in cls.__mro__ if {"forward", name} & vars(kind).keys()]
            if name not in vars(makers[0]):
                setattr(cls, name, vars(Layer)[name])

    @classmethod
    def kind(cls) -> str:
        """Return the class's name in model files: the bare name for portacnn's own classes, the
        full name with the module for others."""
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

    # --- methods that a subclass defines ----------------------------------------------------------

    def infer(self, shape: Shape) -> Shape:
        """Check the shape of one sample, ``declare`` the parameters, and return the output
        shape."""
        raise NotImplementedError

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        """Return y (N, *output_shape) for x (N, *input_shape), and the cache for ``backward``.

        Args:
            train: use the batch's own statistics and apply dropout.
            keep: if False, the cache is None.
        """
        raise NotImplementedError

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        """Return the input's gradient, and write the parameters' gradients into ``grads``.

        If ``need_dx`` is False, the input's gradient may be None. A container's cache can be used
        once, because the backward pass frees its contents.
        """
        raise NotImplementedError

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        """Return a fast function that computes ``self(x)`` for batches of x's shape and dtype.

        The function stays valid as long as the layer's parameters are the same arrays. It calls no
        hooks. A call may overwrite the array that the previous call returned.
        """
        return lambda x: self.forward(x, keep=False)[0]

    def joined(self, parts: list[Array], bounds: Bounds) -> Array:
        """Return self(x) + residual within the bounds, for parts [x, residual] in inference.

        A layer that ends with a convolution computes it as one op. Call it through ``run_joined``.
        """
        return apart(self, parts, bounds)

    def prepare_joined(self, parts: list[Array], bounds: Bounds) -> Callable[[list[Array]], Array]:
        """Return a fast function that computes ``joined``, as ``prepare`` does for ``forward``."""
        x, residual = parts
        function = self.prepare(x)
        y = add_clip([first_result(function, x), residual], bounds)
        return Prepared(lambda parts: add_clip([function(parts[0]), parts[1]], bounds), y)

    # --- running it -------------------------------------------------------------------------------

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Return the output of a forward pass without a cache."""
        return run(self, x, train, False)[0]

    def on_output(self, function: Callable[[Array], object]) -> Handle:
        """Register a forward hook: call ``function(y)`` with each output of this layer.

        A layer with hooks is not fused with others. The hook runs in containers, ``layer(x)``,
        predictions and training, but not on a direct call of ``layer.forward``. In a step captured
        by a backend (``compile_step``) it runs during capture only.

        Returns:
            A handle; ``handle.remove()`` removes the hook.
        """
        self.hooks = (*self.hooks, function)
        if self.belongs_to is not None:
            self.belongs_to.changes += 1
        return Handle(self, function)

    # --- methods that a subclass calls ------------------------------------------------------------

    def declare(
        self, name: str, shape: Shape, init: Initializer, *, fan_in: int = 1, fan_out: int = 1
    ) -> None:
        """Declare a parameter with this shape and initializer. Call it in ``infer``."""
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
        """Declare a buffer of this shape, filled with ``value``. Call it in ``infer``.

        Args:
            name, shape, value: of the buffer.
            dtype: default: the network's.
            optional: whether a state to load may lack it; the buffer then keeps its value.
        """
        self.declared_buffers[name] = Buffer(shape, value, dtype, optional)

    def adopt(self, name: str, layer: "Layer") -> None:
        """Make ``layer`` the child called ``name``. Call it in a container's constructor."""
        self.children.put(name, layer)

    def kept(self, cache: Any) -> Any:
        """Return the cache; raises StateError if it is None. For a ``backward`` that passes its
        cache to no op."""
        if cache is None:
            raise no_cache(cache, "forward", self.where)
        return cache

    def constants(self, name: str, values: Callable[[], Any], dtype: str, like: Array) -> Array:
        """Return an array of constants, such as indices, in like's library and on its device. The
        values are transferred once.

        Constants are not part of the layer's state. A captured step may read them, so they exist as
        long as the layer.

        Args:
            values: a function that returns the constants as (nested) sequences of numbers.
        """
        backend = backend_of(like)
        key = name, backend.name, backend.place(like.device)
        if key not in self.constant_arrays:
            self.constant_arrays[key] = backend.xp.asarray(
                values(), dtype=backend.dtype(dtype), device=like.device
            )
        return self.constant_arrays[key]

    def draw(self) -> tuple[Any, Any, str]:
        """Return (step, first, path) for the next random draw, see ``ops.dropout``. Call it in a
        training ``forward``.

        The values come from ``at_step``. Outside of it, the layer counts its draws.
        """
        now = moment()
        if now is not None:
            return now.draw(self)
        self.step += 1
        return self.step - 1, 0, self.path

    def add_grads(self, **grads: Array | None) -> None:
        """Add gradients of parameters, by name. Call it in ``backward``. None and names of no
        parameter are ignored.

        The first gradient in a backward pass overwrites the parameter's gradient array; further
        ones are added to it.
        """
        own = {
            name: grad for name, grad in grads.items() if grad is not None and name in self.params
        }
        if own:
            network.add_grads(self, own)

    def is_frozen(self, name: str) -> bool:
        """Return whether a parameter of this layer is frozen: its gradient is not needed."""
        return freezing.is_frozen(self, name)

    def frozen_grads(self) -> dict[str, bool]:
        """In ``backward``: return {"need_dweight": False}, and so on, for those of the layer's own
        parameters that are frozen: options of an op's backward function."""
        return {f"need_d{name}": False for name in self.params if self.is_frozen(name)}

    def tie(self, name: str, other: "Layer", other_name: str | None = None) -> None:
        """Share a parameter: use ``other_name`` of another layer as ``name``. Call it before the
        network is built.

        Both layers use one array, listed under the other layer's path. Their gradients are added.
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
        return the layer itself.

        Args:
            input_shape: of one sample, without the batch: (C, H, W).
            device: see ``portacnn.resolve``.
            dtype: "float32" or "float64".
            seed: the same seed draws the same bits on every backend; None draws a new seed.

        Raises:
            ShapeError: the shapes do not fit; names the layer's path, the expected and the received
                shape. Nothing is changed.
            BackendError, ArgumentError: another argument is invalid.
        """
        building.build(self, input_shape, device, dtype, seed)
        return self

    def plan(self, shape: Shape, path: str = "") -> Shape:
        """Set the paths of this layer and all below it, check every shape, and return the output
        shape. Allocates nothing.

        A layer used in several places has the path of the first one. Its parameters must fit all of
        them.
        """
        return building.plan(self, shape, path)

    @contextmanager
    def planned(self, input_shape: Sequence[int]) -> Iterator[Self]:
        """Set paths and shapes for samples of ``input_shape`` within the context. Allocates
        nothing."""
        with building.planned(self, input_shape):
            yield self

    def to(self, device: str | Backend) -> Self:
        """Move all arrays to another device or backend, in place, and return the layer. Gradients
        are dropped."""
        building.move(self, device)
        return self

    def is_built(self) -> bool:
        """Return whether the layer is built."""
        return self.backend is not None

    def check_built(self) -> None:
        """Raise StateError if the layer is not built."""
        if self.backend is None:
            self.home  # noqa: B018 (raises)

    @property
    def home(self) -> Backend:
        """Return the layer's backend. Raises StateError if the layer is not built."""
        if self.backend is None:
            raise StateError(
                "not built yet: call build(input_shape, device=...) on the network first",
                self.where,
            )
        return self.backend

    @property
    def is_root(self) -> bool:
        """Return whether the layer is the root of a built network."""
        return self.belongs_to is not None and self.belongs_to.root() is self

    # --- the tree ---------------------------------------------------------------------------------

    @property
    def children(self) -> Children:
        """Return the child layers by name, in the order in which they run. Changing the dictionary
        raises StateError after it was sealed."""
        return self._children

    @children.setter
    def children(self, layers: Mapping[str, "Layer"]) -> None:
        self._children.update()  # raises StateError if they are sealed
        self._children = Children(layers)

    def walk(self) -> Iterator["Layer"]:
        """Yield this layer and all layers below it, parents first, in the order in which they run.
        Each is yielded once, even if it has several places."""
        seen, waiting = set(), [self]
        while waiting:
            layer = waiting.pop()
            if layer not in seen:
                seen.add(layer)
                yield layer
                waiting.extend(reversed(layer.children.values()))

    def __getattr__(self, name: str) -> Any:
        """Return the child called ``name``: ``model.fc``. If the class has an attribute of that
        name, use ``children`` instead."""
        children = vars(self).get("_children", {})  # none yet while a pickle is read
        if name in children:
            return children[name]
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Raises StateError if that would bypass sealed children."""
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
        """Return the layer that is the attribute or child called ``name``; None if the children are
        not sealed."""
        own = vars(self)
        children = own.get("_children")
        if children is None or not children.sealed:
            return None
        held = own.get(name, children.get(name))
        return held if isinstance(held, Layer) else None

    @property
    def where(self) -> str:
        """Return the path and class, such as "conv2 (Conv2d)", for error messages."""
        return f"{shown(self.path)} ({type(self).__name__})" if self.path else type(self).__name__

    def full_name(self, name: str) -> str:
        """Return the path of the parameter, buffer or child called ``name``: "conv1.weight"."""
        return f"{self.path}.{name}" if self.path else name

    def child_path(self, name: str) -> str:
        """Return the path of the child called ``name``."""
        return self.full_name(name)

    def layer_at(self, path: str) -> "Layer":
        """Return the layer at a path below this one. Raises ArgumentError if there is none."""
        if path == self.path:
            return self
        chain, name = replacing.find(self, path)
        return chain[-1][0].children[name]

    def replace(self, path: str, layer: "Layer") -> "Layer":
        """Replace the layer at ``path`` by ``layer``; return the old layer. The network may be
        built or not.

        All other layers keep their weights. The new layer's weights are drawn from the network's
        seed and its path. A layer that was built before keeps its weights: a layer of this network
        inside the new one, or one taken out of another network. All shapes are checked first; an
        error changes nothing. Gradients are dropped. Parameters may become other arrays, so an
        existing ``Trainer`` raises StateError. An optimizer continues with parameters of the same
        path and shape, and raises for others.

        Args:
            path: of a layer below this one: "fc", "layer1.0.conv1".
            layer: of any class.

        Raises:
            ArgumentError: no layer has this path, or ``layer`` is not a layer.
            ShapeError: the new layer does not fit into the network.
            StateError: the new layer is part of another network.
        """
        if self.belongs_to is not None and not self.is_root:
            if (root := self.belongs_to.root()) is None:
                raise StateError("the network of this layer no longer exists", self.where)
            return root.replace(self.full_name(path), layer)
        if not isinstance(layer, Layer):
            raise ArgumentError(f"expected a layer for {path!r}, got {layer!r}", self.where)
        return replacing.replace(self, path, layer)

    # --- freezing ---------------------------------------------------------------------------------

    def freeze(self, what: Selection = "*") -> Self:
        """Freeze parameters, so that training does not change them; return the layer.

            model.freeze()  # all of it
            model.unfreeze("fc")  # but its head

        A frozen parameter gets no gradient, no update and no weight decay. The backward pass stops
        at the first layer with trainable parameters, and the layers before it keep no cache. A
        batch norm whose running statistics are selected (by "bn1" or "bn1.*", not by "bn1.weight")
        does not update them and normalizes with them in training too. Dropout is not affected. A
        shared parameter is frozen by any of its paths. Model files store which parameters are
        frozen.

        Args:
            what: patterns of paths, as in ``optim.selector``: "features.*", "conv1", "bn*"; or a
                function of (path, array). Only this layer and the layers below it are selected.
                Default: all parameters and statistics.

        Raises:
            StateError: the layer is not built.
            ArgumentError: a pattern matches nothing. Nothing is changed.
        """
        freezing.change(self, what, True)
        return self

    def unfreeze(self, what: Selection = "*") -> Self:
        """Undo ``freeze`` for these parameters and statistics; return the layer.

        Arguments and errors as for ``freeze``.
        """
        freezing.change(self, what, False)
        return self

    # --- state ------------------------------------------------------------------------------------

    def own_params(self) -> dict[str, Array]:
        """Return the layer's parameters without those tied to another layer (``tie``)."""
        return (
            {name: array for name, array in self.params.items() if name not in self.tied}
            if self.tied
            else self.params
        )

    def named_parameters(self) -> Named:
        """Return every parameter by its path, such as "conv1.weight": the arrays, not copies."""
        return self._named(
            lambda layer: layer.own_params(), self.belongs_to.params if self.belongs_to else ()
        )

    def named_gradients(self) -> Named:
        """Return the gradients of the last backward pass, by parameter path: the arrays, not
        copies."""
        return self._named(
            lambda layer: {
                name: layer.grads[name] for name in layer.own_params() if name in layer.grads
            },
            self.belongs_to.grads if self.belongs_to else (),
        )

    def named_buffers(self) -> Named:
        """Return every buffer, such as a batch norm's running mean, by its path: the arrays, not
        copies."""
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
        """Return every parameter and buffer by its path, in PyTorch's order: the arrays, not
        copies."""
        return {
            layer.full_name(name): array
            for layer in self.walk()
            for arrays in (layer.own_params(), layer.buffers)
            for name, array in arrays.items()
        }

    def state_dict(self) -> dict[str, HostArray]:
        """Return copies of all parameters and buffers as NumPy arrays, by path. Names and shapes
        are PyTorch's."""
        home = self.home
        return {path: home.to_host(array) for path, array in self.named_state().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Mismatch:
        """Copy the values of a ``state_dict`` (NumPy arrays) into this layer's arrays.

        Args:
            state: arrays by path.
            strict: if False, missing arrays keep their values and unexpected ones are ignored.

        Returns:
            The missing and the unexpected paths; both empty if ``strict``.

        Raises:
            ModelFormatError: the state does not fit; lists every array that is missing, unexpected,
                of a wrong shape or not an array, or whose values exceed the range of the layer's
                dtype. Nothing is changed.
        """
        return states.load_state(self, state, strict)

    def __getstate__(self) -> dict[str, Any]:
        return states.pickled(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        states.unpickle(self, state)

    def __copy__(self) -> Self:
        """Return a deep copy, which shares no arrays or children with this layer."""
        return deepcopy(self)

    # --- description ------------------------------------------------------------------------------

    @property
    def parameter_count(self) -> int:
        """Return the number of parameters of this layer without its children. Available after
        planning."""
        return sum(
            prod(spec.shape) for name, spec in self.declared.items() if name not in self.tied
        )

    @property
    def least_batch(self) -> int:
        """Return the minimum batch size for training this layer, without its children. Available
        after planning."""
        return 1

    @property
    def least_predicted(self) -> int:
        """Return the minimum batch size outside training."""
        return 1

    def multiply_adds(self) -> int:
        """Return the multiply-adds of one sample's forward pass in this layer, without its
        children. Available after planning.

        Convolutions and linear layers count, without their biases, as is usual in papers. All other
        layers return 0.
        """
        return 0

    def is_described_by_children(self) -> bool:
        """Return whether ``arguments`` includes the current children. If False, the constructor
        makes the children itself."""
        return False

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments passed to the constructor: the ``*args``, and the others by name.
        Omitted arguments are not included."""
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
