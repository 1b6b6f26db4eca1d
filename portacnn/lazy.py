"""Names of a package that are imported at first use (PEP 562), so that a program loads only what it
uses."""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazily(
    package: str, names: Mapping[str, Iterable[str]], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package.

    The package lists the same imports under ``if TYPE_CHECKING``, for tools that read the source,
    and calls this function under ``else``: type checkers would take ``__getattr__`` for any name.

    Args:
        package: its ``__name__``.
        names: names by the module that they are imported from.
        modules: modules of the package that are names of it.
    """
    homes = {name: module for module, each in names.items() for name in each}
    homes |= {name: f"{package}.{name}" for name in modules}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        module = import_module(homes[name])
        value = module if module.__name__ == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})
