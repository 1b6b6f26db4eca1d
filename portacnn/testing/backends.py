"""``check_backend``: all checks of a backend."""

from collections.abc import Callable

from portacnn.runtime import Backend, resolve
from portacnn.testing.adapter_checks import adapter_checks
from portacnn.testing.op_checks import op_checks
from portacnn.testing.report import Check, Finding, Report, perform
from portacnn.testing.training_checks import training_checks


def backend_checks(backend: str | Backend) -> list[Check]:
    """Return the checks of a backend: of its adapter, randomness, every op, trainings, files.

    Raises:
        BackendError: if it is unavailable.
    """
    home = resolve(backend)
    name = f"{home.name}:{home.place(home.device)}"
    return [*adapter_checks(home, name), *op_checks(home, name), *training_checks(home, name)]


def check_backend(
    backend: str | Backend,
    *,
    only: str | None = None,
    progress: Callable[[Finding], object] = lambda finding: None,
) -> Report:
    """Check whether an array library computes what portacnn needs.

        >>> from portacnn.testing import check_backend
        >>> print(check_backend("numpy", only="ops: relu"))
        numpy on cpu: 1 check: 1 exact
        exact    ops: relu

    Each op is compared with figures of PyTorch and of plain loops in float64, which are part of the
    package: values, gradients, dtypes, devices, memory layouts, inputs that must not change, and
    transfers to the host. Then come masks and initial weights (to the bit), trainings of 20 steps,
    a training for each loss, checkpoints and model files.

    Args:
        backend: a name that ``resolve`` accepts, such as "torch" or "torch:cuda:0".
        only: the name of a check or a pattern, such as "ops: conv*"; or the beginning of names,
            such as "training". Default: all checks, which take some seconds, or minutes with a
            library that compiles.
        progress: is called with each finding.

    Raises:
        BackendError: if the backend is unavailable.
        ArgumentError: if ``only`` matches no check.
    """
    home = resolve(backend)
    return perform(home, backend_checks(home), only, progress)
