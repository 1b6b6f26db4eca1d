"""The other commands: evaluate, predict, export, summary, info, bench; and what all share: help,
version, exit status."""

import importlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import portacnn
from portacnn import cli
from portacnn.commands import bench, train
from portacnn.ops import use_kernels
from support.commands import CLASSES
from support.digits import ROOT, write_digits
from support.matrix import needs

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """The folder of a run on the shapes, and its last line on the test set."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTACNN_CACHE", str(out / "cache"))
        patch.setattr(train, "installed", lambda name: name != "matplotlib")
        words = ["--data", shapes, "--image-size", "12", "--batch-size", "5", "--epochs", "30"]
        words += ["--lr", "0.005", "--seed", "0", "--quiet", "--out", out / "run"]
        with use_kernels("native"):
            assert cli.main(["train", *map(str, words)]) == 0
    return out / "run"


def read_image(path):
    """As the rule of ``ImageFolder`` has it for images of 12 to 14 pixels, by other means."""
    image = importlib.import_module("PIL.Image").open(path).convert("RGB")
    scale = 12 / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], 2)
    left, top = (round((side - 12) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 12, top + 12)), "float64")
    return pixels.transpose(2, 0, 1) / 255


def probabilities(run, paths):
    """Of images, by class: the softmax in float64 of the model's logits."""
    net = portacnn.load(run / "params.safetensors", device="numpy")
    x = np.stack([read_image(path) for path in paths]).astype("float32")
    logits = net.predict(x).astype("float64")
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_predict(command, run, shapes):
    paths = [shapes / name / "5.png" for name in CLASSES]
    p = probabilities(run, paths)
    assert list(p.argmax(axis=1)) == [0, 1, 2]
    done = command("predict", run, *paths, "--json", "--top", "2")
    assert done.returncode == 0, done.stderr
    for path, row, result in zip(paths, p, json.loads(done.stdout), strict=True):
        order = np.argsort(-row)[:2]
        assert result["image"] == str(path)
        assert [each["class"] for each in result["classes"]] == [CLASSES[i] for i in order]
        assert [e["probability"] for e in result["classes"]] == pytest.approx(row[order], abs=1e-5)
    lines = command("predict", run, *paths).stdout.splitlines()
    for path, row, line in zip(paths, p, lines, strict=True):
        order = np.argsort(-row)
        shown = ", ".join(f"{CLASSES[i]} {row[i]:.4f}" for i in order)
        assert line == f"{path}  {shown}"


def test_images_that_cannot_be_read_do_not_stop_the_others(command, run, shapes, tmp_path):
    (tmp_path / "no\nimage.png").write_text("words")
    bad, good = [tmp_path / "none.png", tmp_path / "no\nimage.png"], shapes / "square" / "1.png"
    done = command("predict", run, *bad, good)
    assert done.returncode == cli.FAILURE
    assert done.stdout.startswith(f"{good}  ")
    missing, damaged = done.stderr.splitlines()
    assert missing == f"error: there is no file {tmp_path / 'none.png'}"
    assert damaged.startswith("error: ")
    assert r"no\nimage.png: cannot be decoded as an image" in damaged
    done = command("predict", run, *bad, good, "--json")
    assert ["error" in each for each in json.loads(done.stdout)] == [True, True, False]


def test_evaluate(command, run, shapes):
    history = json.loads((run / "history.json").read_text())["history"]
    done = command("evaluate", run, "--data", shapes, "--json")
    found = json.loads(done.stdout)
    assert found["images"] == 5
    assert found["loss"] == pytest.approx(history["test_loss"][-1], rel=1e-4)
    assert found["accuracy"] == history["test_accuracy"][-1]
    everything = ["--part", "all", "--metrics", "accuracy,confusion_matrix", "--batch-size", "7"]
    found = json.loads(command("evaluate", run, "--data", shapes, *everything, "--json").stdout)
    paths = [shapes / name / f"{number}.png" for name in CLASSES for number in range(8)]
    guesses, labels = probabilities(run, paths).argmax(axis=1), np.repeat(np.arange(3), 8)
    matrix = [[int(((labels == a) & (guesses == b)).sum()) for b in range(3)] for a in range(3)]
    assert (found["images"], found["confusion_matrix"]) == (24, matrix)
    lines = command("evaluate", run, "--data", shapes, *everything).stdout.splitlines()
    assert lines[0].split() == ["images", "24"]
    assert [line.rsplit(maxsplit=3)[0].strip() for line in lines[4:]] == list(CLASSES)


def test_classes_are_matched_by_name(command, run, shapes, tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    for name in CLASSES[1:]:
        (some / name).symlink_to(shapes / name)
    words = ["evaluate", run, "--data", some, "--part", "all", "--json"]
    paths = [shapes / name / f"{number}.png" for name in CLASSES[1:] for number in range(8)]
    right = probabilities(run, paths).argmax(axis=1) == np.repeat([1, 2], 8)
    assert json.loads(command(*words).stdout)["accuracy"] == right.mean() > 0.8
    (some / "hexagon").symlink_to(shapes / "square")
    assert "the classes hexagon, which the model does not know" in command.fails(*words)


@needs("onnx")
def test_export_and_the_exported_file(command, run, shapes, tmp_path):
    import onnx

    done = command("export", run, "net.onnx")
    assert done.stdout == "wrote net.onnx: input (N, 3, 12, 12) float32, opset 18\n"
    assert onnx.load("net.onnx").producer_version == portacnn.__version__
    assert command("export", run, "bytes.onnx", "--uint8", "--fixed-batch").returncode == 0
    (entry,) = onnx.load("bytes.onnx").graph.input
    assert [d.dim_value for d in entry.type.tensor_type.shape.dim] == [1, 3, 12, 12]
    assert entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    same = [command("predict", net, shapes / "square" / "2.png") for net in (run, "net.onnx")]
    assert same[0].stdout == same[1].stdout != ""
    assert "opset" in command.fails("export", run, "net.onnx", "--opset", "3", status=2)
    assert "there is no folder none; create it" in command.fails("export", run, "none/a.onnx")


def test_summary(command, run):
    lines = command("summary", run).stdout.splitlines()
    net = portacnn.load(run / "params.safetensors", device="numpy")
    assert "\n".join(lines).startswith(net.summary())
    assert max(map(len, lines)) <= 80
    known = dict(re.split(r"  +", line, maxsplit=1) for line in lines[lines.index("") + 1 :])
    assert (known["task"], known["classes"]) == ("multiclass", "3: a circle, square, triangle")
    assert known["written by"] == f"portacnn {portacnn.__version__}"


def test_images_of_other_shapes(command, shapes, tmp_path):
    """Files are resized and cropped to the sides of the model; other channels are refused."""
    rng = np.random.default_rng(3)
    for name, shape in (("wide", (3, 6, 9)), ("four", (4, 8, 8))):
        net = portacnn.SimpleConvNet(shape, {"filter_size": 3}, device="numpy", seed=0)
        net.preprocess = portacnn.Normalize()
        net.save(tmp_path / f"{name}.safetensors")
    pixels = rng.integers(0, 256, (8, 9, 3), dtype="uint8")  # one row is cut off at either end
    importlib.import_module("PIL.Image").fromarray(pixels).save(tmp_path / "a b\u00e9'.png")
    words = ["predict", tmp_path / "wide.safetensors", tmp_path / "a b\u00e9'.png", "--json"]
    (found,) = json.loads(command(*words).stdout)
    y = portacnn.load(words[1], device="numpy").predict(pixels[1:7].transpose(2, 0, 1)[None])
    (best,) = y.argmax(axis=1)
    assert found["classes"][0]["class"] == str(best)
    assert found["classes"][0]["probability"] == pytest.approx(
        np.exp(y - y.max())[0, best] / np.exp(y - y.max()).sum(), rel=1e-5
    )
    square = ["evaluate", words[1], "--data", shapes]
    assert "6 x 9 pixels; those of a folder become square" in command.fails(*square, status=2)
    words[1] = tmp_path / "four.safetensors"
    assert "samples of shape (4, 8, 8)" in command.fails(*words, status=2)


def test_weights_that_are_none(command, tmp_path):
    net = portacnn.SimpleConvNet((1, 8, 8), {"filter_size": 3}, device="numpy", seed=0)
    (tmp_path / "words.safetensors").write_text("no weights")
    importlib.import_module("safetensors.numpy").save_file(
        {"w": np.zeros(2)}, tmp_path / "bare.safetensors"
    )
    net.save(tmp_path / "net.safetensors")
    digits = write_digits(tmp_path / "digits")
    for words, told in (
        (["summary", "none"], "there is no file or folder none"),
        (["summary", digits], "is not the folder of a finished run"),
        (["summary", tmp_path / "words.safetensors"], "is not an intact safetensors file"),
        (["summary", tmp_path / "bare.safetensors"], "does not describe its model"),
        (["evaluate", tmp_path / "net.safetensors", "--data", digits], "expected"),
    ):
        assert told in command.fails(*words)
    words = ["predict", tmp_path / "net.safetensors", digits / "train-labels-idx1-ubyte"]
    assert "cannot be decoded" in command.fails(*words)


def test_info_and_backends(command, tmp_path):
    found = json.loads(command("info", "--json").stdout)
    assert found["versions"]["portacnn"] == portacnn.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["default"] == "numpy on cpu"
    assert found["threads"]["cores"] == os.cpu_count()
    listed = command("backends").stdout.splitlines()
    text = command("info").stdout
    for line, backend in zip(listed, found["backends"], strict=True):
        assert line.startswith(backend["name"])
        assert (backend["reason"] or backend["version"]) in line
        assert backend["name"] in text
    paths = str(tmp_path)  # its length is not the command's
    assert all(len(line) <= 80 for line in text.splitlines() if paths not in line)


def test_bench(command, monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda name: False)  # numba's kernels take seconds
    words = ["--device", "numpy", "--batch-size", "2", "--seconds", "0.01", "--image-size", "8"]
    found = json.loads(command("bench", *words, "--json").stdout)
    assert (found["shape"], found["batch_size"]) == ([1, 8, 8], 2)
    (row,) = found["results"]
    assert row["backend"] == "numpy on cpu"
    assert row["images_per_second"] == pytest.approx(2 * row["steps_per_second"])
    lines = command("bench", *words).stdout.splitlines()
    assert lines[0] == "SimpleConvNet, images 1x8x8, batches of 2"
    assert max(map(len, lines)) <= 80
    devices = ("cpu", "cuda:0", "cuda:1", "device1", "no_x64")
    info = portacnn.runtime.BackendInfo("torch", "2", devices)
    monkeypatch.setattr(bench, "available_backends", lambda: [info])
    assert [place.device for place in bench._places(None)] == ["torch:cpu", "torch:cuda:0"]


def test_times_that_are_none(command):
    for word in ("-1", "0", "nan", "inf"):
        done = command("bench", "--seconds", word)
        assert (done.returncode, f"above 0, got '{word}'" in done.stderr) == (2, True)


def test_a_device_without_integers_for_labels_is_refused(command):
    pytest.importorskip("array_api_strict")
    told = command.fails("bench", "--device", "array_api_strict:no_x64", status=cli.USAGE_ERROR)
    assert "no 64-bit integers" in told


# --- what all commands share ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_fits_a_terminal(command, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    if name == "report" and not cli.installed("portacnn.report"):
        assert command("report").returncode == cli.USAGE_ERROR
        return
    done = command(*filter(None, [name]), "--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout


def test_wrong_use(command):
    for words in ([], ["dance"], ["train", "--colour", "red"], ["bench", "--batch-size", "0"]):
        done = command(*words)
        assert done.returncode == cli.USAGE_ERROR
        assert done.stderr.startswith("usage: portacnn")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "error: MemoryError"),
        (OSError(28, "No space left", "a"), 1, "error: a: No space left"),
        (OSError(5, "Input/output error"), 1, "error: [Errno 5] Input/output error"),
    ],
)
def test_errors_become_a_status(command, monkeypatch, raised, status, told):
    def broken():
        raise raised

    monkeypatch.setattr("portacnn.commands.backends.available_backends", broken)
    done = command("backends")
    assert (done.returncode, done.stderr.strip()) == (status, told)
    with pytest.raises(type(raised)):
        command("backends", "--debug")


def test_an_error_of_portacnn_itself_keeps_its_traceback(command, monkeypatch):
    monkeypatch.setattr("portacnn.commands.backends.available_backends", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("backends")


def test_the_version(command):
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"portacnn {portacnn.__version__}\n")


def test_as_a_module_whose_reader_has_gone():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "portacnn", "train", "--help"]
    gone = subprocess.Popen(command, env=environment, **pipes)
    gone.stdout.close()
    with gone.stderr:
        assert (gone.stderr.read(), gone.wait(60)) == (b"", 0)
