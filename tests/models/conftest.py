"""What the tests of the published models share."""

import pytest

from portacnn.models import Model


@pytest.fixture
def only_planned(monkeypatch):
    """Models plan themselves and allocate nothing: for looking at large ones."""

    def build(self, shape, **others):
        self.plan(tuple(shape))
        return self

    monkeypatch.setattr(Model, "build", build)
