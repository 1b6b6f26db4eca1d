"""The ``onnx`` package, imported when it is first needed: portacnn does without it otherwise."""

from typing import Any

from portacnn.errors import DependencyError


def onnx_library() -> Any:
    """The module ``onnx``, with ``onnx.checker`` and ``onnx.helper``. Raises DependencyError where
    it is not installed."""
    try:
        import onnx
        import onnx.checker
        import onnx.helper
    except ImportError as error:
        raise DependencyError('onnx is not installed: pip install "portacnn[onnx]"') from error
    return onnx
