"""What an optimizer has stored, checked when it is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from portacnn.arguments import not_negative, told, whole
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.runtime import Array, Backend, HostArray, backend_of, taken


def checked_state(
    where: str, slots: Sequence[str], state: Mapping[str, Any], params: Mapping[str, Array]
) -> tuple[float, int, dict[str, int], dict[str, dict[str, Array]]]:
    """Return the parts of a state from ``Optimizer.state_dict``: the learning rate, the number of
    updates, the counts by key, and the arrays by key and slot, on the devices and in the dtypes of
    the parameters.

    Args:
        where: the name of the optimizer's class.
        slots: the names of its arrays.
        params: the parameters by key.

    Raises:
        ModelFormatError: if it is another optimizer's state or does not fit these parameters.
    """
    lacking = [
        name for name in ("optimizer", "lr", "steps", "counts", "arrays") if name not in state
    ]
    if lacking:
        raise ModelFormatError(
            f"it is not an optimizer's state: {', '.join(lacking)} missing", where
        )
    if state["optimizer"] != where:
        raise ModelFormatError(
            f"expected the state of {where}, got that of {state['optimizer']}", where
        )
    counts, arrays = state["counts"], state["arrays"]
    for name in ("counts", "arrays"):
        if not isinstance(state[name], Mapping):
            raise ModelFormatError(
                f"{name} must be a dictionary by key, got {told(state[name])}", where
            )
    shapes = {
        f"{slot}.{key}": params[key].shape for slot in slots for key in counts if key in params
    }
    problems = {
        "unknown parameters": [key for key in counts if key not in params],
        "missing": [name for name in shapes if name not in arrays],
        "unexpected": [name for name in arrays if name not in shapes],
        "no NumPy array": [name for name, array in arrays.items() if not hasattr(array, "shape")],
        "of another shape": [
            f"{name} {tuple(arrays[name].shape)} (expected {tuple(shape)})"
            for name, shape in shapes.items()
            if hasattr(arrays.get(name), "shape") and tuple(arrays[name].shape) != tuple(shape)
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{what}: {', '.join(names)}" for what, names in problems.items() if names
        )
        raise ModelFormatError(f"the state does not fit these parameters. {listed}", where)
    try:
        lr, steps = not_negative("lr", state["lr"]), whole("steps", state["steps"], 0)
        counts = {
            key: whole(f"the count of {key}", count, 1, most=steps) for key, count in counts.items()
        }
    except ArgumentError as error:
        raise ModelFormatError(error.message, where) from error
    loaded: dict[str, dict[str, Array]] = {}
    for key in counts if slots else ():
        p = params[key]
        home = home_of(p)
        names = {slot: f"{slot}.{key}" for slot in slots}
        loaded[key] = {
            slot: taken(home, arrays[name], p.dtype, f"{where}: {name}")
            for slot, name in names.items()
        }
    return lr, steps, counts, loaded


def on_host(array: Array) -> tuple[Backend, HostArray]:
    """Return an array's backend, on the array's own device, and its values."""
    home = home_of(array)
    return home, home.to_host(array)


def home_of(array: Array) -> Backend:
    """Return an array's backend, on the array's own device."""
    return replace(backend_of(array), device=array.device)
