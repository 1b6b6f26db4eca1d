"""The book's layers (``common/layers.py``): ``forward(x)``, ``backward(dout)``, and gradients as
attributes, computed by ops.

As in the book, a layer holds the arrays that it was given: an optimizer that writes into
``params["W1"]`` writes into the layer's ``W``. Library and device follow these arrays. The input
may have another real dtype (float32 images and float64 weights, for example): it is converted, and
its gradient is converted back. No layer changes its input or the gradient passed to it (the book's
Relu does).

Notation: N batch, C channels (FN of a convolution's output), H/W image, D features.
"""

from math import prod
from typing import Any

from portacnn import ops
from portacnn.arguments import real as checked
from portacnn.errors import ArgumentError, ShapeError, StateError
from portacnn.runtime import Array, backend_of, describe, where
from portacnn.scratch.functions import like, real, softmax, target
from portacnn.seeds import check_seed


class _Layer:
    """Base of the layers. ``forward`` stores ``_cache``; ``backward`` needs it and may be
    repeated."""

    _cache: Any = None

    def _kept(self) -> Any:
        if self._cache is None:
            raise StateError(
                "expected a forward pass before backward; call forward first", type(self).__name__
            )
        return self._cache

    def _gradient(self, dout: Array) -> Array:
        """Return ``dout`` in the dtype of the forward pass's output, if both are of one library."""
        library, _, dtype, _ = self._kept().result
        backend = backend_of(dout)
        return (
            dout
            if backend.name != library or dout.dtype == dtype
            else backend.xp.astype(real(dout), dtype)
        )


# --- layers with weights --------------------------------------------------------------------------


class Convolution(_Layer):
    """y = W * x + b: FN filters slid over the images (cross-correlation), as
    ``portacnn.ops.conv2d``.

    Args:
        W: (FN, C, FH, FW).
        b: (FN,), or None.
        stride: a number, or (vertical, horizontal).
        pad: number of zeros on every side; also (vertical, horizontal).

    Attributes:
        dW, db: the gradients, from ``backward``.
    """

    def __init__(self, W: Array, b: Array | None, stride: Any = 1, pad: Any = 0) -> None:
        self.W, self.b, self.stride, self.pad = W, b, stride, pad
        self.x: Any = None
        self.dW: Any = None
        self.db: Any = None

    def forward(self, x: Array) -> Array:
        """Return (N, FN, OH, OW) for x (N, C, H, W), with OH = (H + 2*pad - FH) // stride + 1."""
        self.x = x
        y, self._cache = ops.conv2d(
            like(x, self.W), self.W, self.b, stride=self.stride, padding=self.pad
        )
        return y

    def backward(self, dout: Array) -> Array:
        """Return dx (N, C, H, W) for dout (N, FN, OH, OW); set dW and db."""
        dx, self.dW, self.db = ops.conv2d_backward(self._gradient(dout), self._cache)
        return like(dx, self.x)


class Affine(_Layer):
    """y = x W + b, with each sample flattened to one axis first.

    Args:
        W: (D, outputs). ``portacnn.layers.Linear`` and PyTorch hold its transpose.
        b: (outputs,), or None.

    Attributes:
        dW, db: the gradients, from ``backward``, shaped as W and b.
    """

    def __init__(self, W: Array, b: Array | None) -> None:
        self.W, self.b = W, b
        self.x: Any = None
        self.dW: Any = None
        self.db: Any = None

    def forward(self, x: Array) -> Array:
        """Return (N, outputs) for x (N, ...); axes after the first are flattened in row-major
        order."""
        self.x = x
        xp = backend_of(x).xp
        flat = like(xp.reshape(x, (x.shape[0], prod(x.shape[1:]))), self.W)
        y, self._cache = ops.linear(
            flat, backend_of(self.W).xp.permute_dims(self.W, (1, 0)), self.b
        )
        return y

    def backward(self, dout: Array) -> Array:
        """Return dx in the input's shape for dout (N, outputs); set dW and db."""
        dx, dweight, self.db = ops.linear_backward(self._gradient(dout), self._cache)
        xp = backend_of(dx).xp
        self.dW = xp.permute_dims(dweight, (1, 0))
        return like(xp.reshape(dx, tuple(self.x.shape)), self.x)


class BatchNormalization(_Layer):
    """Normalize each feature, or each channel of images, over the batch; then scale by gamma and
    shift by beta.

    For images (N, C, H, W) the book normalizes every pixel separately over the batch, with C*H*W
    gammas. That is not what Ioffe and Szegedy (2015) describe for convolutions. Here a channel's
    mean and variance are over the batch and all of its pixels, and gamma is (C,). For (N, D)
    everything is as in the book: the momentum is the share of the running mean that is kept
    (PyTorch's is the share of the new value), the running variance starts from 0 and uses the
    batch's biased variance (PyTorch: unbiased), and 1e-6 is added to a variance.

    Args:
        gamma, beta: (D,) or (C,).
        momentum: see above.
        running_mean, running_var: (D,) or (C,), for ``train_flg=False``; zeros by default. They are
            replaced, not written into.

    Attributes:
        dgamma, dbeta: the gradients, from ``backward``.
    """

    eps = 10e-7

    def __init__(
        self,
        gamma: Array,
        beta: Array,
        momentum: float = 0.9,
        running_mean: Array | None = None,
        running_var: Array | None = None,
    ) -> None:
        if (running_mean is None) != (running_var is None):
            raise ArgumentError(
                "expected both running_mean and running_var, or neither",
                "BatchNormalization",
            )
        self.gamma, self.beta, self.momentum = gamma, beta, momentum
        self.running_mean: Any = running_mean
        self.running_var: Any = running_var
        self.x: Any = None
        self.dgamma: Any = None
        self.dbeta: Any = None

    def forward(self, x: Array, train_flg: bool = True) -> Array:
        """Return y of the same shape for x (N, D) or (N, C, H, W).

        Args:
            train_flg: use the batch's mean and variance; if False, the running ones.
        """
        self._check(x)
        xp = backend_of(self.gamma).xp
        if self.running_mean is None:
            self.running_mean, self.running_var = (
                xp.zeros_like(self.gamma),
                xp.zeros_like(self.gamma),
            )
        self.x, x = x, like(x, self.gamma)
        if not train_flg:
            statistics = self.running_mean, self.running_var
            y, self._cache = ops.batch_norm(x, *statistics, self.gamma, self.beta, eps=self.eps)
            return y
        # with momentum 1 they become the batch's own
        mean, var = xp.zeros_like(self.gamma), xp.zeros_like(self.gamma)
        y, self._cache = ops.batch_norm(
            x, mean, var, self.gamma, self.beta, training=True, momentum=1.0, eps=self.eps
        )
        count = x.shape[0] * prod(x.shape[2:])
        if count:
            stays, comes = self.momentum, 1.0 - self.momentum
            with where(mean):
                self.running_mean = stays * self.running_mean + comes * mean
                self.running_var = stays * self.running_var + (comes * (count - 1) / count) * var
        return y

    def _check(self, x: Array) -> None:
        pixels = prod(x.shape[1:])
        if x.ndim > 2 and self.gamma.ndim == 1 and x.shape[1] != self.gamma.shape[0] == pixels:
            raise ShapeError(
                f"gamma and beta have one number for each of {pixels} pixels, as in the book; "
                "batch normalization of images has "
                f"one for each channel: pass arrays of shape ({x.shape[1]},) (input {describe(x)})",
                "BatchNormalization",
            )

    def backward(self, dout: Array) -> Array:
        """Return dx in the input's shape; set dgamma and dbeta."""
        dx, self.dgamma, self.dbeta = ops.batch_norm_backward(self._gradient(dout), self._cache)
        return like(dx, self.x)


# --- layers without -------------------------------------------------------------------------------


class Pooling(_Layer):
    """The maximum of each window.

    The output is (H + 2*pad - pool_h) // stride + 1 high. The book omits the padding here, so its
    layer fails. Padding is never a maximum; in the book it is zeros, which exceed negative values.
    Of equal maxima the first gets the gradient.

    Args:
        pool_h, pool_w: the window.
        stride: a number, or (vertical, horizontal). The default is 1, as printed in the book;
            pooling without overlap needs ``stride=pool_h``.
        pad: elements around the images, at most half of the window; also (vertical, horizontal).
    """

    def __init__(self, pool_h: int, pool_w: int, stride: Any = 1, pad: Any = 0) -> None:
        self.pool_h, self.pool_w, self.stride, self.pad = pool_h, pool_w, stride, pad

    def forward(self, x: Array) -> Array:
        """Return (N, C, OH, OW) for x (N, C, H, W)."""
        y, self._cache = ops.max_pool2d(
            real(x), (self.pool_h, self.pool_w), stride=self.stride, padding=self.pad
        )
        return y

    def backward(self, dout: Array) -> Array:
        """Return dx (N, C, H, W) for dout (N, C, OH, OW)."""
        return ops.max_pool2d_backward(self._gradient(dout), self._cache)


class Relu(_Layer):
    """max(x, 0), any shape."""

    def forward(self, x: Array) -> Array:
        """Return max(x, 0) in a new array."""
        y, self._cache = ops.relu(real(x))
        return y

    def backward(self, dout: Array) -> Array:
        """Return dout if x was above 0, else 0, in a new array."""
        return ops.relu_backward(self._gradient(dout), self._cache)


class Sigmoid(_Layer):
    """1 / (1 + exp(-x)), any shape; ``out`` is the last result."""

    def __init__(self) -> None:
        self.out: Any = None

    def forward(self, x: Array) -> Array:
        """Return 1 / (1 + exp(-x))."""
        self.out, self._cache = ops.sigmoid(real(x))
        return self.out

    def backward(self, dout: Array) -> Array:
        """Return dout * (1 - out) * out."""
        return ops.sigmoid_backward(self._gradient(dout), self._cache)


class Dropout(_Layer):
    """In training each element is 0 with probability ``dropout_ratio``; otherwise all are
    multiplied by 1 - dropout_ratio.

    That is the first published form (Hinton et al., 2012) and the book's: training keeps the size
    of the values, and prediction reduces it. ``portacnn.layers.Dropout``, like PyTorch's, divides
    by 1 - p in training instead. Masks are bitwise the same on every backend.

    Args:
        dropout_ratio: 0 to 1.
        seed: of the masks; None draws one.

    Attributes:
        mask: of the last training forward pass: 1 for each element that was kept, else 0.
    """

    def __init__(self, dropout_ratio: float = 0.5, *, seed: int | None = None) -> None:
        try:
            self.dropout_ratio = checked("dropout_ratio", dropout_ratio, least=0.0, most=1.0)
        except ArgumentError as error:
            raise error.at("Dropout")
        self.seed, self.step = check_seed(seed), 0
        self.mask: Any = None

    def forward(self, x: Array, train_flg: bool = True) -> Array:
        """Return x with elements dropped in training, else x * (1 - dropout_ratio)."""
        x = real(x)
        if not train_flg:
            self._cache = 1.0 - self.dropout_ratio
            with where(x):
                return x * self._cache
        xp = backend_of(x).xp
        ones, _ = ops.dropout(
            xp.ones_like(x), self.dropout_ratio, seed=self.seed, step=self.step, keep=False
        )
        self.step += 1
        self.mask = self._cache = xp.astype(ones > 0, x.dtype)
        with where(x):
            return x * self.mask

    def backward(self, dout: Array) -> Array:
        """Return dout times the factor of x."""
        with where(dout):
            return dout * self._kept()


class SoftmaxWithLoss(_Layer):
    """Softmax and the mean cross-entropy with the labels.

    It is computed from the logits, so the loss is exact; the book's, with its log(y + 1e-7),
    saturates at 16.1. The gradient is the gradient of this loss. Soft labels have their full
    effect; the book's loss uses only the largest.

    Attributes:
        loss: the last one, 0-dimensional.
        y: the softmax of the last x, computed on access.
        t: the last labels.
    """

    def __init__(self) -> None:
        self.x: Any = None
        self.loss: Any = None
        self.t: Any = None

    @property
    def y(self) -> Array | None:
        return None if self.x is None else softmax(self.x)

    def forward(self, x: Array, t: Array) -> Array:
        """Return the loss, 0-dimensional, for logits (N, C) and labels: whole numbers (N,) or (N,
        1), or one-hot or soft (N, C).

        A label outside 0..C-1 makes it NaN.
        """
        self.x, self.t = real(x), t
        self.loss, self._cache = ops.softmax_cross_entropy(self.x, target(t, self.x))
        return self.loss

    def backward(self, dout: Any = 1) -> Array:
        """Return (y - t) * dout / N, (N, C). ``dout`` is a number or a 0-dimensional array."""
        dout = float(dout) if isinstance(dout, int | float) else self._gradient(dout)
        return ops.softmax_cross_entropy_backward(dout, self._kept())
