"""ONNX models loaded from a folder, and run by onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import portacnn
import portacnn.onnx
from portacnn.models import GraphModel


def load(model: Any, folder: Path, **options: Any) -> GraphModel:
    onnx.save(model, folder / "model.onnx")
    return portacnn.onnx.load(folder / "model.onnx", **options)


def runtime(model: Any, x: np.ndarray) -> np.ndarray:
    """What onnxruntime makes of it."""
    ort = pytest.importorskip("onnxruntime")
    ort.set_default_logger_severity(3)
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]
