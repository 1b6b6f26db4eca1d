"""The operators and methods of the stand-in's ``cupy.ndarray``."""

from collections.abc import Callable
from typing import Any

import numpy as np


def install(ndarray: type, call: Callable[..., Any]) -> None:
    """Give the class its operators, and NumPy's functions as methods, each by ``call``."""
    binary = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide,
        "pow": np.power,
        "floordiv": np.floor_divide, "mod": np.remainder, "matmul": np.matmul,
        "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift,
        "rshift": np.right_shift,
    }  # fmt: skip
    compared = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal,
    }  # fmt: skip
    for name, f in (*binary.items(), *compared.items()):
        setattr(ndarray, f"__{name}__", lambda a, b, f=f: call(f.__name__, f, (a, b)))
        if name in binary:
            setattr(ndarray, f"__r{name}__", lambda a, b, f=f: call(f.__name__, f, (b, a)))
            setattr(
                ndarray, f"__i{name}__", lambda a, b, f=f: call(f.__name__, f, (a, b), {"out": a})
            )
    for name, f in {
        "neg": np.negative,
        "pos": np.positive,
        "abs": np.absolute,
        "invert": np.invert,
    }.items():
        setattr(ndarray, f"__{name}__", lambda a, f=f: call(f.__name__, f, (a,)))
    for name in (
        *(
            "all",
            "any",
            "argmax",
            "argmin",
            "argsort",
            "choose",
            "clip",
            "conj",
            "cumprod",
            "cumsum",
            "diagonal",
        ),
        *(
            "dot",
            "flatten",
            "max",
            "mean",
            "min",
            "nonzero",
            "prod",
            "ravel",
            "repeat",
            "reshape",
            "round",
        ),
        *(
            "searchsorted",
            "sort",
            "squeeze",
            "std",
            "sum",
            "swapaxes",
            "take",
            "trace",
            "transpose",
            "var",
            "view",
        ),
    ):

        def method(self: Any, *args: Any, _name: str = name, **kwargs: Any) -> Any:
            return call(_name, getattr(np.ndarray, _name), (self, *args), kwargs)

        setattr(ndarray, name, method)
