"""portacnn.plot: each figure shows the values that it should, from arrays of any library, and draws
without touching pyplot."""

import io
import subprocess
import sys

import numpy as np
import pytest

import portacnn
from portacnn import plot
from portacnn.data import Dataset
from portacnn.errors import ArgumentError, DependencyError, ShapeError
from portacnn.layers import Conv2d, Flatten, GlobalAvgPool, Linear, MaxPool2d, ReLU
from portacnn.models import Model, ModelInfo, grad_cam, saliency
from portacnn.plot.embedding import principal_components
from support.matrix import EACH_LIBRARY, needs

pytestmark = needs("matplotlib")
NAMES = ("a cat with a name that is very long", "$x_1$ <b>", "Größe")
X = np.random.default_rng(3).random((12, 3, 8, 8)).astype("float32")
T = np.arange(12) % 3


@pytest.fixture(scope="module")
def model():
    layers = {"conv": Conv2d(3, 4, 3, padding=1), "relu": ReLU(), "pool": MaxPool2d(2)}
    made = Model(**layers, mean=GlobalAvgPool(), flatten=Flatten(), fc=Linear(None, 3))
    made.build((3, 8, 8), device="cpu", seed=0)
    made.info = ModelInfo(class_names=NAMES)
    return made


@pytest.fixture(autouse=True)
def every_figure_draws(monkeypatch):
    """What a test makes is drawn, small: errors of layout and fonts come only then."""
    from matplotlib.figure import Figure

    made, init = [], Figure.__init__

    def kept(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "__init__", kept)
    yield
    for figure in made:
        figure.savefig(io.BytesIO(), dpi=30)
    assert "matplotlib.pyplot" not in sys.modules


def images_of(figure):
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def texts_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_curves():
    history = {"train_loss": [2.0, 1.0], "test_loss": [3.0, None], "lr": [0.1, 0.05]}
    history |= {"train_f1": [0.25, 0.5], "test_f1": [0.125, 0.75], "seconds": [1.0, 1.0]}
    history |= {"train_by_class": [[1, 2], [3, 4]]}
    figure = plot.curves(history, title="a title")
    assert figure.get_suptitle() == "a title"
    drawn = {a.get_ylabel(): [list(line.get_ydata()) for line in a.lines] for a in figure.axes}
    assert list(drawn) == ["loss", "f1", "learning rate"]
    assert drawn["f1"] == [[0.25, 0.5], [0.125, 0.75]]
    assert np.isnan(drawn["loss"][1][1])
    styles = {(line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(styles) == 2  # not by colour alone
    assert [a.get_ylabel() for a in plot.curves({**history, "lr": [1, 1]}).axes] == ["loss", "f1"]
    assert [a.get_ylabel() for a in plot.curves(history, ["lr"]).axes] == ["learning rate"]
    with pytest.raises(ArgumentError, match="no 'accuracy'; it has loss, f1, lr"):
        plot.curves(history, ["accuracy"])
    with pytest.raises(ArgumentError, match="nothing to draw"):
        plot.curves({"train_loss": []})


def test_filters(model):
    figure = plot.filters(model)
    weight = model.state_dict()["conv.weight"]
    shown = images_of(figure)
    assert len(shown) == 4
    expected = 0.5 + weight / (2 * abs(weight).max())
    for kernel, image in zip(expected, shown, strict=True):
        assert np.allclose(image, kernel.transpose(1, 2, 0), atol=1e-6)
    assert len(images_of(plot.filters(model, "conv", most=2))) == 2
    with pytest.raises(ArgumentError, match=r"fc \(Linear\): filters are those of a two-dim"):
        plot.filters(model, "fc")


def test_feature_maps(model):
    first, *maps = images_of(plot.feature_maps(model, X[0], "relu"))[:5]
    assert np.allclose(first, X[0].transpose(1, 2, 0))
    assert np.array_equal(np.stack(maps), model.features(X[:1], "relu")[0])
    with pytest.raises(ShapeError, match="expected one image"):
        plot.feature_maps(model, X, "relu")
    with pytest.raises(ShapeError, match="feature maps need a layer"):
        plot.feature_maps(model, X[0], "fc")


def counted(model):
    predicted = model.predict(X).argmax(1)
    counts = np.zeros((3, 3), int)
    for true, said in zip(T, predicted, strict=True):
        counts[true, said] += 1
    return counts


def test_confusion_matrix(model):
    counts = counted(model)
    figure = plot.confusion_matrix(model, X, T)
    assert np.allclose(images_of(figure)[0], counts / 4)
    assert sorted(texts_of(figure)) == sorted(str(n) for n in counts.ravel() if n)
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels[1:] == [r"\$x_1\$ <b>", "Größe"]
    assert len(labels[0]) <= 18
    of_set = plot.confusion_matrix(model, Dataset(X, T), normalize=False)
    assert np.array_equal(images_of(of_set)[0], counts)


def test_worst_errors(model):
    logits = model.predict(X).astype(float)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = [i for i in np.argsort(-shares.max(1)) if logits[i].argmax() != T[i]]
    figure = plot.worst_errors(model, X, T, most=3)
    assert len(figure.axes) >= 3
    for index, axes in zip(wrong[:3], figure.axes, strict=False):
        assert np.allclose(np.asarray(axes.images[0].get_array()), X[index].transpose(1, 2, 0))
        assert f"({shares[index].max():.0%})" in axes.get_title()
    right = model.predict(X).argmax(1)
    assert "no errors in 12 images" in plot.worst_errors(model, X, right).texts[0].get_text()
    with pytest.raises(ArgumentError, match="images with labels"):
        plot.worst_errors(model, X)


def test_saliency_and_grad_cam(model):
    found = images_of(plot.saliency(model, X[0], 1))
    assert np.array_equal(found[1], saliency(model, X[:1], 1)[0])
    seen = images_of(plot.grad_cam(model, X[0], "pool", 2))
    small = grad_cam(model, X[:1], "pool", 2)[0]
    assert seen[2].shape == (8, 8)
    # a cell's centre lies between two pixels: their mean is the cell, inside the image
    middle = seen[2][3:5, 3:5].mean(), small[1:3, 1:3].mean()
    assert np.isclose(*middle, atol=1e-6)
    assert "Größe" in plot.grad_cam(model, X[0], "pool", 2).get_suptitle()


def test_receptive_field(model):
    figure = plot.receptive_field(model, "pool", (0, 2), X[0])
    box = figure.axes[0].patches[-1]
    # rows 0..2 of the padded windows -1..2, columns 3..6
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (2.5, -0.5, 4, 3)
    assert "field 4x4, stride 2x2" in figure.axes[0].get_title()
    plot.receptive_field(model, "fc")


def test_embedding(model):
    figure = plot.embedding(model, X, T)
    placed = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    features = model.features(X, "flatten").astype(float)
    values, vectors = np.linalg.eigh(np.cov(features.T))
    expected = ((features - features.mean(0)) @ vectors[:, ::-1][:, :2])[
        np.argsort(T, kind="stable")
    ]
    assert np.allclose(abs(placed), abs(expected), atol=1e-5)
    assert f"({values[-1] / values.sum():.0%} of the variance)" in figure.axes[0].get_xlabel()
    assert (
        len(
            {
                (tuple(c.get_facecolor()[0]), len(c.get_paths()[0]))
                for c in figure.axes[0].collections
            }
        )
        == 3
    )
    plot.embedding(model, X)
    with pytest.raises(ArgumentError, match="at least two images"):
        plot.embedding(model, X[:1])


def test_principal_components_of_few():
    placed, shares = principal_components([[1.0, 1.0], [3.0, 3.0]])
    assert np.allclose(abs(placed), [[2**0.5, 0], [2**0.5, 0]])
    assert np.allclose(shares, [1, 0])
    assert np.array_equal(principal_components([[1.0], [1.0]])[0], np.zeros((2, 2)))


def test_segmentation():
    mask = np.zeros((8, 8), int)
    mask[2:5, 3:6], mask[6, 6] = 1, -1
    figure = plot.segmentation(X[0], mask, names=["ground", "$tree", "sky"])
    over = images_of(figure)[2]
    assert np.array_equal(over[..., 3] > 0, mask == 1)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [r"\$tree"]
    outputs = np.stack([mask == k for k in range(2)]).astype(float)
    assert np.array_equal(images_of(plot.segmentation(X[0], outputs))[2][..., 3] > 0, mask == 1)
    with pytest.raises(ShapeError, match=r"expected a mask \(8, 8\), got \(4, 4\)"):
        plot.segmentation(X[0], mask[:4, :4])


def test_neighbors():
    queries, found = [X[0], X[1]], [[X[2], None, X[3]], [X[4]]]
    right = [[True, False, False], [True]]
    captions = [["q", "a", "$b", "c"], ["r", "d"]]
    figure = plot.neighbors(queries, found, captions=captions, right=right)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    expected = [X[0], X[2], X[3], X[1], X[4]]
    assert all(np.allclose(a, b.transpose(1, 2, 0)) for a, b in zip(shown, expected, strict=True))
    assert [axes.get_title() for axes in figure.axes] == [
        "q", "✓ a", r"✗ \$b", "✗ c", "r", "✓ d", "", "",
    ]  # fmt: skip
    lines = [axes.spines["left"] for axes in figure.axes[1:3]]
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert lines[0].get_edgecolor() != lines[1].get_edgecolor()
    for wrong in ([[X[2]]], []):
        with pytest.raises(ArgumentError, match="a row of found for each of 2"):
            plot.neighbors(queries, wrong)
    with pytest.raises(ArgumentError, match="queries"):
        plot.neighbors([], [])


def test_boxes():
    found = [[1, 2, 5, 7], [0, 0, 8, 8]]
    figure = plot.boxes(X[0], found, [1, 0], [0.5, 0.25], truth=[[1, 1, 2, 2]], names=["a", "b"])
    assert texts_of(figure) == ["b 50%", "a 25%"]
    corners = [
        (p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in figure.axes[0].patches
    ]
    assert corners.count((0.5, 1.5, 4, 5)) == 2  # on a white line
    assert any(p.get_linestyle() == "--" for p in figure.axes[0].patches)
    assert plot.boxes(X[0], []).axes[0].patches[:] == []
    _, right = figure.subplots(1, 2)
    assert plot.boxes(X[0], found, axes=right) is figure
    assert len(right.patches) == 4
    with pytest.raises(ShapeError, match=r"boxes \(M, 4\)"):
        plot.boxes(X[0], [[1, 2, 3]])
    with pytest.raises(ShapeError, match=r"expected scores \(2,\)"):
        plot.boxes(X[0], found, [0, 1], [0.5])


@EACH_LIBRARY
def test_arrays_of_each_library(backend):
    net = portacnn.SimpleConvNet((1, 8, 8), {"filter_size": 3}, device=backend.device, seed=0)
    x, t = backend.array(X[:, :1]), backend.array(T)
    figures = [
        plot.filters(net),
        plot.feature_maps(net, x[0, ...], "conv1"),
        plot.confusion_matrix(net, x, t),
        plot.worst_errors(net, x, t, most=1),
        plot.saliency(net, x[0, ...]),
        plot.grad_cam(net, x[0, ...]),
        plot.receptive_field(net, "pool1", (), x[0, ...]),
        plot.embedding(net, x, t),
        plot.segmentation(x[0, ...], backend.array(np.eye(8, dtype="int64"))),
        plot.boxes(x[0, ...], backend.array(np.asarray([[1.0, 1.0, 3.0, 4.0]]))),
        plot.neighbors([x[0, ...]], [[x[1, ...]]]),
    ]
    assert all(figure.axes for figure in figures)
    for figure in figures:
        figure.clear()  # drawn on NumPy above


def test_without_matplotlib(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r'pip install "portacnn\[plot\]"'):
        plot.filters(model)


def test_matplotlib_is_imported_when_needed():
    code = "import sys, portacnn.plot; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
