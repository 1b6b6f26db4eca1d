"""What an output depends on: its gradient for the input and for a layer, saliency and Grad-CAM.

Each works on images in batches, changes neither the model nor its gradients, and returns arrays on
the model's device.

Notation: N images, K outputs (classes), C channels, H/W the spatial axes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from portacnn.arguments import whole
from portacnn.errors import ArgumentError, LabelError, ShapeError, StateError
from portacnn.layers import Layer, gradients_of
from portacnn.layers.passes import GradientWatch, Reached, watching
from portacnn.layers.running import run
from portacnn.models.inputs import image_count
from portacnn.models.model import Model
from portacnn.runtime import Array, backend_of

BATCH = 32
"""Images of one forward and backward pass, by default: its caches stay in memory meanwhile."""
Classes = int | Sequence[int] | Array | None


def input_gradient(
    model: Model, x: Array, classes: Classes = None, batch_size: int = BATCH
) -> Array:
    """Return the gradient of one output of each image for the network's input, (N, C, H, W).

        >>> import numpy as np, portacnn
        >>> net = portacnn.SimpleConvNet((1, 8, 8), {"filter_size": 3}, device="cpu", seed=0)
        >>> portacnn.models.input_gradient(net, np.zeros((2, 1, 8, 8), "float32"), 3).shape
        (2, 1, 8, 8)

    Of uint8 images it is the gradient for the preprocessed pixels. Batch norm uses its running
    statistics, dropout passes everything on, as in ``predict``. If a class has a map as output,
    as in segmentation, it is the gradient of the map's sum.

    Args:
        x: images, see ``Model.accept``.
        classes: the output of each image: one index for all, or integers (N,). None takes the
            largest output of each.
        batch_size: images per pass.

    Raises:
        ArrayError, ShapeError, NotFiniteError: as for ``predict``.
        LabelError: if classes do not fit the images or the outputs.
    """

    def gradient(images: Array, chosen: Sequence[int] | None) -> Array:
        y, cache = run(model, images, False, True)
        dx = model.backward(_selected(model, y, chosen), cache, need_dx=True)
        assert dx is not None
        return dx

    return _joined(model, _by_batch(model, x, classes, batch_size, gradient))


def layer_gradient(
    model: Model, x: Array, path: str, classes: Classes = None, batch_size: int = BATCH
) -> tuple[Array, Array]:
    """Return a layer's output for images x, (N, *output_shape of the layer), and the gradient of
    one output of each image for it, of the same shape.

    Args:
        path: of the layer, as in ``summary``. Of a layer in several places it may be any of their
            paths.
        x, classes, batch_size: see ``input_gradient``.

    Raises:
        ArgumentError: there is no layer at this path.
        StateError: the network does not run the layer as a layer of its own.
        ArrayError, ShapeError, NotFiniteError, LabelError: as for ``input_gradient``.
    """
    layer = model.layer_at(path)
    if layer is model:
        raise ArgumentError("path must be that of a layer inside the model", model.where)
    paths = [place.path for place in layer.places]
    place = paths.index(path) if path in paths else 0

    def gradient(images: Array, chosen: Sequence[int] | None) -> tuple[Array, Array]:
        watch = GradientWatch(layer, place)
        with watching(watch):
            y, cache = run(model, images, False, True)
            if watch.output is None:
                raise StateError(
                    "its output cannot be seen: the layer around it does not run it as a layer",
                    layer.where,
                )
            try:
                model.backward(_selected(model, y, chosen), cache, need_dx=True)
            except Reached as reached:
                return watch.output, reached.args[0]
        xp = model.home.xp  # the output does not depend on the layer
        return watch.output, xp.zeros_like(watch.output)

    pairs = _by_batch(model, x, classes, batch_size, gradient)
    features, gradients = zip(*pairs, strict=True)
    return _joined(model, features), _joined(model, gradients)


def saliency(model: Model, x: Array, classes: Classes = None, batch_size: int = BATCH) -> Array:
    """Return how much each pixel changes one output of each image: the largest absolute gradient
    over the channels, (N, H, W) (Simonyan et al., 2013).

    Arguments and errors as for ``input_gradient``.
    """
    home = model.home
    gradient = input_gradient(model, x, classes, batch_size)
    with home.active():
        return home.xp.max(home.xp.abs(gradient), axis=1)


def grad_cam(
    model: Model,
    x: Array,
    path: str | None = None,
    classes: Classes = None,
    batch_size: int = BATCH,
) -> Array:
    """Return where a layer sees one output of each image, (N, H, W) of the layer's output, from 0
    to 1 (Grad-CAM, Selvaraju et al., 2017).

    Each channel of the layer is weighted by the mean of its gradient; of the sum, what is above 0
    is kept, and divided by the image's largest value.

    Args:
        path: of a layer with output (C, H, W). None takes the last one before the network's
            features become a vector.
        x, classes, batch_size: see ``input_gradient``.

    Raises:
        ShapeError: if the layer has no such output.
        ArgumentError, StateError, ArrayError, NotFiniteError, LabelError: as for
            ``layer_gradient``.
    """
    path = last_map(model) if path is None else path
    shape = model.layer_at(path).output_shape
    if len(shape) < 2:
        raise ShapeError(
            f"Grad-CAM needs a layer with an output (C, H, W), got {shape}; take an earlier layer",
            model.layer_at(path).where,
        )
    features, gradient = layer_gradient(model, x, path, classes, batch_size)
    home = model.home
    xp, axes = home.xp, tuple(range(2, features.ndim))
    with home.active():
        weights = xp.mean(gradient, axis=axes, keepdims=True)
        seen = xp.sum(weights * features, axis=1)
        seen = xp.where(seen > 0.0, seen, xp.zeros_like(seen))
        most = xp.max(seen, axis=tuple(range(1, seen.ndim)), keepdims=True)
        return seen / xp.where(most > 0.0, most, xp.ones_like(most))


def last_map(model: Model) -> str:
    """Return the path of the last layer whose output has spatial axes of more than one cell, the
    default of ``grad_cam``. Raises ShapeError if there is none."""
    model.check_built()
    maps = [path for layer in model.walk() if (path := _map_at(layer)) and layer is not model]
    if not maps:
        raise ShapeError("the network has no layer with an output (C, H, W)", model.where)
    return maps[-1]


def _map_at(layer: Layer) -> str | None:
    """Return the path of a layer without inner layers if its output is a map."""
    shape = layer.output_shape
    several = len(shape) > 1 and any(extent > 1 for extent in shape[1:])
    return layer.path if several and not layer.children and layer.places else None


def _by_batch(
    model: Model,
    x: Array,
    classes: Classes,
    batch_size: int,
    function: Callable[[Array, Sequence[int] | None], Any],
) -> list[Any]:
    """Return ``function(batch, classes)`` of each batch of images."""
    found = []
    model.check_built()
    size = whole("batch_size", batch_size, 1)
    x = model.received(x)
    model.kept_as(x)
    count = image_count(x)
    if count == 0:
        raise ArgumentError("expected at least one image, got none", model.where)
    chosen = _host_classes(model, classes, count)
    with model.home.active():
        for first in range(0, count, size):
            last = min(first + size, count)
            batch = model.batch(model.accept(x[first:last, ...]))
            with gradients_of(model):  # those of the parameters are not wanted
                found.append(function(batch, None if chosen is None else chosen[first:last]))
    return found


def _host_classes(model: Model, classes: Classes, count: int) -> Sequence[int] | None:
    """Return classes as int64 (count,) on the host; None for the largest outputs."""
    if classes is None:
        return None
    outputs = model.output_shape[0]
    if isinstance(classes, int):
        classes = [classes] * count
    given = [int(one) for one in _values(model, classes)]
    if len(given) != count or any(not 0 <= one < outputs for one in given):
        raise LabelError(
            f"classes must be one of 0..{outputs - 1} for each of {count} images, got "
            f"{given[:8]}{'...' if len(given) > 8 else ''}",
            model.where,
        )
    return given


def _values(model: Model, classes: Any) -> list[Any]:
    if hasattr(classes, "shape"):
        return list(backend_of(classes).to_host(classes).tolist())
    return list(classes)


def _selected(model: Model, y: Array, chosen: Sequence[int] | None) -> Array:
    """Return the gradient of the chosen outputs for all outputs: 1 at the class, elsewhere 0."""
    home = model.home
    xp, outputs = home.xp, y.shape[1]
    if chosen is None:
        sums = y if y.ndim == 2 else xp.sum(xp.reshape(y, (*y.shape[:2], -1)), axis=2)
        indices = xp.argmax(sums, axis=1)
    else:
        indices = xp.asarray(chosen, dtype=xp.int64, device=home.device)
    every = xp.arange(outputs, dtype=indices.dtype, device=home.device)
    hit = xp.astype(xp.reshape(indices, (-1, 1)) == xp.reshape(every, (1, -1)), y.dtype)
    return xp.zeros_like(y) + xp.reshape(hit, (*hit.shape, *(1,) * (y.ndim - 2)))


def _joined(model: Model, parts: Sequence[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    with model.home.active():
        return model.home.xp.concat(parts, axis=0)
