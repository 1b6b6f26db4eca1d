"""Describe a model as JSON values for a file's header, and rebuild it from header and weights.

Input from files is checked: a header that makes no sense is a ModelFormatError.
"""

from collections.abc import Mapping
from typing import Any

from portacnn.errors import ModelFormatError, PortacnnError
from portacnn.layers import Layer
from portacnn.layers.building import building_from
from portacnn.layers.freezing import frozen_paths, restore
from portacnn.layers.limits import limited
from portacnn.models.description import Described, describe_layer, needs_format_2, rebuild_layer
from portacnn.models.info import rebuild_info
from portacnn.models.preprocess import rebuild_preprocess
from portacnn.runtime import Backend, HostArray
from portacnn.text import shown

# layers that a class may create from its arguments, besides those with tensors in the file
_MOST_LAYERS = 4096

# Errors that a constructor may raise for a description from a file.
NONSENSE = (
    PortacnnError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)


def describe_model(model: Any) -> dict[str, Any]:
    """Return what ``Model.description`` does."""
    known: Described = {}
    network = describe_layer(model, known)
    tied = {
        layer.full_name(name): owner.full_name(key)
        for layer in model.walk()
        for name, (owner, key) in layer.tied.items()
    }
    number = 2 if tied or needs_format_2(known) else 1
    header = {
        "format": number,
        "model": network,
        "input_shape": model.input_shape,
        "dtype": model.dtype,
    }
    if tied:
        header["tied"] = tied
    if model.preprocess is not None:
        header["preprocess"] = model.preprocess.description()
    if frozen := frozen_paths(model):
        header["frozen"] = frozen
    header["info"] = model.description_of_info()
    return header


def rebuild_model(
    kind: type[Any],
    tensors: Mapping[str, HostArray],
    header: Any,
    backend: Backend,
    where: str,
    seed: Any,
) -> Any:
    """Return the model of class ``kind`` that a header describes; see ``Model.rebuild``."""
    if header is None:
        raise ModelFormatError(
            "it does not describe its model, only weights, as files of other tools do; build "
            "the model first, then call model.load_weights(path)",
            where,
        )
    try:
        if header["format"] not in (1, 2):
            raise ModelFormatError(
                f"it has format {shown(repr(header['format']))}, but this version reads 1 and "
                "2; upgrade portacnn"
            )
        drawing = {} if seed is None else {"seed": seed}
        with building_from(tensors), limited(_MOST_LAYERS + 8 * len(tensors)):
            model = rebuild_layer(header["model"], device=backend, dtype=header["dtype"], **drawing)
            if not isinstance(model, kind):
                raise ModelFormatError(f"expected a {kind.__name__}, got a {type(model).__name__}")
            if model.backend is None:
                for name, owner in header.get("tied", {}).items():
                    _tie(model, name, owner)
                model.build(header["input_shape"], device=backend, dtype=header["dtype"], seed=seed)
        model.preprocess = rebuild_preprocess(header.get("preprocess"))
        restore(model, header.get("frozen", []))
        model.info = rebuild_info(header.get("info"))
    except ModelFormatError as error:
        raise ModelFormatError(str(error), where) from error.__cause__
    except NONSENSE as error:
        what = f"{type(error).__name__}: {error}"
        raise ModelFormatError(
            f"it does not describe its model correctly: {what}", where
        ) from error
    return model


def _tie(model: Layer, name: str, owner: str) -> None:
    """Tie one parameter to another in a network that is not built yet, each named by its path."""
    (path, _, own), (other, _, theirs) = name.rpartition("."), owner.rpartition(".")
    model.layer_at(path).tie(own, model.layer_at(other), theirs)
