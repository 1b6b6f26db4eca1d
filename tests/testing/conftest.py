"""``toyarray`` as an installed package: tests/toy has its entry point."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portacnn import runtime

TOY = Path(__file__).resolve().parents[1] / "toy"


@pytest.fixture(scope="module")
def toy() -> Iterator[str]:
    """The name under which ``resolve`` finds it."""

    def look_again() -> None:
        runtime._foreign.cache_clear()
        runtime._adapter.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOY)
        look_again()
        yield "toyarray"
        for kind in [kind for kind in runtime._by_type if kind.__module__ == "toyarray"]:
            del runtime._by_type[kind]
        sys.modules.pop("toyarray_portacnn", None)
        sys.modules.pop("toyarray", None)
    look_again()
