"""Arrays that can be written to around immutable ones (``backends.immutable``), on a library that
has the array API standard and nothing else."""

import copy
import pickle

import numpy as np
import pytest

from portacnn import ops, resolve, runtime
from portacnn.errors import ArrayError, BackendError
from support.immutable_library import ToyArray, toylib
from support.nets import small_net
from support.small_trainings import trainer


@pytest.fixture(scope="module")
def home():
    yield resolve(toylib)
    runtime._given.clear()  # other tests list all backends
    runtime._adapter.cache_clear()
    runtime._by_type.clear()


def test_the_library_itself_refuses_to_be_written_to():
    x = toylib.zeros((2, 3))
    with pytest.raises(TypeError):
        x[0, 0] = 1.0
    before = x
    x += 1.0  # another array
    assert x is not before
    assert float(before[0, 0]) == 0.0


def test_resolve_takes_a_namespace_and_then_its_name(home):
    assert (home.name, home.views_alias, home.wraps) == ("toylib", False, True)
    assert resolve("toylib") == home
    assert resolve(toylib) == home
    assert copy.deepcopy(home) is home
    assert pickle.loads(pickle.dumps(home)) == home
    assert resolve(np).name == "numpy"
    with pytest.raises(BackendError, match="toylib's devices"):
        resolve("toylib:mars")


KEYS = [
    ...,
    (1, ...),
    (-1, ...),
    (1, 2),
    (slice(None), 0),
    (slice(1, 3), slice(None, None, 2)),
    (slice(None, None, -1), slice(3, 0, -2)),
    (..., slice(-2, None)),
    (slice(2, 2), slice(None)),
    (0, ..., 3),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_writing_to_parts_is_numpys(home, key):
    expected = np.arange(20, dtype="float32").reshape(4, 5)
    alias = array = home.asarray(expected)
    values = -1.0 - np.arange(np.empty((4, 5))[key].size, dtype="float32")
    values = values.reshape(expected[key].shape)
    expected[key] = values
    array[key] = home.asarray(values)
    np.testing.assert_array_equal(home.to_host(array), expected)
    expected[key] *= 3
    array[key] *= 3.0
    np.testing.assert_array_equal(home.to_host(array), expected)
    expected[key] = 7
    array[key] = 7.0
    np.testing.assert_array_equal(home.to_host(array), expected)
    assert alias is array


def test_masks_and_in_place_operators(home):
    xp, host = home.xp, np.arange(6, dtype="float32").reshape(2, 3)
    x = same = home.asarray(host)
    part, whole = x[0, ...], xp.asarray(x)
    x[x > 3.0] = -1.0
    x += 1.0
    x /= 2.0
    x @= home.asarray(np.eye(3, dtype="float32"))
    expected = (np.where(host > 3, -1, host) + 1) / 2
    np.testing.assert_array_equal(home.to_host(x), expected)
    assert x is same is whole
    assert x.dtype == xp.float32
    np.testing.assert_array_equal(home.to_host(part), host[0])  # a slice is no view
    with pytest.raises(ValueError, match="shape"):
        x += xp.zeros((4, 2, 3), dtype=xp.float32)
    with pytest.raises(IndexError, match="mask"):
        x[xp.zeros((1,), dtype=xp.int64)] = 0.0
    with pytest.raises(IndexError, match="out of range"):
        x[2] = 0.0


def test_ops_take_and_return_the_librarys_own_arrays(home):
    host = np.array([[-1.0, 2.0]], dtype="float32")
    y, cache = ops.relu(toylib.asarray(host))
    dx = ops.relu_backward(toylib.ones((1, 2), dtype=toylib.float32), cache)
    assert type(y) is type(dx) is ToyArray
    assert (home.to_host(y).tolist(), home.to_host(dx).tolist()) == ([[0.0, 2.0]], [[0.0, 1.0]])
    with pytest.raises(ArrayError, match="params is written to, but toylib's arrays are immutable"):
        ops.sgd_update([toylib.ones((2,))], [toylib.ones((2,))], lr=0.1)


def test_a_model_trains_as_on_numpy(home):
    losses = {}
    for device in ("numpy", home):
        run = trainer(small_net(device), epochs=2)
        run.train()
        losses[str(device)] = run.train_loss_list
    ours, theirs = losses.values()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    x = np.zeros((3, *run.model.input_shape), "float32")
    y = run.model.predict(toylib.asarray(x))
    assert type(y) is ToyArray
    np.testing.assert_allclose(home.to_host(y), home.to_host(run.model.predict(x)), rtol=1e-6)
