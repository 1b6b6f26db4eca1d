"""The conformance kit: check a backend, a layer, a loss or an op of your own.

    from portacnn.testing import check_backend, check_layer
    print(check_backend("torch"))
    check_layer(MyLayer(), (3, 8, 8)).raise_if_wrong()  # in a test

Each check compares with values that share no code with what is checked, and a report says in one
line each what is wrong and how to see it. ``pytest --portacnn-backend=NAME`` runs the checks of a
backend as tests, and ``python -m portacnn.testing NAME`` prints its report. docs/backends.md is the
guide. Nothing else in portacnn imports this package.
"""

from typing import TYPE_CHECKING

from portacnn.lazy import lazily

if TYPE_CHECKING:
    from portacnn.testing.backends import check_backend
    from portacnn.testing.layer_checks import check_layer
    from portacnn.testing.loss_checks import check_loss
    from portacnn.testing.own_op_checks import check_op
    from portacnn.testing.report import Report
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "portacnn.testing.backends": ("check_backend",),
            "portacnn.testing.layer_checks": ("check_layer",),
            "portacnn.testing.loss_checks": ("check_loss",),
            "portacnn.testing.own_op_checks": ("check_op",),
            "portacnn.testing.report": ("Report",),
        },
    )

__all__ = ["Report", "check_backend", "check_layer", "check_loss", "check_op"]
