import os

import pytest

from portacnn.ops import use_kernels
from support.commands import Command, write_shapes


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The command, in an empty folder, with a cache of its own and no variables of portacnn's."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in [name for name in os.environ if name.startswith("PORTACNN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PORTACNN_CACHE", str(tmp_path / "cache"))
    with use_kernels("native"):  # numba would compile into the empty cache
        yield Command(capsys)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    pytest.importorskip("PIL")
    return write_shapes(tmp_path_factory.mktemp("shapes") / "of mine")
