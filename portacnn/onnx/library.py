"""Import the ``onnx`` package when it is first needed; the rest of portacnn works without it."""

from typing import Any

from portacnn.errors import DependencyError


def onnx_library() -> Any:
    """Return the module ``onnx``, with ``onnx.checker`` and ``onnx.helper``.

    Raises:
        DependencyError: if it is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.helper
    except ImportError as error:
        raise DependencyError('onnx is not installed: pip install "portacnn[onnx]"') from error
    return onnx
