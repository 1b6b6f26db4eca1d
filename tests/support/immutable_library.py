"""``toylib``: a library whose arrays cannot be written to, by array-api-strict, and which offers
the array API standard and nothing else."""

import sys
from types import ModuleType

import array_api_strict as strict

_STRICT = type(strict.asarray(0.0))


class ToyArray:
    """Everything of an array of array-api-strict but ``x[key] = value`` and ``x += y``."""

    def __init__(self, inner):
        self._inner = inner

    def __array_namespace__(self, api_version=None):
        return toylib

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return wrapped(getattr(self._inner, name))


def inner(value):
    if isinstance(value, ToyArray):
        return value._inner
    if isinstance(value, tuple | list):
        return type(value)(map(inner, value))
    return value


def wrapped(value):
    if isinstance(value, _STRICT):
        return ToyArray(value)
    if isinstance(value, tuple | list):
        return type(value)(map(wrapped, value))
    return value


def _method(name):
    def method(self, *args, **options):
        return wrapped(getattr(self._inner, name)(*map(inner, args), **options))

    return method


_NOT_OFFERED = {"__setitem__", "__array__", "__array_namespace__", "__class__", "__buffer__"}
for _name in dir(_STRICT):
    special = _name.startswith("__") and _name not in dir(object)
    in_place = _name.startswith("__i") and f"__{_name[3:]}" in dir(_STRICT) and _name != "__init__"
    if (special or _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")) and not (
        _name in _NOT_OFFERED or (in_place and _name not in ("__invert__", "__int__", "__index__"))
    ):
        setattr(ToyArray, _name, _method(_name))
ToyArray.__module__ = "toylib"


class _Toylib(ModuleType):
    def __getattr__(self, name):
        found = getattr(strict, name)
        if not callable(found) or isinstance(found, type):
            return found
        return lambda *args, **options: wrapped(
            found(*map(inner, args), **{word: inner(value) for word, value in options.items()})
        )


toylib = _Toylib("toylib")
sys.modules["toylib"] = toylib
