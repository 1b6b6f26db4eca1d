"""``facts``: what the processes of one training run must have alike."""

from math import isfinite
from typing import Any

from portacnn.layers import Layer
from portacnn.runtime import dtype_name
from portacnn.training.checkpoint import what_is_trained
from portacnn.version import VERSION

_OWN = ("verbose", "keep")  # options that ranks may choose


def facts(trainer: Any) -> dict[str, Any]:
    """Return versions, layers, data and options by name, as JSON values: small ones, so that a
    message can show the one that differs."""
    trained = what_is_trained(trainer)
    options = {name: value for name, value in trained.pop("options").items() if name not in _OWN}
    layers = {f"layer {layer.path or 'model'}": _layer(layer) for layer in trainer.model.walk()}
    home = trainer.backend
    kinds = [type(each).__name__ for each in trainer.callbacks]
    del trained["model"]
    return {
        "the version of portacnn": VERSION,
        "the backend": f"{home.name} {getattr(home.xp, '__version__', '')}".rstrip(),
        "the number of layers": len(layers),
        **layers,
        **trainer._sets.facts(),
        **options,
        **trained,
        "callbacks": kinds,
    }


def _layer(layer: Layer) -> str:
    """Return class, arguments that are plain values, and arrays of a layer."""
    several, named = layer.arguments()
    plain = [
        repr(value)
        for value in (*several, *named.values())
        if isinstance(value, str | bool | int | tuple | list)
        or (isinstance(value, float) and isfinite(value))
    ]
    arrays = [
        f"{name} {tuple(map(int, array.shape))} {dtype_name(array)}"
        for name, array in (*layer.params.items(), *layer.buffers.items())
    ]
    return f"{type(layer).__name__}({', '.join(plain)}) {' '.join(arrays)}".rstrip()
