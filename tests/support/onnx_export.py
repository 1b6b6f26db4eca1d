"""Networks exported, checked by onnx and run by onnxruntime."""

import sys

import numpy as np
import onnx
import onnxruntime as runtime

from portacnn import models as M
from portacnn.onnx import export as public_export
from portacnn.onnx import load

exporting, building = sys.modules["portacnn.onnx.export"], sys.modules["portacnn.onnx.builder"]


NEWEST = min(exporting.NEWEST, onnx.defs.onnx_opset_version())


# Where something is written differently from one version to the next, and both ends.
OPSETS = sorted({13, 17, 18, 20, NEWEST})


MODELS = {
    "SimpleConvNet": lambda **given: M.SimpleConvNet(weight_init_std="he", **given),
    "LeNet5": lambda **given: M.LeNet5(**given),
    "LeNet5 modern": lambda **given: M.LeNet5(variant="modern", **given),
    "DeepConvNet": lambda **given: M.DeepConvNet(**given),
    "ResNet20": lambda **given: M.ResNet20(**given),
    "ResNet20 B": lambda **given: M.ResNet20(option="B", **given),
    "UNet": lambda **given: M.UNet(1, 2, depth=2, width=4, input_size=12, **given),
    "UNet bilinear": lambda **given: M.UNet(
        1, 2, depth=2, width=4, up="bilinear", input_size=12, **given
    ),
}


def filled(network, seed=0):
    """The network with numbers in all its parameters and buffers that are neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, array in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.asarray(7)
        elif name.endswith("zero_point"):
            state[name] = np.arange(array.size).reshape(array.shape)
        elif name.endswith(("running_var", "scale")):
            state[name] = rng.uniform(0.5, 2.0, array.shape)
        else:
            state[name] = rng.standard_normal(array.shape) / np.sqrt(
                max(np.prod(array.shape[1:]), 1)
            )
    network.load_state_dict(state)
    return network


def images(network, count, dtype="float32", seed=1):
    return (2 * np.random.default_rng(seed).standard_normal((count, *network.input_shape))).astype(
        dtype
    )


def run(path, x):
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"input": x})
    return y


def export(network, folder, **options):
    """Export to a file that passes onnx's own full check; gives its path."""
    path = folder / "model.onnx"
    public_export(network, path, **options)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def nodes(path):
    return list(onnx.load(path, load_external_data=False).graph.node)


def close(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_allclose(
        got, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max(initial=0.0))
    )


def agrees(network, folder, opsets=(18,), back=True):
    """onnxruntime gives what the network gives, for batches of 1 and 7 by one file; so does the
    file of the last opset when it is read ``back``."""
    for opset in opsets:
        path = export(network, folder, opset=opset)
        for count in (1, 7):
            x = images(network, count)
            close(run(path, x), network(x))
    if back:
        close(load(path)(x), network(x))
