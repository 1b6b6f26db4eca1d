"""scripts/train.py: what it says when it can't."""

import os

import pytest

from support.digits import write_digits
from support.train_script import one_line


@pytest.mark.parametrize("how", ["device", "variable"])
def test_cupy_where_there_is_no_gpu(train, inside, how):
    named = {"PORTACNN_BACKEND": "cupy"} if how == "variable" else {}
    arguments = [] if how == "variable" else ["--device", "cuda"]
    result = inside(*arguments, blocked=("matplotlib", "cupy"), **named)
    one_line(result, 'CuPy is not installed: pip install "portacnn[cuda13]"')
    assert ("PORTACNN_BACKEND=cupy" in result.stderr) == (how == "variable")
    assert list(train.here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], ["unknown device 'tpu'; expected one of cpu, cuda"]),
        (["--data", "missing"], ["missing"]),
        (["--batch-size", "41"], ["--batch-size is 41, but there are only 40 training images"]),
        (["--batch-size", "0"], ["--batch-size must be"]),
        (["--epochs", "-1"], ["--epochs must be a whole number of at least 0, got -1"]),
        (["--lr", "nan"], ["--lr must be a number of 0 or more, got nan"]),
        (
            ["--weight-init", "glorot"],
            ["Conv2d: unknown weight initializer 'glorot'; expected one of he"],
        ),
    ],
)
def test_one_clear_line(train, inside, arguments, words):
    one_line(inside(*arguments, "--out", "out"), *words)
    assert [path for path in train.here.rglob("*") if path.is_file()] == []


def test_out_below_a_file(train, inside):
    (train.here / "file").write_text("mine")
    one_line(inside("--out", "file/x"), "file")
    one_line(inside("--out", "file"), "file")
    assert (train.here / "file").read_text() == "mine"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_out_that_may_not_be_written(train):
    (train.here / "out").mkdir(mode=0o555)
    one_line(train("--out", "out"), "cannot write to out; choose another --out")


def test_damaged_data(inside, tmp_path):
    folder = write_digits(tmp_path / "spoilt")
    images = folder / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    one_line(inside(data=folder), "train-images-idx3-ubyte", "cut short")


@pytest.mark.parametrize(("train_count", "test_count"), [(0, 15), (40, 0)])
def test_no_images(inside, tmp_path, train_count, test_count):
    folder = write_digits(tmp_path / "empty", train=train_count, test=test_count)
    one_line(inside(data=folder))


def test_images_too_small_for_the_kernel(inside, tmp_path):
    folder = write_digits(tmp_path / "tiny", size=4)
    one_line(inside(data=folder), "conv1 (Conv2d): kernel 5x5 is larger than the input 4x4")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_divergence_leaves_the_old_files(train, inside):
    assert inside("--out", "out").returncode == 0
    before = {path.name: path.read_bytes() for path in (train.here / "out").iterdir()}
    result = inside("--out", "out", "--lr", "1e30", "--optimizer", "sgd", "--epochs", "3")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the loss of step 2 (epoch 1) is ")
    assert {path.name: path.read_bytes() for path in (train.here / "out").iterdir()} == before


@pytest.mark.parametrize("words", ["--optimizer adamax", "--epochs many", "--colour red"])
def test_words_that_argparse_refuses(inside, words):
    result = inside(*words.split())
    assert result.returncode == 2
    assert "usage: train.py" in result.stderr
