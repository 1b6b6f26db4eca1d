"""LeNet-5, in its form of 1998 and in today's usual form."""

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

from portacnn import ops
from portacnn.arguments import one_of, whole
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.init import Initializer
from portacnn.layers import AvgPool2d, Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU
from portacnn.layers.base import Shape
from portacnn.layers.conv import spatial
from portacnn.layers.receptive import Reach, pointwise, reach
from portacnn.models.inputs import image_shape
from portacnn.models.model import Model
from portacnn.ops.windows import Windows, per_axis
from portacnn.runtime import Array, Backend, HostArray

# The maps of S2 that each map of C3 is connected to (LeCun et al., 1998, table I).
C3_TABLE = (
    *(tuple(sorted((i + step) % 6 for step in (0, 1, 2))) for i in range(6)),
    *(tuple(sorted((i + step) % 6 for step in (0, 1, 2, 3))) for i in range(6)),
    *(tuple(sorted((i + step) % 6 for step in (0, 1, 3, 4))) for i in range(3)),
    (0, 1, 2, 3, 4, 5),
)


def lecun(rng: Any, shape: Sequence[int], fan_in: int, fan_out: int) -> HostArray:
    """Draw uniformly from +-2.4 / fan_in: the paper's rule for weights and biases."""
    return rng.uniform(-2.4 / fan_in, 2.4 / fan_in, shape)


class ScaledTanh(Layer):
    """1.7159 * tanh(2/3 * x), any shape: the paper's squashing function. It maps 1 to 1 and -1 to
    -1."""

    amplitude, slope = 1.7159, 2.0 / 3.0

    def infer(self, shape: Shape) -> Shape:
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        y, cache = ops.tanh(self.slope * x, keep=keep)
        return self.amplitude * y, cache

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return self.slope * ops.tanh_backward(self.amplitude * dy, cache)


class TableConv2d(Layer):
    """A convolution whose output maps are connected to some of the input maps: x (N, C, H, W) -> y
    (N, O, OH, OW).

    It has one kernel for each connection of a table. The kernels are placed into the weight (O, C,
    KH, KW) of a full convolution, with zeros for missing connections.

    Args:
        table: for each of the O output maps, the indices of its input maps.
        kernel_size: one number or two.

    Parameters: ``weight`` (connections, KH, KW), in the table's order; ``bias`` (O,). Both are
    initialized by the paper's rule, with the fan-in of an output map's own connections.
    """

    def __init__(self, table: Sequence[Sequence[int]], kernel_size: int | Sequence[int]) -> None:
        try:
            self.kernel_size = per_axis("kernel_size", kernel_size, 2, 1)
            self.table = [[whole("a map's number", map_, 0) for map_ in seen] for seen in table]
            if not self.table or any(not seen or len(set(seen)) < len(seen) for seen in self.table):
                raise ArgumentError(
                    "each row of table must list at least one input map, and none twice; got "
                    f"{table!r}"
                )
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.connections = [(o, c) for o, seen in enumerate(self.table) for c in seen]

    def infer(self, shape: Shape) -> Shape:
        highest = max(c for _, c in self.connections)
        windows = Windows.of(spatial(shape, 2), self.kernel_size, (1, 1), 0, (1, 1))
        if shape[0] <= highest:
            raise ShapeError(
                f"expected at least {highest + 1} input channels, got {shape[0]} (samples {shape})"
            )
        kh, kw = self.kernel_size
        bounds = [2.4 / (len(seen) * kh * kw) for seen in self.table]
        per_kernel = [[[bounds[o]]] for o, _ in self.connections]
        self.declare("weight", (len(self.connections), kh, kw), _uniform(per_kernel))
        self.declare("bias", (len(self.table),), _uniform(bounds))
        return (len(self.table), *windows.out)

    def multiply_adds(self) -> int:
        return prod((len(self.connections), *self.kernel_size, *self.output_shape[1:]))

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        xp = self.home.xp
        channels = x.shape[1]
        whose = self.constants(
            f"whose of {channels}", lambda: [i or 0 for i in self._slots(channels)], "int64", x
        )
        some = self.constants(
            f"some of {channels}", lambda: [i is not None for i in self._slots(channels)], "bool", x
        )
        full = xp.where(some[:, None, None], xp.take(self.params["weight"], whose, axis=0), 0.0)
        full = xp.reshape(full, (len(self.table), channels, *self.kernel_size))
        return ops.conv2d(x, full, self.params["bias"], keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        dx, dfull, dbias = ops.conv2d_backward(dy, cache, need_dx=need_dx, **self.frozen_grads())
        dweight = None if dfull is None else self._connected(dfull)
        self.add_grads(weight=dweight, bias=dbias)
        return dx

    def _connected(self, full: Array) -> Array:
        """Return the kernels of the connections, (connections, KH, KW), of a full weight."""
        xp, channels = self.home.xp, full.shape[1]
        places = [o * channels + c for o, c in self.connections]
        kernels = xp.reshape(full, (len(self.table) * channels, *self.kernel_size))
        return xp.take(
            kernels, self.constants(f"places of {channels}", lambda: places, "int64", full), axis=0
        )

    def _slots(self, channels: int) -> list[int | None]:
        """Return, for each kernel of the full weight, outputs first: its connection, or None."""
        number = {pair: i for i, pair in enumerate(self.connections)}
        return [number.get((o, c)) for o in range(len(self.table)) for c in range(channels)]


reach.register(ScaledTanh, pointwise)


@reach.register
def _reach_of(layer: TableConv2d) -> tuple[Reach, ...]:
    return tuple(Reach(Fraction(1), Fraction(0), Fraction(k - 1)) for k in layer.kernel_size)


def _uniform(bounds: Any) -> Initializer:
    """Return an initializer: uniform within +-bounds, a list that broadcasts."""
    return lambda rng, shape, fan_in, fan_out: rng.uniform(-1.0, 1.0, shape) * bounds


class LeNet5(Model):
    """LeNet-5 (LeCun, Bottou, Bengio and Haffner, 1998, section II.B), for digits (N, 1, 28, 28) or
    (N, 1, 32, 32).

    ``variant="classic"`` is the paper's network up to its last hidden layer, with its 60,000
    trainable parameters:

        C1  6 maps, 5x5 convolution            S2  2x2 mean, a coefficient and a bias for each map
        C3  16 maps, 5x5, connected by table I  S4  as S2
        C5  120 maps, 5x5, fully connected      F6  84 units
        output: a unit for each class

    with 1.7159 * tanh(2/3 a) after each layer up to F6. Weights are drawn uniformly from +-2.4 /
    fan_in. Differences from the paper: the output layer is linear and trained with softmax
    cross-entropy (the paper's are distances to fixed 7x12 bitmaps, RBF units, with their own loss);
    S2 and S4 take the mean of four values instead of the sum, so a coefficient is four times as
    large here; and images are not scaled (in the paper the background is -0.1 and ink 1.175).

    ``variant="modern"`` is the network called LeNet today: ReLU, 2x2 max pooling, full connection
    and PyTorch's initialization:

        conv 6 - relu - pool - conv 16 - relu - pool - affine 120 - relu - affine 84 - relu -
        affine 10

    Args:
        num_classes: number of classes, and ``in_channels``: channels of the images.
        variant: "classic" or "modern".
        input_size: 32 as in the paper, or 28: then the first convolution pads by 2 with zeros.
        device: see ``portacnn.resolve``.
        seed: seed of the weights; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path, each with weight and bias: c1, s2, c3, s4, c5, f6, output; or conv1, conv2,
    fc1, fc2, fc3.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        *,
        variant: str = "classic",
        input_size: int = 28,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        try:
            one_of("variant", variant, "classic", "modern")
        except PortacnnError as error:
            raise error.at("LeNet5")
        if input_size not in (28, 32):
            raise ArgumentError(f"input_size must be 28 or 32, got {input_size!r}", "LeNet5")
        shape = image_shape("LeNet5", num_classes, in_channels, input_size)
        layers = _classic if variant == "classic" else _modern
        super().__init__(**layers(num_classes, padding=(32 - shape[1]) // 2))
        self.build(shape, device=device, dtype=dtype, seed=seed)


def _classic(num_classes: int, padding: int) -> dict[str, Layer]:
    init: dict[str, Any] = {"weight_init": lecun, "bias_init": lecun}
    return {
        "c1": Conv2d(None, 6, 5, padding=padding, **init),
        "squash1": ScaledTanh(),
        "pool2": AvgPool2d(2),
        "s2": Conv2d(6, 6, 1, groups=6, **init),  # a coefficient and a bias for each map
        "squash2": ScaledTanh(),
        "c3": TableConv2d(C3_TABLE, 5),
        "squash3": ScaledTanh(),
        "pool4": AvgPool2d(2),
        "s4": Conv2d(16, 16, 1, groups=16, **init),
        "squash4": ScaledTanh(),
        "c5": Conv2d(16, 120, 5, **init),
        "squash5": ScaledTanh(),
        "flatten": Flatten(),
        "f6": Linear(120, 84, **init),
        "squash6": ScaledTanh(),
        "output": Linear(84, num_classes, **init),
    }


def _modern(num_classes: int, padding: int) -> dict[str, Layer]:
    return {
        "conv1": Conv2d(None, 6, 5, padding=padding),
        "relu1": ReLU(),
        "pool1": MaxPool2d(2),
        "conv2": Conv2d(6, 16, 5),
        "relu2": ReLU(),
        "pool2": MaxPool2d(2),
        "flatten": Flatten(),
        "fc1": Linear(400, 120),
        "relu3": ReLU(),
        "fc2": Linear(120, 84),
        "relu4": ReLU(),
        "fc3": Linear(84, num_classes),
    }
