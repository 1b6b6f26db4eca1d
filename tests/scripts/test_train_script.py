"""scripts/train.py as a person runs it: what it prints and leaves, and what it says when it
can't."""

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import portacnn
from portacnn import cli
from support.digits import BLOCK, ROOT, write_digits

OPTIONAL = ("tqdm", "safetensors", "threadpoolctl", "matplotlib")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def train(tmp_path, digits):
    return script(tmp_path, digits)


def script(folder, digits):
    """A function that runs the script in an empty folder; without matplotlib unless ``blocked``
    says otherwise, since that is slow."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(BLOCK)
    here = folder / "here"
    here.mkdir()

    def run(
        *arguments,
        data=digits,
        script=ROOT / "scripts" / "train.py",
        blocked=("matplotlib",),
        seed="0",
        without=(),
        **variables,
    ):
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PORTACNN_")
        }
        path = [str(folder / "hook"), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {
            "PYTHONPATH": os.pathsep.join(path),
            "BLOCKED": ",".join(blocked),
            "OMP_NUM_THREADS": "1",
        }
        standard = {"--epochs": "1", "--batch-size": "20", "--data": data}
        options = [
            word
            for name, value in standard.items()
            if name not in without
            for word in (name, value)
        ]
        command = [sys.executable, script, *options, *arguments]
        command += [] if seed is None else ["--seed", seed]
        return subprocess.run(
            [str(word) for word in command],
            cwd=here,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    run.here = here
    return run


@pytest.fixture
def inside(train, digits, monkeypatch, capsys):
    """As ``train``, in this process: where nothing depends on the process, since starting one takes
    most of a second."""
    monkeypatch.chdir(train.here)
    for name in os.environ:
        if name.startswith("PORTACNN_"):
            monkeypatch.delenv(name)

    def run(*arguments, data=digits, blocked=("matplotlib",), seed="0", without=(), **variables):
        standard = {"--epochs": "1", "--batch-size": "20", "--data": data, "--seed": seed}
        words = [
            str(word)
            for name, value in standard.items()
            if value is not None and name not in without
            for word in (name, value)
        ]
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            for name in [*sys.modules, *blocked]:
                if name.partition(".")[0] in blocked:
                    patch.setitem(sys.modules, name, None)
            try:
                status = cli.train_main([*words, *map(str, arguments)])
            except SystemExit as end:  # argparse
                status = end.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def ran(tmp_path_factory, digits):
    """One run as a process: its result, and the folder it wrote to."""
    here = tmp_path_factory.mktemp("ran")
    run = script(here, digits)
    words = ("--epochs", "2", "--out", "out/deep", "--optimizer", "momentum", "--lr", "0.01")
    result = run(*words)
    assert result.returncode == 0, result.stderr
    return result, run.here / "out" / "deep", words


def one_line(result, *words):
    """Exit status 2 and one clear line, with these words in it."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


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

    assert sorted(path.name for path in out.iterdir()) == ["history.csv", "weights.safetensors"]
    assert re.search(r"^weights  out.deep.weights\.safetensors$", printed, re.M)
    assert re.search(r"^history  out.deep.history\.csv$", printed, re.M)
    assert "matplotlib is not installed" in printed
    with open(out / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    for row, (_, train_accuracy, test_accuracy) in zip(rows, epochs, strict=True):
        assert f"{float(row['train_accuracy']):.4f}" == train_accuracy
        assert f"{float(row['test_accuracy']):.4f}" == test_accuracy
    assert epochs[-1][2] == final


def test_the_saved_weights_are_the_trained_ones(ran, digits):
    result, out, _ = ran
    net = portacnn.load(out / "weights.safetensors", device="numpy")
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
    curve = (train.here / "out" / "accuracy.png").read_bytes()
    assert curve.startswith(b"\x89PNG\r\n\x1a\n")
    assert curve.endswith(b"IEND\xaeB`\x82")
    assert re.search(r"^curve    out.accuracy\.png$", result.stdout, re.M)


def test_the_curve_s_title(tmp_path, monkeypatch):
    """What was trained, and on what: "numpy on cpu", not "SimpleConvNet on numpy on cpu"."""
    figure = pytest.importorskip("matplotlib.figure")
    titles = []
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *_, **__: titles.append(self.axes[0].get_title())
    )
    net = portacnn.SimpleConvNet((1, 12, 12), device="numpy", seed=0)
    x, t = np.zeros((4, 1, 12, 12), "float32"), np.arange(4)
    cli._plot(
        portacnn.Trainer(net, x, t, x, t, mini_batch_size=2, verbose=False), tmp_path / "curve.png"
    )
    assert titles == ["SimpleConvNet, numpy on cpu"]


def test_where_things_go_by_default(train, inside):
    assert inside().returncode == 0
    assert (train.here / "runs" / "latest" / "history.csv").is_file()


def test_the_same_seed_gives_the_same_files(ran, train, inside):
    """In another process too."""
    _, out, words = ran
    assert inside(*words).returncode == 0
    again = train.here / "out" / "deep"
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in out.iterdir()
    }


def test_a_seed_that_nobody_gave_is_told(train, inside):
    seeds = []
    for _ in range(2):
        first = inside(seed=None)
        seeds.append(re.search(r"weights by he, seed (\d+)$", first.stdout, re.M)[1])
        history = (train.here / "runs" / "latest" / "history.csv").read_text()
    assert seeds[0] != seeds[1]
    inside(seed=seeds[1])
    assert (train.here / "runs" / "latest" / "history.csv").read_text() == history


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
    assert "curve    not drawn: matplotlib is not installed (pip install" in result.stdout
    assert [path.name for path in (train.here / "out").iterdir()] == ["history.csv"]


def test_the_block_blocks(train, tmp_path):
    """That the test before means something."""
    script = tmp_path / "probe.py"
    script.write_text(
        f"for name in {OPTIONAL}:\n    try:\n        __import__(name)\n    except ImportError: "
        "print(name)"
    )
    assert train(script=script, blocked=OPTIONAL).stdout.split() == list(OPTIONAL)


# --- what cannot be done --------------------------------------------------------------------------


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
        (["--batch-size", "41"], ["batch_size is 41, but there are only 40 training images"]),
        (["--batch-size", "0"], ["batch_size must be"]),
        (["--epochs", "-1"], ["epochs must be a whole number of at least 0, got -1"]),
        (["--lr", "nan"], ["lr must be a number of 0 or more, got nan"]),
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
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the loss of step 2 (epoch 1) is ")
    assert {path.name: path.read_bytes() for path in (train.here / "out").iterdir()} == before


@pytest.mark.parametrize("words", ["--optimizer adamax", "--epochs many", "--colour red"])
def test_words_that_argparse_refuses(inside, words):
    result = inside(*words.split())
    assert result.returncode == 2
    assert "usage: train.py" in result.stderr


def test_the_command(capsys):
    from portacnn.cli import main

    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(" ")[0] for line in lines] == [
        "numpy",
        "cupy",
        "torch",
        "array_api_strict",
    ]
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


# --- stopped, and gone on -------------------------------------------------------------------------


@pytest.fixture
def begin(train, digits):
    """The script as a running process, to be sent signals. It is in its first epoch when this
    returns."""

    def run(*arguments):
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PORTACNN_")
        }
        command = [
            sys.executable,
            ROOT / "scripts" / "train.py",
            "--data",
            digits,
            "--batch-size",
            "4",
            *arguments,
        ]
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=train.here,
            env={
                **environment,
                "OMP_NUM_THREADS": "1",
                "PORTACNN_KERNELS": "native",
                "PYTHONUNBUFFERED": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("epoch 2"):  # by now the handlers stand
                return process
        pytest.fail(f"it ended: {seen}")

    return run


@pytest.mark.parametrize(
    ("number", "status", "where"),
    [(signal.SIGTERM, 143, []), (signal.SIGINT, 130, ["--checkpoint-dir", "ck"])],
    ids=["SIGTERM", "SIGINT, a folder for checkpoints"],
)
def test_a_signal_ends_in_good_order_and_resumes_to_the_same_end(
    train, inside, begin, number, status, where
):
    """It says where it was saved, and ends as one that nobody stopped."""
    long = ["--epochs", "2000", "--out", "out", "--seed", "3"]
    with begin(*long, *where) as process:
        process.send_signal(number)
        printed = process.stdout.read()
    assert process.returncode == status
    step = int(re.search(r"^stopped  after step (\d+) \(epoch \d+\)$", printed, re.M)[1])
    saved = re.search(r"^saved    (.*)$", printed, re.M)[1]
    go_on = re.search(r"^resume   (.*)$", printed, re.M)[1]
    assert re.fullmatch(rf"--resume {re.escape(saved)} --out out --data \S+", go_on)
    assert (train.here / saved).parent == train.here / (where[1] if where else "out/checkpoints")
    assert f"-step-{step}-" in saved
    epochs = str(step // 10 + 2)  # 40 images by 4
    bare = {"seed": None, "without": ("--batch-size",), "PORTACNN_KERNELS": "native"}
    again = inside(*shlex.split(go_on), "--epochs", epochs, **bare)
    assert again.returncode == 0, again.stderr
    assert re.search(rf"49,890 parameters, {step:,} steps done, seed 3$", again.stdout, re.M)
    numpy = {"PORTACNN_KERNELS": "native"}
    whole = inside("--out", "whole", "--epochs", epochs, "--batch-size", "4", seed="3", **numpy)
    assert whole.returncode == 0, whole.stderr
    for name in ("history.csv", "weights.safetensors"):
        assert (train.here / "out" / name).read_bytes() == (
            train.here / "whole" / name
        ).read_bytes()


def test_resume_without_a_path_takes_the_newest_and_keeps_as_many_as_told(train, inside):
    assert inside("--out", "out", "--checkpoint-every", "1").returncode == 0
    files = list((train.here / "out" / "checkpoints").glob("checkpoint-*"))
    assert len(files) == 2
    words = ("--out", "out", "--epochs", "2", "--resume", "--keep", "1")
    again = inside(*words, seed=None, without=("--batch-size",))
    assert again.returncode == 0, again.stderr
    assert re.search(r"^trained  1 epochs", again.stdout, re.M)
    (file,) = (train.here / "out" / "checkpoints").glob("checkpoint-*")
    assert "-step-4-" in file.name


def test_resume_from_what_is_no_checkpoint_of_these_data(train, inside, tmp_path):
    bare = {"seed": None, "without": ("--batch-size",)}
    one_line(
        inside("--resume", **bare),
        "no checkpoint to resume from",
        "runs",
        "checkpoints",
        "--resume PATH",
    )
    (train.here / "file").write_text("no checkpoint")
    one_line(inside("--resume", "file", **bare), "file is not an intact safetensors file")
    one_line(
        inside("--resume", "file", "--lr", "0.1", **bare),
        "--resume takes --lr from the checkpoint; omit it",
    )
    one_line(
        inside("--resume", "file", blocked=("safetensors",), **bare), "checkpoints need safetensors"
    )
    assert inside("--out", "out", "--checkpoint-dir", "ck").returncode == 0
    other = write_digits(tmp_path / "other", train=41)
    one_line(
        inside("--resume", "ck", data=other, **bare),
        "the data differ from those of",
        "expected x_train of shape [40, 1, 12, 12], got [41",
    )


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


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("how", ["new", "resumed"])
def test_every_option_reaches_the_trainer(digits, tmp_path, monkeypatch, option, how):
    given = {}

    class Stopped(cli.Trainer):
        def __init__(self, *args, **options):
            given.update(options)
            raise portacnn.errors.ArgumentError("seen")

        @classmethod
        def resume(cls, path, *args, **options):
            cls(**options)

    monkeypatch.setattr(cli, "Trainer", Stopped)
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
