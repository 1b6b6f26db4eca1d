"""scripts/train.py as a person runs it: what it prints and leaves."""

import csv
import re
import shutil

import numpy as np
import pytest

import portacnn
from portacnn import cli
from portacnn.commands import train as command
from support.digits import ROOT
from support.train_script import script

OPTIONAL = ("tqdm", "safetensors", "threadpoolctl", "matplotlib")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, digits):
    """One run as a process: its result, and the folder it wrote to."""
    here = tmp_path_factory.mktemp("ran")
    run = script(here, digits)
    words = ("--epochs", "2", "--out", "out/deep", "--optimizer", "momentum", "--lr", "0.01")
    result = run(*words)
    assert result.returncode == 0, result.stderr
    return result, run.here / "out" / "deep", words


def test_a_run(ran):
    result, out, _ = ran
    printed = result.stdout
    assert re.search(r"^backend  numpy on cpu$", printed, re.M)
    assert re.search(
        r"^model    SimpleConvNet, 49,890 parameters, weights by he, seed "
        r"0$",
        printed,
        re.M,
    )
    assert re.search(r"^data     .*digits: 40 training and 15 test images$", printed, re.M)
    epochs = re.findall(
        r"^epoch +(\d): loss [\d.]+, train accuracy ([\d.]+), test accuracy "
        r"([\d.]+)",
        printed,
        re.M,
    )
    assert [epoch for epoch, *_ in epochs] == ["1", "2"]
    assert re.search(r"^trained  2 epochs in [\d.]+ s$", printed, re.M)
    final = re.search(r"^final test accuracy ([\d.]+)$", printed, re.M)[1]
    assert "Traceback" not in result.stderr
    assert not {"\x1b", "\r"} & {*printed, *result.stderr}  # no colours and no bar in a pipe

    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.csv",
        "history.json",
        "params.safetensors",
        "settings.toml",
    ]
    assert re.search(r"^weights  out.deep.params\.safetensors$", printed, re.M)
    assert re.search(r"^history  out.deep.history\.json, accuracy\.csv$", printed, re.M)
    assert "matplotlib is not installed" in printed
    with open(out / "accuracy.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    for row, (_, train_accuracy, test_accuracy) in zip(rows, epochs, strict=True):
        assert f"{float(row['train_accuracy']):.4f}" == train_accuracy
        assert f"{float(row['test_accuracy']):.4f}" == test_accuracy
    assert epochs[-1][2] == final


def test_the_saved_weights_are_the_trained_ones(ran, digits):
    result, out, _ = ran
    net = portacnn.load(out / "params.safetensors", device="numpy")
    _, (x_test, t_test) = portacnn.data.load_idx_folder(digits)
    final = re.search(r"final test accuracy ([\d.]+)", result.stdout)[1]
    assert f"{net.accuracy(x_test, t_test):.4f}" == final
    _, (stored, _) = portacnn.data.load_idx_folder(digits, normalize=False)
    assert net.preprocess == portacnn.Normalize()
    np.testing.assert_array_equal(net.predict(stored), net.predict(x_test))
    fresh = portacnn.SimpleConvNet((1, 12, 12), weight_init_std="he", device="numpy", seed=0)
    assert not np.array_equal(net.state_dict()["fc2.weight"], fresh.state_dict()["fc2.weight"])


def test_the_curve(train, inside):
    pytest.importorskip("matplotlib")
    result = inside("--out", "out", blocked=())
    assert result.returncode == 0, result.stderr
    curve = (train.here / "out" / "curves.png").read_bytes()
    assert curve.startswith(b"\x89PNG\r\n\x1a\n")
    assert curve.endswith(b"IEND\xaeB`\x82")
    assert re.search(r"^curves   out.curves\.png$", result.stdout, re.M)


def test_where_things_go_by_default(train, inside):
    assert inside().returncode == 0
    assert (train.here / "runs" / "latest" / "accuracy.csv").is_file()


def test_the_same_seed_gives_the_same_files(ran, train, inside):
    """In another process too."""
    _, out, words = ran
    assert inside(*words).returncode == 0
    again = train.here / "out" / "deep"
    before, after = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (out, again)
    )
    assert before.pop("history.json") != after.pop("history.json")  # they have the time
    assert len(before) == 3
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_a_seed_that_nobody_gave_is_told(train, inside):
    seeds = []
    for _ in range(2):
        first = inside(seed=None)
        seeds.append(re.search(r"weights by he, seed (\d+)$", first.stdout, re.M)[1])
        history = (train.here / "runs" / "latest" / "accuracy.csv").read_text()
    assert seeds[0] != seeds[1]
    inside(seed=seeds[1])
    assert (train.here / "runs" / "latest" / "accuracy.csv").read_text() == history


@pytest.mark.parametrize("how", ["device", "variable"])
def test_another_backend(inside, how):
    pytest.importorskip("array_api_strict")
    word = "array_api_strict:device1"
    result = inside("--device", word) if how == "device" else inside(PORTACNN_BACKEND=word)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^backend  array_api_strict on .*device1", result.stdout, re.M)


# --- uninstalled ----------------------------------------------------------------------------------


def test_a_checkout_runs_with_numpy_and_array_api_compat_alone(train, tmp_path):
    copy = tmp_path / "checkout"
    for folder in ("portacnn", "backends", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    blocked = (*OPTIONAL, "torch", "cupy", "array_api_strict")
    result = train("--out", "out", script=copy / "scripts" / "train.py", blocked=blocked)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert re.search(
        r"^note +safetensors is not installed: the weights will not be "
        r"saved",
        result.stdout,
        re.M,
    )
    assert re.search(r"^epoch 1: loss ", result.stdout, re.M)
    assert "curves   not drawn: matplotlib is not installed (pip install" in result.stdout
    found = sorted(path.name for path in (train.here / "out").iterdir())
    assert found == ["accuracy.csv", "history.json", "settings.toml"]


def test_the_block_blocks(train, tmp_path):
    """That the test before means something."""
    script = tmp_path / "probe.py"
    script.write_text(
        f"for name in {OPTIONAL}:\n    try:\n        __import__(name)\n    except ImportError: "
        "print(name)"
    )
    assert train(script=script, blocked=OPTIONAL).stdout.split() == list(OPTIONAL)


OPTIONS = {
    "--epochs": ("epochs", 7),
    "--checkpoint-dir": ("checkpoint_dir", "folder"),
    "--checkpoint-every": ("checkpoint_every", 4),
    "--keep": ("keep", 6),
    "--batch-size": ("batch_size", 9),
    "--optimizer": ("optimizer", "momentum"),
    "--schedule": ("schedule", "one_cycle"),
    "--seed": ("seed", 8),
    "--lr": ("optimizer_param", {"lr": 0.5}),
    "--momentum": ("optimizer_param", {"lr": 0.001, "momentum": 0.5}),
    "--weight-decay": ("optimizer_param", {"lr": 0.001, "weight_decay": 0.5}),
}
"""The Trainer's argument that an option stands for, and what it gets."""


# --- stopped, and gone on -------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("how", ["new", "resumed"])
def test_every_option_reaches_the_trainer(digits, tmp_path, monkeypatch, option, how):
    given = {}

    class Stopped(command.Trainer):
        def __init__(self, *args, **options):
            given.update(options)
            raise portacnn.errors.ArgumentError("seen")

        @classmethod
        def resume(cls, path, *args, **options):
            cls(**options)

    monkeypatch.setattr(command, "Trainer", Stopped)
    monkeypatch.chdir(tmp_path)
    argument, value = OPTIONS[option]
    words = ["--data", str(digits), "--device", "numpy", "--out", "out"]
    words += ["--resume", "."] if how == "resumed" else []
    told = value if not isinstance(value, dict) else list(value.values())[-1]
    assert cli.train_main([*words, option, str(told)]) == cli.USAGE_ERROR
    if how == "resumed" and option in [*OPTIONS][4:]:
        assert given == {}  # the checkpoint has them
    else:
        assert given[argument] == value
