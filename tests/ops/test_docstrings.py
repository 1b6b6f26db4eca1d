"""The examples in docstrings run as printed, and every public op has one."""

import doctest
import importlib
import pkgutil
import re
from types import ModuleType

import numpy as np
import pytest

import portacnn
from portacnn import ops

MODULES = [
    "portacnn.arguments",
    "portacnn.data.idx",
    "portacnn.data.labels",
    "portacnn.data.mnist",
    "portacnn.distributed",
    "portacnn.distributed.launchers",
    "portacnn.file_kinds",
    "portacnn.gradient_check",
    "portacnn.init",
    "portacnn.models.model",
    "portacnn.models.preprocess",
    "portacnn.models.simple_conv_net",
    "portacnn.optim",
    "portacnn.optim.groups",
    "portacnn.runtime",
    "portacnn.schedules",
    "portacnn.scratch.functions",
    "portacnn.seeds",
    *(
        f"portacnn.testing.{name}"
        for name in ("backends", "report", "layer_checks", "loss_checks", "own_op_checks")
    ),
    "portacnn.training.early_stopping",
    "portacnn.training.trainer",
    *(f"portacnn.ops.{module.name}" for module in pkgutil.iter_modules(ops.__path__)),
]


def _examples(name: str) -> list[doctest.DocTest]:
    """The docstrings of a module with examples. The public forms of one op share theirs."""
    module = importlib.import_module(name)
    known = {**vars(module), "np": np, "ops": ops, "portacnn": portacnn}
    parser, found = doctest.DocTestParser(), {}
    for key, value in {name: module, **vars(module)}.items():
        text = value.__doc__
        other = isinstance(value, ModuleType) and key != name
        here = getattr(value, "__module__", name) == name and not other
        if here and isinstance(text, str) and ">>>" in text:
            found[text] = parser.get_doctest(text, dict(known), key, module.__file__, 0)
    return list(found.values())


TESTS = [test for name in MODULES for test in _examples(name)]


@pytest.mark.parametrize("test", TESTS, ids=[test.name for test in TESTS])
def test_examples_in_docstrings_print_what_they_show(test):
    output: list[str] = []
    with np.printoptions(legacy=False):
        result = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
    assert result.attempted
    assert not result.failed, "".join(output)


def _family(name: str) -> str:
    """One docstring serves conv1d, conv2d and conv3d."""
    return re.sub(r"[123]d(?=_backward$|$)", "", name)


def test_every_public_op_has_an_example():
    code = "".join(example.source for test in TESTS for example in test.examples)
    called = {_family(name) for name in re.findall(r"\bops\.(\w+)\(", code)}
    missing = [name for name in ops.__all__ if name != "Cache" and _family(name) not in called]
    assert not missing


def test_every_public_op_begins_with_what_it_does():
    """A first line that is one sentence, or the beginning of one, and not too long to read."""
    for name in ops.__all__:
        text = getattr(ops, name).__doc__
        assert text is not None, name
        first = text.strip().splitlines()[0]
        assert re.match(r"[A-Z][a-z]+(-\w+)? ", first), f"{name}: {first}"
