"""Steps whose gradients or running statistics are not finite change nothing."""

import numpy as np
import pytest

from portacnn.errors import NotFiniteError
from portacnn.layers import BatchNorm2d, Conv2d, Flatten, Linear, ReLU
from portacnn.models import Model
from portacnn.seeds import permutation
from portacnn.training import Trainer
from support.bright_rows import COUNT, EPOCHS, SIZE, net, same, trainer
from support.matrix import EACH_LIBRARY

pytestmark = EACH_LIBRARY

# --- figures, and what is not finite --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_gradients_that_are_not_finite(backend):
    """The loss of the third step is fine, its gradients are not: with clipping that is found before
    any harm."""
    options = {"clip_norm": 1.0, "optimizer": "momentum", "accumulate": 2, "compile_step": False}
    run = trainer(net(backend.device), **options)
    backward, calls = run.model.backward, []

    def spoiled(dy, cache, **options):
        calls.append(0)
        return backward(dy * float("inf") if len(calls) == 5 else dy, cache, **options)

    run.model.backward = spoiled
    with pytest.raises(
        NotFiniteError,
        match=r"of step 3 \(epoch 1\) is \d.*, but its gradients or running statistics are not",
    ):
        run.train()
    again = trainer(net(backend.device), **options)
    order = again.backend.asarray(permutation(5, 0, COUNT))
    for first in (0, SIZE):
        again.run_batch(order[first : first + SIZE])
    same(run.model.state_dict(), again.model.state_dict())
    run.model.backward = backward
    run.train()  # begins the epoch anew
    assert len(run.train_loss_list) == 3 * EPOCHS


# --- from the command line ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_running_statistics_are_those_of_the_last_good_step_too(backend):
    net = Model(
        conv=Conv2d(1, 4, 3), bn=BatchNorm2d(4), relu=ReLU(), flatten=Flatten(), fc=Linear(None, 4)
    )
    net.build((1, 8, 8), device=backend.device, seed=0)
    x, t = np.random.default_rng(0).random((60, 1, 8, 8)).astype("float32"), np.arange(60) % 4
    x[40:] *= 1e30  # their squares overflow
    run = Trainer(net, x, t, x[:8], t[:8], epochs=1, mini_batch_size=20, seed=0, verbose=False)
    run.run_batch(run.backend.asarray(np.arange(20)))
    before = net.state_dict()
    run.run_batch(run.backend.asarray(np.arange(40, 60)))
    run.run_batch(run.backend.asarray(np.arange(20, 40)))
    for path, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[path])
    with pytest.raises(NotFiniteError, match="step 2"):
        run._read_losses()


def test_a_finite_loss_with_gradients_that_are_not_changes_nothing(backend):
    net = Model(flatten=Flatten(), a=Linear(None, 3), b=Linear(None, 4)).build(
        (1, 2, 2), device=backend.device, seed=0
    )
    state = {path: 0 * value for path, value in net.state_dict().items()}
    state["b.weight"] = np.where(np.arange(12).reshape(4, 3) % 2, 2e38, -2e38).astype("float32")
    net.load_state_dict(state)
    x, t = (
        100 * np.random.default_rng(0).standard_normal((20, 1, 2, 2)).astype("float32"),
        np.arange(20) % 4,
    )
    run = Trainer(net, x, t, x, t, epochs=1, mini_batch_size=20, verbose=False)
    with (
        pytest.raises(NotFiniteError, match="its gradients or running statistics are not finite"),
        np.errstate(all="ignore"),
    ):
        run.train()
    for path, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[path])
