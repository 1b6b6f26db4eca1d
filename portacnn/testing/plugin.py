"""The pytest plugin: ``pytest --portacnn-backend=NAME`` runs each check of a backend as a test.

The tests are added to those that pytest has collected; ``-k "conv2d"`` selects some. pytest imports
this module in every run, so it imports nothing but pytest at first.
"""

from collections.abc import Generator
from typing import Any

import pytest

OPTION = "--portacnn-backend"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("portacnn").addoption(
        OPTION,
        action="append",
        default=[],
        metavar="NAME",
        help="check a backend of portacnn, such as torch:cuda:0; may be given several times",
    )


class Checks(pytest.Collector):
    """The checks of one backend."""

    def collect(self) -> list[pytest.Item]:
        """Make a test of each check."""
        from portacnn.errors import BackendError
        from portacnn.testing.backends import backend_checks

        try:
            checks = backend_checks(self.name)
        except BackendError as error:
            raise self.CollectError(f"{OPTION}={self.name}: {error}") from None
        return [CheckItem.from_parent(self, name=c.name, check=c) for c in checks]


class CheckItem(pytest.Item):
    """One check. What the backend refuses, and what does not apply, is skipped."""

    def __init__(self, *, check: Any, **options: Any) -> None:
        super().__init__(**options)
        self.check = check

    def runtest(self) -> None:
        """Run the check."""
        from portacnn.testing.report import found_by

        finding = found_by(self.check)
        self.add_report_section("call", "portacnn", str(finding))
        self.user_properties.append(("status", finding.status))
        if finding.error is not None:
            self.user_properties.append(("largest error", finding.error))
        if finding.status == "wrong":
            raise AssertionError(str(finding))
        if finding.status in ("refused", "skipped"):
            pytest.skip(f"{finding.status}: {finding.message}")

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        """Return the finding alone, without a traceback."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Return the name of the test."""
        return self.path, None, f"{self.parent.name if self.parent else ''}: {self.name}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Add the checks of the backends that were asked for to the session's tests."""
    report = yield
    if isinstance(collector, pytest.Session) and report.passed:
        names = collector.config.getoption(OPTION)
        report.result += [Checks.from_parent(collector, name=name) for name in names]
    return report
