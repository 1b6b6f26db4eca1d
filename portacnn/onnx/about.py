"""A model's info in the metadata of an ONNX file: JSON under the key "portacnn"."""

import json
from typing import Any

from portacnn.errors import ModelFormatError
from portacnn.models import Model
from portacnn.models.info import rebuild_info
from portacnn.models.preprocess import rebuild_preprocess


def about(model: Model) -> dict[str, Any]:
    """Return a model's metadata as JSON values."""
    described = model.description_of_info()
    described |= {"input_shape": list(model.input_shape), "layout": model.info.layout}
    if model.preprocess is not None:
        described["preprocess"] = model.preprocess.description()
    return described


def tell(model: Model, metadata: str) -> None:
    """Set a model's metadata from the JSON text of a file, as written from ``about``. Raises
    ModelFormatError, or an error of ``NONSENSE``."""
    try:
        described = json.loads(metadata)
    except ValueError as error:
        raise ModelFormatError(f"its metadata are not JSON: {error}") from None
    model.info = rebuild_info(described)
    model.preprocess = rebuild_preprocess(described.get("preprocess"))
