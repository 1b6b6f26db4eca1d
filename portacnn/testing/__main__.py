"""``python -m portacnn.testing NAME...``: check backends; print reports, or a table of several."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from portacnn.console import say
from portacnn.errors import ArgumentError, BackendError
from portacnn.testing.backends import check_backend
from portacnn.testing.report import STATUSES, Finding, Report

GROUPS = ("adapter", "randomness", "ops", "training", "tasks", "files")


def table(reports: Sequence[Report]) -> list[str]:
    """Return a Markdown table: a row for each backend, a column for each group of checks."""
    columns = [*GROUPS, "compiled step", "seconds"]
    lines = ["| backend | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for report in reports:
        cells = []
        for group in GROUPS:
            found = [f for f in report.findings if f.name.startswith(f"{group}: ")]
            counts = Counter(finding.status for finding in found)
            largest = max((finding.error or 0.0 for finding in found), default=0.0)
            told = ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s])
            cells.append(f"{told} ({largest:.0e})" if largest else told)
        step = [f for f in report.findings if f.name == "training: compiled step"]
        cells.append(step[0].status if step else "")
        cells.append(f"{sum(finding.seconds for finding in report.findings):.0f}")
        lines.append(f"| {report.subject} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Check backends; return 0 if nothing is wrong, 1 if something is, 2 if one is unavailable."""
    parser = argparse.ArgumentParser(prog="python -m portacnn.testing", description=__doc__)
    parser.add_argument("backends", nargs="+", metavar="NAME", help="such as torch:cuda:0")
    parser.add_argument("--only", metavar="PATTERN", help='checks by name, such as "ops: conv*"')
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports as JSON")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write them as JUnit XML")
    options = parser.parse_args(arguments)
    alone = len(options.backends) == 1

    def told(finding: Finding) -> None:
        say(str(finding))

    try:
        reports = [
            check_backend(name, only=options.only, progress=told if alone else lambda finding: None)
            for name in options.backends
        ]
    except (BackendError, ArgumentError) as error:
        say(f"error: {error}", error=True)
        return 2
    if alone:
        say(reports[0].summary())
    else:
        say(*table(reports))
        say(*(str(finding) for report in reports for finding in report.wrong))
    if options.json:
        options.json.write_text(f"[{', '.join(report.to_json() for report in reports)}]\n")
    if options.junit:
        suites = "".join(report.to_junit() for report in reports)
        options.junit.write_text(
            f"<?xml version='1.0' encoding='utf-8'?>\n<testsuites>{suites}</testsuites>\n"
        )
    return 0 if all(report.ok for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
