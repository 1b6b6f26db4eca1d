"""61 networks that PyTorch's two exporters write in seven ways: loaded, values and gradients are
PyTorch's in float64.

The exporters cannot write all of them in each way; these are skipped.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portacnn.onnx
from portacnn.layers import gradients_of
from portacnn.layers.base import run

torch = pytest.importorskip("torch")
networks: Any = pytest.importorskip("support.torch_networks")
pytestmark = pytest.mark.slow

SCRIPT = {"opset 9": (9, False), "opset 11": (11, False), "opset 17": (17, False)}
SCRIPT["opset 17, any batch"] = (17, True)
DYNAMO = {"plain": (False, True), "any batch": (True, True), "not optimized": (False, False)}
NOT_OURS = {
    ("deeplab", "opset 9"): "Upsample of opset 9 has other coordinates than PyTorch",
    ("convnext", "any batch"): "pooling is written as Gather over all samples' elements",
}


IN_FLOAT32 = {"activations", "mobilenet_v3"}
"""Networks whose files have constants in float32 (those of SELU, 1/6): their gradients differ."""


def exported(net: Any, x: tuple[Any, ...], path: Path, **options: Any) -> bool:
    """Return whether the exporter could write the file."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(net, x, str(path), **options)
        except Exception:  # its own errors are of many kinds
            return False
    return True


def agrees(net: Any, shapes: Any, path: Path, names: list[str], close: float) -> None:
    torch.manual_seed(1)
    given = [torch.randn(3, *s, dtype=torch.float64, requires_grad=True) for s in shapes]
    expected = net(*given)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    ups = [torch.randn_like(y) for y in expected]
    net.zero_grad()
    sum((y * up).sum() for y, up in zip(expected, ups, strict=True)).backward()
    model = portacnn.onnx.load(path)
    assert model.dtype == "float64"
    x: Any = {name: a.detach().numpy() for name, a in zip(names, given, strict=True)}
    x = x if len(names) > 1 else x[names[0]]
    got = model.predict(x)
    for y, want in zip(got.values() if isinstance(got, dict) else [got], expected, strict=True):
        np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-9, atol=1e-9)

    def row(parts: list[Any]) -> Any:
        arrays = [part.numpy() for part in parts]
        one = len(arrays) == 1
        return arrays[0] if one else np.concatenate([a.reshape(3, -1) for a in arrays], 1)

    with gradients_of(model) as gradients:
        _, cache = run(model, model.batch(model.accept(x)), False, True)
        dx = model.backward(row(ups), cache)
    np.testing.assert_allclose(dx, row([a.grad for a in given]), rtol=1e-9, atol=1e-9)
    state = model.state_dict()
    for name, parameter in net.named_parameters():  # of those that the exporter did not change
        if name in gradients and np.array_equal(state[name], parameter.detach().numpy()):
            want = parameter.grad.numpy()
            np.testing.assert_allclose(
                gradients[name], want, rtol=close, atol=0.1 * close, err_msg=f"{path.name}: {name}"
            )


def checked(name: str, way: str, net: Any, path: Path) -> None:
    if (name, way) not in NOT_OURS:
        shapes = networks.NETWORKS[name][1]
        close = 1e-7 if name in IN_FLOAT32 else 1e-8
        agrees(net, shapes, path, [f"x{i}" for i in range(len(shapes))], close)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_torchscript(name: str, tmp_path: Path):
    net, shapes = networks.made(name), networks.NETWORKS[name][1]
    x = tuple(torch.randn(1, *shape, dtype=torch.float64) for shape in shapes)
    names, done = [f"x{i}" for i in range(len(shapes))], 0
    for way, (opset, any_batch) in SCRIPT.items():
        axes = {each: {0: "n"} for each in names} if any_batch else None
        path = tmp_path / f"{way}.onnx"
        options = {"opset_version": opset, "input_names": names, "dynamic_axes": axes}
        if exported(net, x, path, dynamo=False, **options):
            checked(name, way, net, path)
            done += 1
    if not done:
        pytest.skip("the exporter writes it in no way")


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_dynamo(name: str, tmp_path: Path):
    pytest.importorskip("onnxscript")
    net, shapes = networks.made(name), networks.NETWORKS[name][1]
    names, n = [f"x{i}" for i in range(len(shapes))], torch.export.Dim("n", min=1, max=1024)
    for way, (any_batch, optimize) in DYNAMO.items():
        count = 3 if any_batch else 1
        x = tuple(torch.randn(count, *shape, dtype=torch.float64) for shape in shapes)
        dims: Any = tuple({0: n} for _ in names)
        dims = (dims,) if isinstance(net, networks.Fn) else dims  # it takes *x
        path = tmp_path / f"{way}.onnx"
        assert exported(
            net,
            x,
            path,
            dynamo=True,
            input_names=names,
            external_data=False,
            verbose=False,
            optimize=optimize,
            dynamic_shapes=dims if any_batch else None,
        )
        checked(name, way, net, path)
