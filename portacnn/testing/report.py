"""Checks and their report: as text, JSON and JUnit XML.

A *check* is a function that returns the largest error it has seen, or None if it measures nothing.
It raises ``Fault`` if what it checks is wrong, and ``NotApplicable`` if there is nothing to check
here. ``perform`` runs checks and makes a ``Report``.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from traceback import extract_tb
from typing import Any, Literal
from xml.etree import ElementTree

from portacnn.errors import ArgumentError, BackendError

Status = Literal["exact", "near", "passed", "refused", "skipped", "wrong"]
STATUSES: tuple[Status, ...] = ("exact", "near", "passed", "refused", "skipped", "wrong")
REFUSALS = (BackendError, NotImplementedError)
"""The exceptions with which a library says that it does not support a case."""


class Fault(AssertionError):  # noqa: N818 (a finding, which ends as text)
    """What is wrong, in one line."""


class NotApplicable(Exception):  # noqa: N818 (no error)
    """Why there is nothing to check."""


@dataclass(frozen=True)
class Check:
    """A check with its name, such as "ops: conv2d"; ``see`` is the Python that runs it alone."""

    name: str
    run: Callable[[], float | None]
    see: str = ""


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        name: of the check.
        status: "exact": every value is the expected one, rounded to its dtype. "near": within the
            tolerance. "passed": right, and nothing was measured. "refused": the library says, in a
            message, that it does not support it. "skipped": there is nothing to check. "wrong":
            anything else.
        error: the largest error, relative to the largest expected value; None if nothing was
            measured.
        message: what is wrong, or why it was refused or skipped.
        see: Python that runs this check alone.
        seconds: that the check took.
    """

    name: str
    status: Status
    error: float | None = None
    message: str = ""
    see: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        error = f"{self.error:.1e}" if self.error else ""
        line = f"{self.status:7}  {self.name:44} {error:>8}  {self.message}".rstrip()
        return f"{line}\n         to see it: {self.see}" if self.status == "wrong" else line


def found_by(check: Check) -> Finding:
    """Run a check."""
    start = time.perf_counter()
    error, message, status = None, "", "passed"
    try:
        error = check.run()
        if error is not None:
            status = "near" if error > 0 else "exact"
    except NotApplicable as reason:
        status, message = "skipped", str(reason)
    except REFUSALS as reason:
        status, message = "refused", f"{type(reason).__name__}: {reason}"
        if not str(reason):  # of a base class: nothing says that this is meant
            status, message = "wrong", f"{_raised_by(reason)} is not implemented"
    except Fault as fault:
        status, message = "wrong", str(fault)
    except Exception as fault:  # of any library
        place = extract_tb(fault.__traceback__)[-1]
        message = f"{type(fault).__name__}: {fault} ({place.filename}, line {place.lineno})"
        status = "wrong"
    seconds = time.perf_counter() - start
    return Finding(check.name, status, error, " ".join(message.split()), check.see, seconds)  # type: ignore[arg-type]


def _raised_by(error: BaseException) -> str:
    """Return the name of the function that raised an error, such as Layer.backward."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "a function" if frame is None else frame.tb_frame.f_code.co_qualname


def chosen(checks: Sequence[Check], only: str | None) -> list[Check]:
    """Return the check called ``only``; else those whose name matches it as a pattern, "ops:
    conv*", or begins with it, "ops". Raises ArgumentError if there is none."""
    if only is None:
        return list(checks)
    found = [check for check in checks if check.name == only] or [
        c for c in checks if fnmatchcase(c.name, only) or c.name.startswith(only)
    ]
    if not found:
        raise ArgumentError(
            f"no check is called {only!r}; they are {', '.join(check.name for check in checks)}"
        )
    return found


@dataclass(frozen=True)
class Report:
    """The findings about one backend, layer, loss or op.

    >>> from portacnn.testing.report import Check, perform
    >>> report = perform("mine", [Check("sums", lambda: 0.0)])
    >>> print(report)
    mine: 1 check: 1 exact
    exact    sums
    """

    subject: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> list[Finding]:
        """The findings that are wrong."""
        return [finding for finding in self.findings if finding.status == "wrong"]

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def summary(self) -> str:
        """Return one line: how many checks have which status."""
        counts = Counter(finding.status for finding in self.findings)
        told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        number = len(self.findings)
        return f"{self.subject}: {number} check{'s' * (number != 1)}: {told}"

    def __str__(self) -> str:
        return "\n".join([self.summary(), *map(str, self.findings)])

    def raise_if_wrong(self) -> None:
        """Raise AssertionError if anything is wrong: for a test."""
        if self.wrong:
            raise AssertionError("\n".join([self.summary(), *map(str, self.wrong)]))

    def to_json(self) -> str:
        """Return the report as JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return json.dumps({"subject": self.subject, "ok": self.ok, "findings": findings}, indent=1)

    def to_junit(self) -> str:
        """Return the report as JUnit XML, which continuous integration reads."""
        counts = Counter(finding.status for finding in self.findings)
        suite = ElementTree.Element(
            "testsuite",
            name=f"portacnn: {self.subject}",
            tests=str(len(self.findings)),
            failures=str(counts["wrong"]),
            errors="0",
            skipped=str(counts["skipped"] + counts["refused"]),
            time=f"{sum(finding.seconds for finding in self.findings):.3f}",
        )
        for finding in self.findings:
            group, _, name = finding.name.rpartition(": ")
            case = ElementTree.SubElement(
                suite, "testcase", classname=group, name=name, time=f"{finding.seconds:.3f}"
            )
            if finding.status == "wrong":
                failure = ElementTree.SubElement(case, "failure", message=finding.message)
                failure.text = f"to see it: {finding.see}"
            elif finding.status in ("skipped", "refused"):
                told = f"{finding.status}: {finding.message}"
                ElementTree.SubElement(case, "skipped", message=told)
            else:
                out = ElementTree.SubElement(case, "system-out")
                out.text = f"{finding.status}, largest error {finding.error or 0.0:.1e}"
        return ElementTree.tostring(suite, encoding="unicode")


def perform(
    subject: Any,
    checks: Iterable[Check],
    only: str | None = None,
    progress: Callable[[Finding], object] = lambda finding: None,
) -> Report:
    """Run the checks, or those that ``only`` matches (``chosen``); call ``progress`` with each
    finding."""
    findings = []
    for check in chosen(list(checks), only):
        findings.append(found_by(check))
        progress(findings[-1])
    return Report(str(subject), tuple(findings))
