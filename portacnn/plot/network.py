"""What a network looks for: the filters of a convolution, and the feature maps of an image."""

from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from portacnn.errors import ArgumentError, ShapeError
from portacnn.layers.conv import Conv
from portacnn.models import Model
from portacnn.plot.style import COLOR_MAP, grid, host, sample, show
from portacnn.runtime import Array, HostArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def filters(model: Model, path: str | None = None, *, most: int = 64, columns: int = 8) -> "Figure":
    """Return the kernels of a two-dimensional convolution as images: in colour over three input
    channels, else one image of their mean over the channels.

    All share one scale, on which 0 is the middle.

    Args:
        path: of the convolution; None takes the first.
        most: of the kernels to draw.

    Raises:
        ArgumentError: if there is no such convolution.
        DependencyError: if matplotlib is missing.
    """
    path, kernels = kernels_of(model, path)
    drawn, cells = grid(min(len(kernels), most), columns, 0.75)
    for axes, kernel in zip(cells, kernels, strict=False):
        show(axes, kernel)
    shape = "x".join(map(str, kernels.shape[2:]))
    more = f", the first {most}" if len(kernels) > most else ""
    drawn.suptitle(f"{path}: {len(kernels)} kernels of {shape}{more}", fontsize="medium")
    return drawn


def kernels_of(model: Model, path: str | None = None) -> tuple[str, HostArray]:
    """Return the path of a convolution, and its kernels (O, 3 or 1, KH, KW) scaled to 0..1, with 0
    at 0.5. Raises ArgumentError if there is none."""
    if path is None:
        found = [n for n in model.walk() if isinstance(n, Conv) and n.axes == 2 and n.params]
        if not found:
            raise ArgumentError("the network has no two-dimensional convolution", model.where)
        layer: Any = found[0]
    else:
        layer = model.layer_at(path)
    if not isinstance(layer, Conv) or layer.axes != 2:
        raise ArgumentError("filters are those of a two-dimensional convolution", layer.where)
    weight = host(layer.params["weight"]).astype(np.float64)
    if weight.shape[1] != 3:
        weight = weight.mean(axis=1, keepdims=True)
    most = np.abs(weight).max() or 1.0
    return layer.path, 0.5 + weight / (2 * most)


def feature_maps(
    model: Model, image: Array, path: str, *, most: int = 32, columns: int | None = None
) -> "Figure":
    """Return the image and the maps that a layer makes of it, one for each channel, on one scale.

    Args:
        image: (C, H, W), as the model takes it.
        path: of a layer with output (C, H, W), as in ``summary``.
        most: of the channels to draw.

    Raises:
        ShapeError: if it is not one image, or the layer's output is no map.
        ArgumentError, StateError: as for ``Model.features``.
        DependencyError: if matplotlib is missing.
    """
    one, batch = sample(image)
    maps = host(model.features(batch, path))[0]
    if maps.ndim != 3:
        raise ShapeError(
            f"feature maps need a layer with output (C, H, W), got {maps.shape}",
            model.layer_at(path).where,
        )
    count = min(len(maps), most)
    drawn, cells = grid(count + 1, columns or ceil(sqrt(count + 1)) + 1, 0.95, 0.22)
    show(cells[0], one)
    cells[0].set_title("image", fontsize="small")
    low, high = float(maps.min()), float(maps.max())
    for number, axes in enumerate(cells[1:]):
        mapped = axes.imshow(maps[number], cmap=COLOR_MAP, vmin=low, vmax=max(high, low + 1e-9))
        axes.set_title(str(number), fontsize="small")
    drawn.colorbar(mapped, ax=cells, shrink=0.6, label=f"output of {path}")
    return drawn
