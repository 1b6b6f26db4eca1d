"""scripts/bench.py: what it writes is what was asked for, and what it compares computes the
same."""

import io
import json
import math
import re
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from statistics import median

import numpy as np
import pytest

import portacnn
from support.matrix import needs

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
bench, cases, nets, peers, timing, worker, own = (
    import_module(f"bench{name}")
    for name in ("", "_cases", "_nets", "_peers", "_timing", "_worker", "_portacnn")
)

NETS = [
    *((net, None) for net in (*nets.PLAIN, "resnet20")),
    ("mobilenetv2", 32),
    *(
        pytest.param(net, size, marks=pytest.mark.slow)
        for net, size in (
            *(("alexnet", None), ("vgg11", 32), ("resnet18", 64), ("resnet50", 32), ("unet", 32)),
        )
    ),
]


# --- the script -----------------------------------------------------------------------------------


def here(self, task, python, kernels=None):
    """In place of ``Bench.spawn``: the worker's task in this process, since each start takes most
    of a second."""
    if task["what"] == "machine":
        return {"cpu": "c", "cores": 2, "system": "s", "gemm_gflops": 1.0, "copy_gb_per_s": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        for name in bench.THREADS:
            patch.setenv(name, str(self.options.threads or 1))
        return worker.main(task)


@pytest.fixture
def no_warm_up(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The script on next to nothing: what it printed, and what it wrote."""
    out = tmp_path_factory.mktemp("bench") / "deeper" / "out.json"
    words = "--nets simple,lenet --batches 4 --modes train --against tutorials --rounds 2"
    words += " --contenders tutorials,portacnn,portacnn@torch:tpu --seconds 0 --threads 1 --json"
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        patch.setattr(bench.Bench, "spawn", here)
        patch.setattr(timing, "WARM_UP_SECONDS", 0.0)
        assert bench.main([*words.split(), str(out)]) == 0
    assert errors.getvalue() == ""
    return printed.getvalue(), json.loads(out.read_text())


def test_every_row_that_was_asked_for_is_there_or_its_reason(ran):
    _, report = ran
    rows = [(row["net"], row["batch"], row["mode"], row["contender"]) for row in report["rows"]]
    assert rows == [
        ("simple", 4, "train", "tutorials"),
        ("simple", 4, "train", "portacnn"),
        ("lenet", 4, "train", "portacnn"),
    ]
    (device, tutorials) = report["left_out"]
    assert (device["contender"], device["case"]) == ("portacnn@torch:tpu", None)
    assert "PyTorch" in device["reason"]
    assert (tutorials["contender"], tutorials["case"]) == ("tutorials", "lenet batch 4 train")
    assert set(report["contenders"]) == {"tutorials", "portacnn"}


def test_figures_are_numbers_and_follow_from_the_rounds(ran):
    _, report = ran
    for row in report["rows"]:
        medians = [round_["median_ms"] for round_ in row["rounds"]]
        assert row["ms"] == {"median": median(medians), "min": min(medians), "max": max(medians)}
        assert row["peak_mib"] is None or 0 <= row["peak_mib"] < 1000
        assert len(row["rounds"]) == 2
        for round_ in row["rounds"]:
            assert 0 < round_["min_ms"] <= round_["median_ms"] <= round_["max_ms"] < math.inf
            assert round_["steps"] >= 5
    for when in ("before", "after"):
        assert all(0 < figure < math.inf for figure in report["machine"][when].values())


def test_ratios_are_of_the_same_round(ran):
    _, report = ran
    assert report["against"] == "tutorials"
    base = next(row for row in report["rows"] if row["contender"] == "tutorials")
    for row in report["rows"]:
        if row["net"] == "lenet":  # the tutorials have none
            assert row["ratio"] is None
            continue
        quotients = [
            a["median_ms"] / b["median_ms"]
            for a, b in zip(row["rounds"], base["rounds"], strict=True)
        ]
        assert row["ratio"]["rounds"] == pytest.approx(quotients)
        assert row["ratio"]["median"] == pytest.approx(median(quotients))
        assert (row["ratio"]["min"], row["ratio"]["max"]) == pytest.approx(
            (min(quotients), max(quotients))
        )


def test_the_screen_shows_the_rows_and_what_ran(ran):
    printed, report = ran
    for row in report["rows"]:
        assert re.search(
            rf"^{row['net']} +4 train +{row['contender']} +[\d.]+ "
            r"\([\d.]+\.\.[\d.]+\)",
            printed,
            re.M,
        )
    assert re.search(r"^not run  tutorials, lenet batch 4 train: ", printed, re.M)
    assert re.search(
        r"^ran      portacnn: numpy on cpu; .*numpy "
        rf"{re.escape(np.__version__)}",
        printed,
        re.M,
    )
    assert re.search(r"^machine  .+ cores to use, ", printed, re.M)
    assert "of 2 round(s)" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--contenders", "portacnn,pytorch"],
            "unknown contender 'pytorch'; known are portacnn, torch",
        ),
        (["--contenders", "tutorials@cuda"], "tutorials takes no device"),
        (["--contenders", "torch/reference"], "only portacnn has kernels"),
        (["--nets", "simple,vgg"], "unknown net 'vgg'; known are simple, lenet"),
        (["--modes", "test"], "unknown mode 'test'"),
        (["--batches", "0"], "whole numbers above 0"),
        (["--batches", "many"], "whole numbers above 0"),
        (["--sizes", "0"], "--sizes takes whole numbers above 0"),
        (["--sizes", "32"], "simple has images of 28 only"),
        (["--nets", "unet", "--sizes", "40"], "unet needs multiples of 16"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (
            ["--contenders", "portacnn", "--against", "torch"],
            "--against torch is none of the contenders",
        ),
        (["--python", "chainer=no/such/python"], "there is no such file"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--modes", "epoch", "--images", "8"], "a batch of 100 is more than the epoch's 8 images"),
    ],
)
def test_one_line_says_what_it_does_not_know(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_without_the_peer_the_first_that_runs_is_the_measure(capsys, tmp_path, monkeypatch):
    """PyTorch missing, and a contender that breaks off in the second round."""

    def spawn(self, task, python, kernels=None):
        if task["what"] == "machine":
            return {"cpu": "c", "cores": 2, "system": "s", "gemm_gflops": 1.0, "copy_gb_per_s": 1.0}
        calls.append((task["contender"], kernels))
        if task["contender"] == "torch":
            return {"unavailable": "torch is not installed"}
        if kernels == "reference" and calls.count(("portacnn", "reference")) == 2:
            return {"failed": "MemoryError: too large"}
        ms = {"median_ms": 8.0 if kernels else 2.0, "min_ms": 1.0, "max_ms": 9.0, "steps": 5}
        about = {"parameters": 1, "where": "w", "versions": {}, "threads": {}}
        return {**ms, **about, "peak_mib": None, "device_peak_mib": 3.0}

    calls = []
    monkeypatch.setattr(bench.Bench, "spawn", spawn)
    words = "torch,portacnn,portacnn/native,portacnn/reference"
    out = tmp_path / "out.json"
    assert (
        bench.main(
            [
                "--nets",
                "simple,lenet",
                "--modes",
                "train",
                "--contenders",
                words,
                "--json",
                str(out),
            ]
        )
        == 0
    )
    report = json.loads(out.read_text())
    assert report["against"] == "portacnn"
    simple = {
        row["contender"]: row["ratio"]["median"] for row in report["rows"] if row["net"] == "simple"
    }
    assert simple == {"portacnn": 1.0, "portacnn/native": 4.0}  # half a measurement is none
    assert [(entry["contender"], entry["case"]) for entry in report["left_out"]] == [
        ("torch", None),
        ("portacnn/reference", "simple batch 100 train"),
    ]
    assert calls.count(("torch", None)) == 1
    assert [kernels for _, kernels in calls[1:7]] == [
        None,
        "native",
        "reference",
        "native",
        "reference",
        None,
    ]


def test_the_profile_is_printed_and_written(capsys, tmp_path, monkeypatch, no_warm_up):
    monkeypatch.setattr(bench.Bench, "spawn", here)
    out = tmp_path / "out.json"
    words = [
        "--nets",
        "simple",
        "--batches",
        "2",
        "--contenders",
        "portacnn,tutorials",
        "--seconds",
        "0",
    ]
    assert bench.main([*words, "--profile", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^simple batch 2, portacnn: median ms of 5 training steps$", printed, re.M)
    (row,) = json.loads(out.read_text())["rows"]
    for layer in row["layers"]:
        figures = rf"{layer['forward_ms']:.3f} +{layer['backward_ms']:.3f} +[\d.]+%"
        assert re.search(rf"^{re.escape(layer['layer'])} +{figures}$", printed, re.M)
    assert re.search(rf"^step +{row['step_ms']:.3f}$", printed, re.M)
    assert "not run  tutorials, simple batch 2 profile: only portacnn has a profile" in printed


def test_kernels_and_threads_are_the_workers_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("PORTACNN_KERNELS", "theirs")
    words = ["--contenders", "portacnn", "--threads", "1", "--json", str(tmp_path / "out.json")]
    made = bench.Bench(bench.parse(words))
    refused = made.spawn(task("portacnn"), sys.executable, "ours")["unavailable"]
    assert refused.startswith("PORTACNN_KERNELS must be one of")
    assert "'ours'" in refused
    measured = made.spawn(task("portacnn"), sys.executable)
    assert measured["steps"] >= 5
    assert measured["threads"]["portacnn"] == 1


def test_the_machine_is_described_and_its_speed_measured(tmp_path, monkeypatch, no_warm_up):
    monkeypatch.setattr(bench.Bench, "spawn", lambda self, task, python: worker.main(task))
    made = bench.Bench(
        bench.parse(["--contenders", "portacnn", "--json", str(tmp_path / "out.json")])
    )
    found = made.speed()
    assert found["cores"] >= 1
    assert found["gemm_gflops"] > 0
    assert found["copy_gb_per_s"] > 0


def test_the_script_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench.py", "--nets", "vgg"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "unknown net 'vgg'" in done.stderr


def test_a_precision_is_in_the_contenders_word_and_told_where_it_is_missing():
    contender = bench.Contender.of("portacnn@cuda:1/tf32")
    assert (contender.device, contender.kernels, contender.precision) == ("cuda:1", None, "tf32")
    assert bench.Contender.of("portacnn@cuda/reference").precision == "float32"
    with pytest.raises(bench.UsageError, match="only portacnn"):
        bench.Contender.of("torch/tf32")
    refused = worker.main(task("portacnn", device="numpy", precision="tf32"))["unavailable"]
    assert refused == "numpy on cpu does not support tf32, only float32"


# --- one measurement ------------------------------------------------------------------------------


def task(contender, net="simple", mode="train", what="measure", **more):
    made = {
        "what": what,
        "contender": contender,
        "device": None,
        "net": net,
        "batch": 4,
        "mode": mode,
        "size": None,
        "onnx": None,
    }
    return {**made, "seconds": 0.0, "images": 12, "data": None, "precision": "float32", **more}


@pytest.mark.parametrize("mode", ["train", "infer", "epoch"])
@pytest.mark.parametrize(
    "contender",
    [
        pytest.param(contender, marks=needs("torch") if contender in peers.WITH_DEVICE else ())
        for contender in ("portacnn", "torch", "torch-channels-last", "tutorials")
    ],
)
def test_every_mode_runs(no_warm_up, contender, mode):
    result = worker.main(task(contender, mode=mode))
    assert result["parameters"] == 433_890
    assert result["steps"] == 1 if mode == "epoch" else result["steps"] >= 5
    assert 0 < result["min_ms"] <= result["median_ms"] <= result["max_ms"] < math.inf
    json.dumps(result, allow_nan=False)


@needs("torch", "onnx", "onnxruntime")
def test_the_exported_file_has_no_batch_norms_and_all_compute_the_same(tmp_path, no_warm_up):
    """portacnn and onnxruntime take the same file; serve calls from several threads."""
    import onnx

    path = str(tmp_path / "resnet20.onnx")
    assert worker.main({"what": "export", "net": "resnet20", "size": 16, "onnx": path}) == {}
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("Conv") == 19
    assert "BatchNormalization" not in nodes
    x, _ = nets.images("resnet20", 2, size=16)
    model = portacnn.onnx.load(path, device="numpy")
    expected = peers.make("onnxruntime", "resnet20", onnx=path).predict(x)
    np.testing.assert_allclose(model.predict(x), expected, rtol=1e-4, atol=1e-5)
    for contender in ("onnxruntime", "portacnn-onnx"):
        options = {"net": "resnet20", "size": 16, "onnx": path, "batch": 1}
        result = worker.main(task(contender, mode="serve", **options))
        assert result["steps"] == timing.ROUNDS
        assert result["scaling"] > 0
        assert result["one_thread_ms"] > 0


def test_serve_counts_the_calls_of_all_threads():
    """Calls that sleep: eight threads make about eight times as many."""
    calls = []
    subject = timing.Subject(
        lambda: (calls.append(threading.get_ident()), time.sleep(0.002)), lambda: None, 0, "here"
    )
    one, many = timing.per_call(subject, 1, 0.02), timing.per_call(subject, 8, 0.02)
    assert len(set(calls)) >= 2
    assert one >= 0.002
    assert many < one / 2
    broken = timing.Subject(lambda: 1 / 0, lambda: None, 0, "here")
    with pytest.raises(ZeroDivisionError):
        timing.per_call(broken, 8, 0.0)


def test_a_case_has_a_size_and_inference_contenders_do_not_train():
    made = cases.all_cases(["resnet18", "unet"], ["train", "serve"], None, [32, 64])
    assert [(str(case), case.size) for case in made[:4]] == [
        ("resnet18@32 batch 8 train", 32),
        ("resnet18@32 batch 1 serve", 32),
        ("resnet18@64 batch 8 train", 64),
        ("resnet18@64 batch 1 serve", 64),
    ]
    contender = cases.Contender.of("portacnn-onnx/native")
    assert contender.lacks("unet", "serve") is None
    assert "inference only" in contender.lacks("unet", "train")


def test_epochs_over_stored_images(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 7)):
        np.save(
            tmp_path / f"x_{part}.npy", rng.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)
        )
        np.save(tmp_path / f"t_{part}.npy", rng.integers(0, 10, count))
    (x, t), (x_test, t_test) = nets.epoch_sets(task("portacnn", mode="epoch", data=str(tmp_path)))
    assert (len(x), len(t), len(x_test), len(t_test)) == (12, 12, 2, 2)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x * 255, np.load(tmp_path / "x_train.npy")[:12], atol=1e-4)


def test_a_peer_that_is_not_there_is_told():
    reason = worker.main(task("portacnn", device="tpu"))["unavailable"]
    assert "unknown device 'tpu'" in reason
    try:
        import dezero  # noqa: F401
    except ImportError:
        assert "dezero is not installed" in worker.main(task("dezero"))["unavailable"]


def test_the_profile_has_every_layer_and_adds_up():
    result = worker.main(task("portacnn", what="profile", mode="profile", batch=32, seconds=0.2))
    named = [layer["layer"] for layer in result["layers"]]
    assert len(named) == len(set(named)) > 1
    assert all(layer["forward_ms"] > 0 and layer["backward_ms"] > 0 for layer in result["layers"])
    total = (
        sum(layer["forward_ms"] + layer["backward_ms"] for layer in result["layers"])
        + result["rest_ms"]
    )
    assert result["rest_ms"] > 0
    # medians do not add up exactly, least of all on a busy machine
    assert total / 3 < result["step_ms"] < 3 * total


COUNTED = """
import json, numpy as np
from bench_machine import memory, reset_peak
np.ones(1 << 24)  # 128 MiB, freed at once
reset_peak()
now, peak = memory()
held = np.ones(1 << 23)  # 64 MiB
print(json.dumps([peak - now, memory()[1] - now, held.nbytes]))
"""


def test_the_worker_counts_memory():
    """In a process of its own: the heap of this one may hold 64 MiB that are free."""
    if worker.memory() is None:
        pytest.skip("this system does not say how much memory a process has")
    freed, grown, held = json.loads(
        subprocess.run(
            [sys.executable, "-c", COUNTED],
            cwd=ROOT / "scripts",
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert freed < 64 << 20, "the 128 MiB that were freed are still counted"
    assert grown > 0.9 * held


# --- the same nets everywhere ---------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize(("net", "size"), NETS)
def test_the_torch_twin_computes_the_same(net, size):
    """The same number of parameters, in the same order; with the same values, the same logits."""
    import torch

    model = own.portacnn_model(net, "numpy", size)
    twin = peers.make("torch", net)
    arrays = model.named_parameters().values()
    assert twin.parameters == sum(array.size for array in arrays)
    with torch.no_grad():
        for parameter, array in zip(twin.net.parameters(), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array))
    x, _ = nets.images(net, 2, size=size)
    twin.begin(training=False)
    expected = twin.predict(twin.put(x)).numpy()
    np.testing.assert_allclose(
        model.predict(x), expected, rtol=1e-4, atol=1e-4 * abs(expected).max()
    )


def test_the_tutorials_step_has_portacnns_gradients():
    model = portacnn.SimpleConvNet(
        hidden_size=100, device="numpy", dtype="float64", weight_init_std=0.1, seed=0
    )
    x, t = nets.images("simple", 6)
    twin = peers.Tutorials("simple")
    named = {
        "W1": "conv1.weight",
        "W2": "fc1.weight",
        "W3": "fc2.weight",
        "b1": "conv1.bias",
        "b2": "fc1.bias",
    }
    named["b3"] = "fc2.bias"
    state = model.state_dict()
    for name, path in named.items():
        twin.weights[name] = state[path].T.copy() if name in ("W2", "W3") else state[path]
    x = x.astype(np.float64)
    np.testing.assert_allclose(twin.predict(x), model.predict(x), rtol=1e-10)
    loss, grads = twin.gradient(x, t)
    # the tutorials add 1e-7 in the logarithm
    assert loss == pytest.approx(model.loss(x, t), rel=1e-5)
    expected = model.gradient(x, t)
    for name, path in named.items():
        wanted = expected[path].T if name in ("W2", "W3") else expected[path]
        np.testing.assert_allclose(grads[name], wanted, rtol=1e-8, atol=1e-12)


def test_col2im_is_the_transpose_of_im2col():
    rng = np.random.default_rng(0)
    for shape, k, stride in (((2, 3, 6, 7), 3, 1), ((1, 2, 8, 6), 2, 2), ((2, 1, 9, 9), 3, 2)):
        x = rng.random(shape)
        columns = peers.im2col(x, k, stride)
        other = rng.random(columns.shape)
        assert np.sum(columns * other) == pytest.approx(
            np.sum(x * peers.col2im(other, shape, k, stride))
        )
