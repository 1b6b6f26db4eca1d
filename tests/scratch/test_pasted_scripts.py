"""Scripts in the manner of the book, pasted and run."""

import os
import subprocess
import sys

import pytest

from support.matrix import needs
from support.scratch_nets import ROOT, SAMPLE

# In the manner of the book's scripts, but for the import and for less data. No pyplot: what would
# be drawn is printed.
TRAIN_CONVNET = """
import numpy as np
from portacnn.scratch import load_mnist, SimpleConvNet, Trainer

(x_train, t_train), (x_test, t_test) = load_mnist(flatten=False)
x_train, t_train = x_train[:400], t_train[:400]
x_test, t_test = x_test[:150], t_test[:150]

max_epochs = 2
network = SimpleConvNet(input_dim=(1, 28, 28),
                        conv_param={'filter_num': 6, 'filter_size': 5, 'pad': 0, 'stride': 1},
                        hidden_size=20, output_size=10, weight_init_std=0.01)
trainer = Trainer(network, x_train, t_train, x_test, t_test,
                  epochs=max_epochs, mini_batch_size=100,
                  optimizer='Adam', optimizer_param={'lr': 0.001},
                  evaluate_sample_num_per_epoch=100)
trainer.train()
network.save_params("params.pkl")
network.load_params("params.pkl")
x = np.arange(max_epochs)
assert len(x) == len(trainer.train_acc_list) == len(trainer.test_acc_list)
print("kind", type(network.params['W1']).__module__, network.params['W1'].shape)
"""


GRADIENT_CHECK = """
import numpy as np
from portacnn.scratch import SimpleConvNet

network = SimpleConvNet(input_dim=(1, 10, 10),
                        conv_param={'filter_num': 3, 'filter_size': 3, 'pad': 0, 'stride': 1},
                        hidden_size=5, output_size=10, weight_init_std=0.01, seed=0)
np.random.seed(0)  # unseeded, a ReLU's bend may lie within a difference's step
X = np.random.rand(100).reshape((1, 1, 10, 10))
T = np.array([1]).reshape((1, 1))
grad_num = network.numerical_gradient(X, T)
grad = network.gradient(X, T)
for key, val in grad_num.items():
    difference = np.abs(grad_num[key] - grad[key]).mean()
    assert difference < 1e-6, (key, difference)
"""


TWO_LAYERS = """
import numpy as np
from portacnn.scratch import *

def predict(x):
    return softmax(sigmoid(x @ params['W1'] + params['b1']) @ params['W2'] + params['b2'])

(x_train, t_train), _ = load_mnist(normalize=True, one_hot_label=True)
params = {'W1': 0.01 * np.random.randn(784, 3), 'b1': np.zeros(3),
          'W2': 0.01 * np.random.randn(3, 10), 'b2': np.zeros(10)}
x, t = x_train[:5], t_train[:5]
loss_W = lambda W: cross_entropy_error(predict(x), t)
before = loss_W(None)
for i in range(3):
    grads = {}
    for key in ('b1', 'W2', 'b2'):
        grads[key] = numerical_gradient(loss_W, params[key])
    for key in grads:
        params[key] -= 1.0 * grads[key]
assert loss_W(None) < before - 0.1
print("loss %.3f -> %.3f" % (before, loss_W(None)))
"""


DEEP = """
import numpy as np
from portacnn.scratch import *

class DeepNet:
    def __init__(self):
        he = np.sqrt(2.0 / np.array([9, 36, 4 * 8 * 8, 20]))
        self.params = {}
        for i, shape in enumerate([(4, 1, 3, 3), (4, 4, 3, 3), (4 * 8 * 8, 20), (20, 10)]):
            self.params['W' + str(i + 1)] = he[i] * np.random.randn(*shape)
            self.params['b' + str(i + 1)] = np.zeros(shape[0] if i < 2 else shape[1])
        p = self.params
        self.layers = [Convolution(p['W1'], p['b1'], 1, 1), Relu(),
                       Pooling(pool_h=2, pool_w=2, stride=2),
                       Convolution(p['W2'], p['b2'], 1, 2), Relu(),
                       Pooling(pool_h=2, pool_w=2, stride=2),
                       Affine(p['W3'], p['b3']), Relu(), Dropout(0.1),
                       Affine(p['W4'], p['b4']), Dropout(0.1)]
        self.last_layer = SoftmaxWithLoss()

    def predict(self, x, train_flg=False):
        for layer in self.layers:
            x = layer.forward(x, train_flg) if isinstance(layer, Dropout) else layer.forward(x)
        return x

    def loss(self, x, t):
        return self.last_layer.forward(self.predict(x, train_flg=True), t)

    def accuracy(self, x, t):
        return np.sum(np.argmax(self.predict(x), axis=1) == t) / x.shape[0]

    def gradient(self, x, t):
        self.loss(x, t)
        dout = self.last_layer.backward(1)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        grads = {}
        for i, place in enumerate((0, 3, 6, 9)):
            grads['W' + str(i + 1)] = self.layers[place].dW
            grads['b' + str(i + 1)] = self.layers[place].db
        return grads

(x_train, t_train), (x_test, t_test) = load_mnist(flatten=False)
trainer = Trainer(DeepNet(), x_train[:1000], t_train[:1000], x_test[:200], t_test[:200],
                  epochs=3, mini_batch_size=50, optimizer='Adam',
                  optimizer_param={'lr': 0.005}, verbose=False)
trainer.train()
assert trainer.test_acc_list[-1] > 0.7, trainer.test_acc_list
"""


def paste(tmp_path, *scripts, **environment):
    """Run scripts, each as a program, one after the other in a process; what they print."""
    names = [f"pasted{number}.py" for number in range(len(scripts))]
    for name, code in zip(names, scripts, strict=True):
        (tmp_path / name).write_text(code, encoding="utf-8")
    run_all = "import runpy, sys; [runpy.run_path(name, None, '__main__') for name in sys.argv[1:]]"
    variables = {**os.environ, "PORTACNN_DATA": str(SAMPLE), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            run_all,
            *names,
        ],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "library", ["numpy", pytest.param("torch", marks=needs("torch")), "array_api_strict"]
)
def test_train_convnet_pasted(tmp_path, library):
    """The library is the variable's, and nothing else is changed."""
    output = paste(tmp_path, TRAIN_CONVNET, PORTACNN_BACKEND=library)
    assert "=== epoch:2, train acc:" in output
    assert f"kind {library}" in output
    assert (tmp_path / "params.pkl").read_bytes()[8:9] == b"{"


def test_pasted(tmp_path):
    paste(tmp_path, GRADIENT_CHECK, TWO_LAYERS, DEEP)
