"""The environment that ``resolve`` reads."""

import sys

import pytest


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)


@pytest.fixture
def variable(monkeypatch):
    return lambda value: monkeypatch.setenv("PORTACNN_BACKEND", value)


@pytest.fixture
def absent(monkeypatch):
    """Make libraries look uninstalled."""
    return lambda *names: [monkeypatch.setitem(sys.modules, name, None) for name in names]
