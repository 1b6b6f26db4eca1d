"""``load``: read an ONNX file as a portacnn model, which predicts and trains."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portacnn.arguments import answering_keywords, whole
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.files import file_path
from portacnn.layers.base import Shape
from portacnn.layers.building import building_from
from portacnn.layers.limits import limited
from portacnn.models.files import NONSENSE
from portacnn.models.graph_model import GraphModel
from portacnn.onnx.about import tell
from portacnn.onnx.network import LOAD, network
from portacnn.onnx.reading import MAX_EXTRA_BYTES, read_source
from portacnn.onnx.wire import MOST
from portacnn.runtime import Backend, resolve
from portacnn.seeds import check_seed


@answering_keywords("onnx.load")
def load(
    path: str | os.PathLike[str],
    *,
    device: str | Backend | None = None,
    dtype: str | None = None,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    outputs: str | Sequence[str] | None = None,
    learn_constants: bool = False,
    seed: int | None = None,
    max_extra_bytes: int = MAX_EXTRA_BYTES,
) -> GraphModel:
    """Return the model in an ONNX file, with its weights, on ``device``, for prediction and
    training.

    Every operator must be supported (docs/onnx.md), and samples of a batch must not affect each
    other. The batch size of the file is ignored. A network with several inputs takes a dictionary
    of arrays, one with several outputs returns one (``GraphModel``).

    Weights become parameters, batch norm's statistics become buffers. An initializer used by
    several nodes is one parameter: equal nodes share one layer, others are tied (``Layer.tie``). A
    constant that is added, subtracted, multiplied or divided by is a parameter if it is an
    initializer with more than one element.

        import portacnn
        model = portacnn.onnx.load("model.onnx", device="cpu")
        model.predict(images)

    Args:
        path: the file. Its external data are in the same folder or below.
        device: see ``portacnn.resolve``.
        dtype: "float32" or "float64"; default: float64 if the file's input is float64, else
            float32.
        input_shape: of one sample, for files that do not state it. If there are several inputs, a
            dictionary of them by name.
        outputs: the names of the outputs to compute, all by default. ``predict`` returns an array
            for a name, or a single one; for several a dictionary.
        learn_constants: whether ``Constant`` nodes with more than one element are parameters too if
            they are added, subtracted, multiplied or divided by. Some exporters write weights so.
        seed: seed of dropout in training; None draws one.
        max_extra_bytes: memory limit of the arrays, in bytes, in addition to four times the size of
            the files. Increase it only for files that you trust and that expand small data to large
            constants.

    Raises:
        ModelFormatError: if the file is not an ONNX model or is damaged, or if an operator or its
            use is not supported (the message names the node and what is supported).
        ArgumentError, BackendError: if another argument is invalid.
        OSError: if there is no such file.
    """
    backend, path = resolve(device), file_path(path, "an ONNX file")
    if dtype not in (None, "float32", "float64"):
        raise ArgumentError(f'dtype must be "float32" or "float64", got {dtype!r}')
    whole("max_extra_bytes", max_extra_bytes, 0), check_seed(seed)
    shapes = _given_shapes(input_shape)
    chosen = [outputs] if isinstance(outputs, str) else None if outputs is None else list(outputs)
    try:
        with np.errstate(all="ignore"), read_source(path, max_extra_bytes) as source:
            with limited(MOST):
                found = network(source, shapes, chosen, dtype, bool(learn_constants))
            with building_from(found.state):
                found.model.build(found.sample, device=backend, dtype=found.dtype, seed=seed)
            if source.metadata is not None:
                tell(found.model, source.metadata)
            return found.model
    except ModelFormatError as error:
        raise ModelFormatError(str(error), str(path)) from error.__cause__
    except NONSENSE as error:
        if isinstance(error, ArgumentError) and error.where == LOAD:
            raise
        raise ModelFormatError(
            f"its parts do not match: {type(error).__name__}: {error}", str(path)
        ) from error


def _given_shapes(input_shape: Any) -> dict[str, Shape]:
    """Return the shapes of samples that the caller gave by the input's name, "" for the only
    one."""
    if input_shape is None:
        return {}
    given = input_shape if isinstance(input_shape, Mapping) else {"": input_shape}
    return {name: tuple(whole("input_shape", n, 1) for n in shape) for name, shape in given.items()}
