"""The state of optimizers, in files and arrays."""

import json

import numpy as np
import pytest

from portacnn.errors import ModelFormatError
from portacnn.optim import (
    Adam,
    Momentum,
)
from support.matrix import EACH_LIBRARY
from support.optimizers import CASES, SHAPES, WORDS, close, given, gradients, start, writable


@EACH_LIBRARY
@pytest.mark.parametrize(("kind", "name", "arguments"), CASES, ids=WORDS)
def test_state_goes_to_a_file_and_back(backend, tmp_path, kind, name, arguments):
    from portacnn.files import load_tensors, save_tensors

    def steps(optimizer, params, numbers):
        for step in numbers:
            optimizer.update(params, given(backend, gradients(step)))

    whole, straight = writable(backend, start()), kind(**arguments)
    steps(straight, whole, range(8))
    params, first = writable(backend, start()), kind(**arguments)
    steps(first, params, range(4))
    first.lr = straight.lr * 2
    state = first.state_dict()
    steps(first, writable(backend, start(1)), range(3))  # the state is a copy
    save_tensors(
        tmp_path / "state", state["arrays"], {key: state[key] for key in state if key != "arrays"}
    )
    arrays, header = load_tensors(tmp_path / "state")
    assert json.loads(json.dumps(header)) == header
    again = kind(**arguments)
    again.load_state_dict({**header, "arrays": arrays}, params)
    assert (again.lr, again.steps, again.counts) == (2 * straight.lr, 4, dict.fromkeys(SHAPES, 4))
    again.lr = straight.lr
    steps(again, params, range(4, 8))
    close(backend, params, {path: backend.host(value) for path, value in whole.items()}, 0.0)
    assert again.steps == 8


def test_state_is_written_into_the_arrays_that_are_there(backend):
    params, optimizer = writable(backend, start()), Momentum(0.1)
    optimizer.update(params, given(backend, gradients(0)))
    arrays, state = dict(optimizer.state["velocity"]), optimizer.state_dict()
    optimizer.update(params, given(backend, gradients(1)))
    optimizer.load_state_dict(state, params)
    assert all(optimizer.state["velocity"][path] is arrays[path] for path in arrays)
    close(backend, optimizer.state["velocity"], gradients(0), 0.0)
    assert optimizer.steps == 1
    for host in state["arrays"].values():
        assert isinstance(host, np.ndarray)


def test_state_takes_the_dtype_of_the_parameters(backend):
    optimizer = Adam()
    optimizer.update(writable(backend, start()), given(backend, gradients(0)))
    narrow, params = Adam(), writable(backend, start(), "float32")
    narrow.load_state_dict(optimizer.state_dict(), params)
    assert narrow.state["mean"]["scale"].dtype == backend.xp.float32
    narrow.update(params, given(backend, gradients(1), "float32"))


def test_state_that_does_not_fit(backend):
    params, optimizer = writable(backend, start()), Momentum(0.1)
    optimizer.update(params, given(backend, gradients(0)))
    good = optimizer.state_dict()
    arrays = good["arrays"]
    fewer = {path: params[path] for path in params if path != "scale"}
    bad = [
        ({**good, "optimizer": "Adam"}, params, "expected the state of Momentum, got that of Adam"),
        ({key: good[key] for key in good if key != "counts"}, params, "counts missing"),
        (
            {**good, "arrays": {**arrays, "mean.scale": np.zeros(())}},
            params,
            "unexpected: mean.scale",
        ),
        (
            {**good, "arrays": {k: v for k, v in arrays.items() if "fc1" not in k}},
            params,
            "missing: velocity.fc1.weight",
        ),
        (
            {**good, "arrays": {**arrays, "velocity.scale": np.zeros(2)}},
            params,
            r"velocity.scale \(2,\) \(expected \(\)\)",
        ),
        (good, fewer, "unknown parameters: scale"),
        ({**good, "steps": -1}, params, "steps must be"),
        ({**good, "lr": "0.1"}, params, "lr must be"),
        ({**good, "counts": {**good["counts"], "scale": 0}}, params, "the count of scale"),
    ]
    before = optimizer.state_dict()
    for state, these, message in bad:
        with pytest.raises(ModelFormatError, match=message):
            optimizer.load_state_dict(state, these)
    after = optimizer.state_dict()
    assert {k: after[k] for k in after if k != "arrays"} == {
        k: before[k] for k in before if k != "arrays"
    }
    assert all((after["arrays"][name] == before["arrays"][name]).all() for name in before["arrays"])
