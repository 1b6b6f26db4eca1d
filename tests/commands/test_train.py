"""``portacnn train``: data, models and tasks by name, the run's folder, and a run that is
repeated. scripts/test_train_script.py has what concerns the process: signals, files, resuming."""

import contextlib
import json
import re
import resource
import signal
import tomllib

import numpy as np
import pytest

import portacnn
from portacnn import cli, run_folder
from portacnn.commands import train
from portacnn.commands.settings import Settings
from support.commands import CLASSES
from support.digits import write_digits

pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """matplotlib takes a second to import."""
    real = train.installed
    monkeypatch.setattr(train, "installed", lambda name: name != "matplotlib" and real(name))


@pytest.fixture
def photos(shapes):
    return ["--data", shapes, "--image-size", "12", "--batch-size", "6", "--epochs", "2"]


def files(folder, *names):
    names = names or (run_folder.PARAMS, run_folder.ACCURACY, run_folder.SETTINGS)
    return {name: (folder / name).read_bytes() for name in names}


def test_a_folder_of_photos(command, photos, tmp_path, monkeypatch):
    """Its settings repeat it to the bit, from any folder."""
    model = ["--model", "Deep-ConvNet", "--model-option", "hidden_size=8"]
    done = command("train", *photos, *model, "--optimizer", "momentum", "--lr", "1e-2")
    assert done.returncode == 0, done.stderr
    assert "classes  3: a circle, square, triangle\n" in done.stdout
    assert re.search(r"^model    DeepConvNet, \d\d,\d{3} parameters, seed \d+$", done.stdout, re.M)
    assert re.search(r"^data     .*of mine: 19 training and 5 test images$", done.stdout, re.M)
    out = tmp_path / "here" / "runs" / "latest"
    net = portacnn.load(out / "params.safetensors", device="numpy")
    info = net.info
    assert (info.class_names, info.task, info.input_shape) == (CLASSES, "multiclass", (3, 12, 12))
    assert net.preprocess == portacnn.Normalize()
    history = run_folder.read_history(out)
    assert info.figures["test_accuracy"] == history["history"]["test_accuracy"][-1]
    assert len(history["step_losses"]) == 8  # 19 images by 6, twice
    about = history["environment"]
    assert about["backend"] == "numpy on cpu"
    assert about["versions"]["portacnn"] == portacnn.__version__
    assert about["versions"]["numpy"] == np.__version__
    assert about["peak_memory"] > 1 << 20

    said = tomllib.loads((out / "settings.toml").read_text())
    assert (said["model_option"], said["lr"], said["epochs"]) == ({"hidden_size": 8}, 0.01, 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = command("train", "--settings", out / "settings.toml", "--out", "again", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "epoch" not in done.stdout.replace(" epochs in ", "")
    assert files(tmp_path / "elsewhere" / "again") == files(out)
    assert command("train", "--settings", out / "settings.toml", "--seed", "1").returncode == 0
    other = files(tmp_path / "elsewhere" / "runs" / "latest")
    assert other["params.safetensors"] != files(out)["params.safetensors"]


def test_resuming_takes_the_data_from_its_settings(command, photos, tmp_path):
    here = tmp_path / "here"
    base = [*photos, "--mode", "L", "--seed", "5"]
    assert command("train", *base, "--checkpoint-dir", "ck", "--out", "a").returncode == 0
    assert command("train", *base, "--epochs", "3", "--out", "whole").returncode == 0
    lines = (here / "a" / "settings.toml").read_text().replace("epochs = 2", "epochs = 3")
    (here / "mine.toml").write_text(lines)
    for number, words in enumerate((["--epochs", "3"], ["--settings", "mine.toml"])):
        keep = ["--checkpoint-dir", f"ck{number}", "--out", f"b{number}"]
        done = command("train", "--resume", "ck", *words, *keep)
        assert done.returncode == 0, done.stderr
        assert files(here / f"b{number}") == files(here / "whole")
    (here / "mine.toml").write_text(lines.replace("lr = 0.001", "lr = 0.5"))
    refused = command.fails("train", "--resume", "ck", "--settings", "mine.toml", status=2)
    assert "the settings file says lr = 0.5, but --resume takes it from the checkpoint" in refused
    (record,) = (here / "ck").glob("settings-*.toml")
    record.unlink()  # as of a Trainer in Python: the whole's settings are not known
    again = ["--data", photos[1], "--image-size", "12", "--mode", "L", "--out", "a"]
    done = command("train", "--resume", "ck", *again, "--epochs", "3")
    assert "settings not written" in done.stdout, done
    assert not (here / "a" / "settings.toml").exists()


def arrays(tmp_path, **targets):
    rng = np.random.default_rng(0)
    path = tmp_path / "set.npz"
    x = rng.random((24, 1, 8, 8)).astype("float32")
    np.savez(path, x_train=x[:16], x_test=x[16:], **targets)
    return ["--data", path, "--epochs", "1", "--batch-size", "8", "--seed", "0"]


@pytest.mark.parametrize(
    ("shape", "words", "figures", "outputs"),
    [
        ((), "--loss mse --metrics mae,r2", {"mae", "r2"}, (1,)),
        ((2,), "--loss huber --loss-option delta=0.5", {"mae", "r2"}, (2,)),
        ((3,), "--loss bce_with_logits --metrics f1", {"f1"}, (3,)),
        ((8, 8), "--model unet --model-option depth=1 --model-option width=2", {"accuracy"}, None),
    ],
    ids=["regression", "two values", "labels", "pixels"],
)
def test_tasks(command, tmp_path, shape, words, figures, outputs):
    rng = np.random.default_rng(1)
    whole = "bce" in words or "unet" in words
    t = rng.integers(0, 2, (24, *shape)) if whole else rng.random((24, *shape), "float32")
    data = arrays(tmp_path, t_train=t[:16], t_test=t[16:])
    small = [] if "unet" in words else ["--model-option", "conv_param={filter_size=3}"]
    done = command("train", *data, *words.split(), *small)
    assert done.returncode == 0, done.stderr
    printed = set(re.findall(r"^final test (\w+) -?[\d.]+$", done.stdout, re.M))
    assert printed == figures
    net = portacnn.load("runs/latest/params.safetensors", device="numpy")
    assert net.output_shape == (outputs or (2, 8, 8))
    assert net.preprocess is None


def test_options_of_the_optimizer(command, tmp_path, monkeypatch):
    made = []

    class Noted(portacnn.Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(train, "Trainer", Noted)
    digits = write_digits(tmp_path / "digits")
    words = f"--data {digits} --epochs 2 --batch-size 20 --seed 0 --optimizer sgd --lr 0.2".split()
    more = ["--momentum", "0.8", "--optimizer-option", "nesterov=true", "--schedule", "one_cycle"]
    done = command("train", *words, *more, "--clip-norm", "2", "--early-stopping", "4")
    assert done.returncode == 0, done.stderr
    (run,) = made
    assert (run.optimizer.lr, run.optimizer.momentum, run.optimizer.nesterov) == (0.2, 0.8, True)
    assert run.schedule == portacnn.schedules.OneCycleLR(4)
    assert (run.clip_norm, run.early_stopping.patience) == (2.0, 4)
    rows = (tmp_path / "here" / "runs" / "latest" / "accuracy.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss,train_accuracy,test_accuracy"
    assert [float(row.split(",")[1]) for row in rows[1:]] == pytest.approx(
        run.epoch_loss_list, abs=1e-6
    )


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ("--model resnet21", 2, "unknown model 'resnet21'; known are simple_conv_net"),
        (
            "--model resnet20 --weight-init he",
            2,
            "ResNet20 does not take --weight-init; its options",
        ),
        ("--model-option colour=1", 2, "SimpleConvNet does not take colour; its options are conv_"),
        ("--loss-option gamma=2", 2, "cross_entropy does not take gamma"),
        ("--optimizer adagrad --momentum 0.8", 2, "AdaGrad does not take momentum; it takes lr"),
        ("--metrics accuracy,speed", 2, "unknown metric 'speed'"),
        ("--settings none.toml", 1, "none.toml"),
        ("--data none", 1, "there is no file or folder none"),
        ("--image-size 20", 2, "--image-size 20 is for folders of images"),
        ("--device tpu", 2, "unknown device 'tpu'"),
        ("--resume", 1, "no checkpoint to resume from"),
    ],
)
def test_wrong_use_and_failures(command, tmp_path, words, status, told):
    digits = write_digits(tmp_path / "digits")
    done = command.fails("train", "--data", digits, "--epochs", "0", *words.split(), status=status)
    assert told in done


def test_a_folder_with_one_class(command, shapes, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "square").symlink_to(shapes / "square")
    assert "at least two classes" in command.fails("train", "--data", tmp_path / "one")


def test_without_pillow(command, shapes, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert 'pip install "portacnn[data]"' in command.fails("train", "--data", shapes)


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (14, 14), (300, 16), (480, 24), (2000, 100), (60000, 100)]
)
def test_the_default_batch_size_follows_the_number_of_images(count, size):
    assert train._batch_size(Settings(), count) == size
    assert train._batch_size(Settings(batch_size=3), count) == 3


def test_a_small_folder_is_trained_without_a_batch_size(command, shapes, tmp_path):
    words = ["--data", shapes, "--image-size", "12", "--epochs", "1", "--quiet"]
    assert command("train", *words).returncode == 0
    saved = tomllib.loads((tmp_path / "here/runs/latest/settings.toml").read_text())
    assert saved["batch_size"] == 16  # of 19 training images


def test_names_of_classes_are_not_cut_in_the_middle():
    names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker")
    assert train._some(names) == ", ".join(names[:7]) + ", ..."
    assert train._some(names[:3]) == "T-shirt/top, Trouser, Pullover"
    assert len(train._some(["x" * 200, "y"])) <= 65


def test_a_traceback_if_it_is_asked_for(command):
    with pytest.raises(portacnn.errors.ArgumentError):
        cli.main(["train", "--model", "none", "--debug"])


@contextlib.contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_files(command, tmp_path):
    digits = write_digits(tmp_path / "digits")
    words = ["train", "--data", digits, "--epochs", "1", "--batch-size", "20", "--quiet"]
    words += ["--seed", "0"]
    assert command(*words).returncode == 0
    out = tmp_path / "here" / "runs" / "latest"
    before = {path: path.read_bytes() for path in out.iterdir()}
    for size in (0, len(before[out / "params.safetensors"]) - 1):
        with files_of_at_most(size):
            assert "params.safetensors" in command.fails(*words)
        assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_history_that_is_damaged(tmp_path):
    run_folder.write_history(tmp_path, {"test_auc": [float("nan"), 0.5]}, [1.0], {"date": "é"})
    assert run_folder.read_history(tmp_path)["history"] == {"test_auc": [None, 0.5]}
    whole = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))
    damaged = [{**whole, "format": 2}, {**whole, "history": []}, {**whole, "history": {"a": 1}}, []]
    for content in (*map(json.dumps, damaged), "{", "[" * 100_000):
        (tmp_path / "history.json").write_text(content)
        with pytest.raises(portacnn.errors.DataFormatError, match=r"history\.json"):
            run_folder.read_history(tmp_path)


def test_augment_names_transforms_and_is_resumed(command, tmp_path):
    from portacnn.augment import CutOut, Shift, standard

    digits = write_digits(tmp_path / "digits")
    base = ["--data", digits, "--batch-size", "20", "--seed", "0", "--quiet"]
    words = ["train", *base, "--epochs", "2", "--augment", "shift=1,cut_out=3"]
    assert command(*words, "--out", "whole").returncode == 0
    assert (
        'augment = ["shift=1", "cut_out=3"]\n'
        in (tmp_path / "here/whole/settings.toml").read_text()
    )
    data = portacnn.data.load(digits)
    net = portacnn.SimpleConvNet((1, 12, 12), weight_init="he", device="numpy", seed=0)
    net.preprocess = portacnn.Normalize()
    options = {"epochs": 2, "batch_size": 20, "seed": 0, "verbose": False}
    options |= {"augment": [Shift(1), CutOut(3)], "optimizer_param": {"lr": 0.001}}
    trainer = portacnn.Trainer(net, data[0], None, data[1], None, **options)
    trainer.train()
    weights = portacnn.load("whole/params.safetensors", device="numpy").state_dict()
    np.testing.assert_array_equal(net.state_dict()["fc2.weight"], weights["fc2.weight"])
    words[words.index("2")] = "1"
    assert command(*words, "--checkpoint-dir", "ck").returncode == 0
    again = ["train", "--resume", "ck", "--epochs", "2", "--out", "resumed", "--quiet"]
    assert command(*again).returncode == 0
    assert files(tmp_path / "here" / "resumed") == files(tmp_path / "here" / "whole")
    again = ["train", "--settings", "whole/settings.toml", "--augment", "--epochs", "1"]
    done = command(*again, "--checkpoint-dir", "other", "--quiet")
    assert done.returncode == 0, done.stderr
    found = portacnn.Trainer.resume("other", data[0], None, data[1], None).augment
    assert found == tuple(standard((1, 12, 12)))
    done = command("train", *base, "--augment", "flip")
    assert (done.returncode, "unknown transform 'flip'; known are" in done.stderr) == (2, True)


@pytest.mark.parametrize("words", ["--epochs 1", "--epochs 2 --evaluate-images 3"])
def test_the_final_figures_are_those_of_the_saved_weights(command, tmp_path, words):
    """Also of weights in the middle of an epoch, and if epochs are evaluated on a few images."""
    t = np.arange(240) % 8
    x = np.random.default_rng(0).random((240, 1, 8, 8), "float32")
    x[np.arange(240), 0, t] += 0.5  # the row says the class
    np.savez(
        tmp_path / "rows.npz", x_train=x[:160], t_train=t[:160], x_test=x[160:], t_test=t[160:]
    )
    base = ["train", "--data", tmp_path / "rows.npz", "--seed", "0", "--batch-size", "16"]
    base += ["--model-option", "conv_param={filter_size=3}", "--lr", "0.01", "--quiet"]
    if "--evaluate-images" in words:
        done = command(*base, *words.split())
    else:
        done = command(*base, "--epochs", "2", "--checkpoint-every", "1", "--keep", "99")
        assert done.returncode == 0, done.stderr
        (middle,) = (tmp_path / "here" / "runs" / "latest" / "checkpoints").glob("*-step-18-*")
        done = command("train", "--resume", middle, *words.split())
    final = re.search(r"^final test accuracy ([\d.]+)$", done.stdout, re.M)[1]
    net = portacnn.load("runs/latest/params.safetensors", device="numpy")
    assert final == f"{net.accuracy(x[160:], t[160:]):.4f}" > "0.3"


def test_a_refused_training_leaves_no_folder(command, tmp_path):
    """And its error says options, not arguments of Python."""
    digits = write_digits(tmp_path / "digits")
    for words, told in (
        ("--batch-size 0", "--batch-size must be a whole number of at least 1, got 0"),
        ("--evaluate-images 0", "--evaluate-images must be a whole number"),
        ("--lr nan", "--lr must be a number of 0 or more, got nan"),
        ("--image-size 20", "--image-size 20 is for folders of images"),
        ("--mode RGB", "--mode RGB is for folders of images"),
        ("--test-share 1", "--test-share must lie in"),
        ("--batch-size 99 --drop-last", "--batch-size is 99, but there are only 40 training"),
        ("--metrics speed --data none", "unknown metric 'speed'"),  # before data are looked for
        ("--model none --data none", "unknown model 'none'"),
        ("--loss-option a=1 --data none", "cross_entropy does not take a"),
    ):
        line = command.fails("train", "--data", digits, *words.split(), "--out", "x/y", status=2)
        assert line.startswith(f"error: {told}")
    assert not (tmp_path / "here" / "x").exists()
    command.fails("train", "--data", digits, "--model-option", "conv_param={filter_size=99}")
    assert not (tmp_path / "here" / "runs").exists()


def test_options_in_messages():
    from portacnn.commands.messages import in_options

    names = ["image_size", "on_error", "mode", "loss", "seed", "evaluate_images", "drop_last"]
    for text, told in (
        ('leave such files out: on_error="skip"', "leave such files out: --on-error skip"),
        ("precision='x' and mode='L'", "precision='x' and --mode L"),
        ("the seed of a/image_size/image_size.png", "the seed of a/image_size/image_size.png"),
        ("loss=Focal(alpha=...) or Focal(loss=2)", "loss=Focal(alpha=...) or Focal(loss=2)"),
        ("evaluate_sample_num_per_epoch must be 1", "--evaluate-images must be 1"),
        ("my_image_size must be 1", "my_image_size must be 1"),
        ("choose drop_last=True", "choose --drop-last"),
    ):
        assert in_options(text, names) == told
    assert in_options("seed must be 1", []) == "seed must be 1"


def test_files_of_two_runs_are_never_side_by_side(command, tmp_path, monkeypatch):
    """A run that was stopped writes what it has; what it does not write is removed."""
    digits = write_digits(tmp_path / "digits")
    words = ["train", "--data", digits, "--batch-size", "20", "--quiet", "--epochs", "3"]
    assert command(*words, "--seed", "1").returncode == 0
    out = tmp_path / "here" / "runs" / "latest"
    for name in ("curves.png", "report.html"):  # of the first run, as if they were drawn
        (out / name).write_bytes(b"old")

    def on_epoch_end(trainer, figures):
        if trainer.epoch == 2:
            signal.raise_signal(signal.SIGINT)

    class Interrupted(portacnn.Trainer):
        def __init__(self, *args, **options):
            callback = portacnn.callbacks.Callback()
            callback.on_epoch_end = on_epoch_end
            super().__init__(*args, **options, callbacks=[callback])

    with monkeypatch.context() as patch:
        patch.setattr(train, "Trainer", Interrupted)
        done = command(*words, "--seed", "2")
    assert done.returncode == 130, done.stderr
    assert {path.name for path in out.iterdir()} == {
        *(run_folder.PARAMS, run_folder.ACCURACY, run_folder.SETTINGS, run_folder.HISTORY),
        run_folder.CHECKPOINTS,
    }
    assert len((out / "accuracy.csv").read_text().splitlines()) == 3
    assert tomllib.loads((out / "settings.toml").read_text())["seed"] == 2
    assert len(run_folder.read_history(out)["history"]["test_accuracy"]) == 2
    stopped = files(out, run_folder.PARAMS)
    assert command(*words[:-1], "2", "--seed", "2", "--out", "whole").returncode == 0
    assert files(tmp_path / "here" / "whole", run_folder.PARAMS) == stopped
