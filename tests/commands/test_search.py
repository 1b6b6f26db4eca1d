"""``portacnn search``: an index of a folder or a set, what is found, and what is refused."""

import importlib
import json

import numpy as np
import pytest

import portacnn
from portacnn import cli
from portacnn.layers import Conv2d, GlobalAvgPool, Linear, ReLU
from portacnn.search import Index
from support.commands import CLASSES

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    layers = [Conv2d(None, 8, 3), ReLU(), GlobalAvgPool(flatten=True), Linear(None, 3)]
    model = portacnn.Model(*layers).build((3, 12, 12), device="numpy", seed=0)
    model.preprocess = portacnn.Normalize()
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    model.save(path)
    return path


def embedded(weights, shapes):
    """The means of the convolution's outputs, by loops over taps in float64; and the files."""
    net = portacnn.load(weights, device="numpy").state_dict()
    kernel, bias = (net[f"0.{name}"].astype("float64") for name in ("weight", "bias"))
    image_class = importlib.import_module("PIL.Image")
    rows, files = [], [f"{name}/{number}.png" for name in CLASSES for number in range(8)]
    for file in files:
        image = image_class.open(shapes / file).convert("RGB")
        scale = 12 / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], 2)
        left, top = (round((side - 12) / 2) for side in image.size)
        x = np.asarray(image.crop((left, top, left + 12, top + 12)), "float64") / 255
        y = sum(
            x[i : i + 10, j : j + 10] @ kernel[:, :, i, j].T for i in range(3) for j in range(3)
        )
        rows.append(np.maximum(y + bias, 0).mean(axis=(0, 1)))
    return np.stack(rows), files


def test_a_folder(command, weights, shapes, tmp_path):
    vectors, files = embedded(weights, shapes)
    done = command("search", "build", shapes, "--weights", weights, "--out", "index")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "wrote index: 24 images, 8 values each, of 2\n"
    index = Index.load("index")
    assert list(index.names) == sorted(files)
    order = [files.index(name) for name in index.names]
    np.testing.assert_allclose(index.embeddings, vectors[order], rtol=1e-4, atol=1e-6)
    query = shapes / "square" / "2.png"
    done = command("search", "query", "index", query, "--top", "5", "--json")
    (answer,) = json.loads(done.stdout)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distance = 1 - unit @ unit[files.index("square/2.png")]
    best = np.argsort(distance, kind="stable")[:5]
    assert answer["image"] == str(query)
    assert [near["name"] for near in answer["neighbors"]] == [str(shapes / files[i]) for i in best]
    np.testing.assert_allclose(
        [near["distance"] for near in answer["neighbors"]], distance[best], atol=1e-6
    )
    lines = command("search", "query", "index", query, "--top", "2").stdout.splitlines()
    assert lines[:2] == [str(query), f"  0.0000  {query}"]


def test_a_contact_sheet(command, weights, shapes, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes((shapes / "square" / f"{number}.png").read_bytes())
    (folder / "bad.png").write_text("words")
    done = command("search", "build", folder, "--weights", weights, "--out", "index")
    assert done.returncode == cli.FAILURE
    assert "bad.png: cannot be decoded" in done.stderr
    assert "3 images" in done.stdout
    (folder / "1.png").unlink()
    words = ["search", "query", "index", folder / "0.png", folder / "none.png", "--sheet", "s.png"]
    done = command(*words)
    assert done.returncode == cli.FAILURE
    assert f"there is no file {folder / 'none.png'}" in done.stderr
    assert len(done.stdout.splitlines()) == 4
    with importlib.import_module("PIL.Image").open("s.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 2 * sheet.height


def test_a_set(command, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.random((count, 1, 8, 8), dtype="float32")
              for name, count in (("x_train", 5), ("x_test", 3))}  # fmt: skip
    np.savez("set.npz", t_train=np.arange(5), t_test=np.arange(3), **arrays)
    model = portacnn.Model(Conv2d(None, 2, 3), GlobalAvgPool(flatten=True), Linear(None, 5))
    model.build((1, 8, 8), device="numpy", seed=0).save("net.safetensors")
    words = ["--weights", "net.safetensors", "--layer", "0", "--metric", "euclidean"]
    done = command("search", "build", "set.npz", *words, "--out", "index")
    assert done.returncode == 0, done.stderr
    index = Index.load("index")
    assert (len(index), index.metric, index.embeddings.shape) == (8, "euclidean", (8, 72))
    assert index.names[5:] == ("test/0", "test/1", "test/2")
    images = np.concatenate([arrays["x_train"], arrays["x_test"]])
    expected = portacnn.load("net.safetensors", device="numpy").features(images, "0")
    np.testing.assert_allclose(index.embeddings, expected.reshape(8, 72), atol=1e-6)


def test_what_is_refused(command, weights, shapes, tmp_path):
    build = ["search", "build", shapes, "--weights", weights, "--out", "index"]
    assert "there is no layer" in command.fails(*build, "--layer", "9", status=cli.USAGE_ERROR)
    assert command("search").returncode == cli.USAGE_ERROR
    assert command(*build).returncode == 0
    query, image = ["search", "query", "index"], shapes / "square" / "1.png"
    other = tmp_path / "other.safetensors"
    portacnn.Model(
        *[Conv2d(None, 8, 3), ReLU(), GlobalAvgPool(flatten=True), Linear(None, 3)]
    ).build((3, 12, 12), device="numpy", seed=1).save(other)
    said = command.fails(*query, image, "--weights", other, status=cli.USAGE_ERROR)
    assert "was made with another model" in said
    Index(np.ones((2, 8), "float32"), ["a", "b"]).save("index")
    assert "does not say which model" in command.fails(*query, image)
    for change in ({"weights": 3}, {"layer": 2}, {"files": "yes"}):
        about = {"data": "d", "files": True, "weights": "w", "layer": "2", "model": "m"}
        Index(np.ones((2, 8), "float32"), ["a", "b"], about=about | change).save("index")
        assert "does not say which model" in command.fails(*query, image)
    assert "is not an index" in command.fails("search", "query", weights, image)
    assert "none" in command.fails("search", "query", "none", image)
