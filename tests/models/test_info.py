"""``info``: what a model knows about itself, set by a Trainer and by hand, kept in every file."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portacnn
from portacnn import EarlyStopping, Normalize, Trainer
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.files import load_tensors, save_tensors
from portacnn.layers import Linear, Sequential
from portacnn.models import ModelInfo
from portacnn.models.info import LONGEST
from portacnn.onnx.wire import METADATA
from support.checks import refuses
from support.matrix import needs
from support.nets import patches, small_net

NAMES = ("cat", "dog", "chat à neuf queues", "猫")


def known(**options: Any) -> Any:
    model = small_net("numpy", **options)
    model.info = ModelInfo(
        class_names=NAMES, task="multiclass", figures={"test_accuracy": 0.5}, input_range=(0, 1)
    )
    model.preprocess = Normalize(mean=0.5)
    return model


def test_a_model_tells_what_it_takes():
    info = small_net("numpy", dtype="float64").info
    assert (info.input_shape, info.layout, info.dtype) == ((1, 8, 8), "CHW", "float64")
    assert (info.class_names, info.task, info.figures, info.preprocess) == ((), "", {}, None)
    assert info.version == portacnn.__version__
    assert known().info.preprocess == Normalize(mean=0.5)


def test_a_training_tells_its_figures():
    x, t = patches(40)
    model = small_net("numpy")
    model.info = ModelInfo(class_names=NAMES, figures={"hand": 3})
    stopping = EarlyStopping(patience=3, monitor="loss", restore_best=True)
    options = {"epochs": 4, "batch_size": 20, "lr": 0.05, "early_stopping": stopping}
    run = Trainer(model, x, t, x, 1 - np.minimum(t, 1), verbose=False, **options)
    run.train()
    best = int(np.argmin(run.history["test_loss"]))  # the worse it fits, the better for these
    assert best < 3
    assert model.info.class_names == NAMES
    assert model.info.task == "multiclass"
    figures = model.info.figures
    assert figures["epochs"] == best + 1
    assert figures["test_accuracy"] == run.history["test_accuracy"][best]
    assert figures["train_loss"] == run.history["train_loss"][best]
    assert figures["hand"] == 3


def test_copies_and_files_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("safetensors")
    model = known()
    before = model.info
    assert copy.deepcopy(model).info == pickle.loads(pickle.dumps(model)).info == model.info
    model.save(tmp_path / "net.safetensors")
    monkeypatch.setattr("portacnn.models.model.VERSION", "9.9")
    again = portacnn.load(tmp_path / "net.safetensors", device="numpy")
    assert again.info == before  # with the version that wrote the file
    again.save(tmp_path / "net.safetensors")
    assert portacnn.load(tmp_path / "net.safetensors", device="numpy").info.version == "9.9"


@needs("onnx")
def test_onnx_holds_it(tmp_path: Path):
    import onnx

    model, path = known(), tmp_path / "net.onnx"
    portacnn.onnx.export(model, path)
    again = portacnn.onnx.load(path, device="numpy")
    assert again.info == model.info
    x = (np.arange(128).reshape(2, 1, 8, 8) * 2).astype("uint8")
    np.testing.assert_allclose(again.predict(x), model.predict(x), rtol=1e-5, atol=1e-6)
    # what any other tool reads
    (entry,) = onnx.load(path).metadata_props
    told = json.loads(entry.value)
    assert (entry.key, told["class_names"]) == ("portacnn", list(NAMES))
    assert (told["input_shape"], told["layout"]) == ([1, 8, 8], "CHW")
    assert told["version"] == portacnn.__version__
    portacnn.onnx.export(Sequential(Linear(2, 2)), path, input_shape=(2,))  # no Model: nothing
    assert not onnx.load(path).metadata_props


HOSTILE: list[Any] = [
    3,
    [],
    {"class_names": "four"},
    {"class_names": ["a", "b"]},
    {"class_names": [1, 2, 3, 4]},
    {"class_names": ["a", "b", "c", "c"]},
    {"class_names": ["a", "b", "c", "d" * (LONGEST + 1)]},
    {"class_names": ["a", "b", "c", "\x1b[2J"]},
    {"class_names": ["a"] * 100_001},
    {"task": ["multiclass"]},
    {"figures": [1.0]},
    {"figures": {"a": "b"}},
    {"figures": {"a": float("nan")}},
    {"figures": {"a\n": 1.0}},
    {"figures": {str(number): 1.0 for number in range(1001)}},
    {"input_range": 3},
    {"input_range": [0.0]},
    {"input_range": [1.0, 0.0]},
    {"input_range": [0.0, float("inf")]},
    {"version": 1},
    {"version": "9" * 1000},
]


@pytest.mark.parametrize("described", HOSTILE, ids=lambda value: repr(value)[:30])
def test_files_with_wrong_info_are_refused(tmp_path: Path, described: Any):
    pytest.importorskip("safetensors")
    path = tmp_path / "net.safetensors"
    small_net("numpy").save(path)
    tensors, header = load_tensors(path)
    save_tensors(path, tensors, {**header, "info": described})
    refuses(ModelFormatError, "net.safetensors", call=lambda: portacnn.load(path, device="numpy"))


@needs("onnx")
@pytest.mark.parametrize(
    "metadata",
    [*(json.dumps(described) for described in HOSTILE), "{", '{"preprocess": {"class": "x"}}'],
    ids=lambda value: value[:30],
)
def test_onnx_files_with_wrong_info_are_refused(tmp_path: Path, metadata: str):
    import onnx

    path = tmp_path / "net.onnx"
    portacnn.onnx.export(small_net("numpy"), path)
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {METADATA: metadata, "other": "\x00"})
    onnx.save(proto, path)
    refuses(ModelFormatError, "net.onnx", call=lambda: portacnn.onnx.load(path, device="numpy"))


def test_a_new_head_has_no_names():
    model = known()
    model.replace("fc2", Linear(None, 3))
    assert model.info.class_names == ()
    model.info = replace(model.info, class_names=["a", "b", "c"])
    assert model.info.class_names == ("a", "b", "c")


def test_wrong_info_is_refused():
    model = small_net("numpy")

    def put(value: Any) -> None:
        model.info = value

    refuses(ArgumentError, "ModelInfo", call=lambda: put({"class_names": NAMES}))
    refuses(ArgumentError, "4 outputs", "3", call=lambda: put(ModelInfo(class_names=list("abc"))))
