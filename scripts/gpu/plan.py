"""Write the tile figures of ``gpu_check.py`` into the plan: ``python scripts/gpu/plan.py
runs/gpu/gpu_check.json --write``.

The section "yields" of that file has the table in the form of the plan. Without ``--write`` the new
source is printed.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "backends" / "cupy" / "plan.py"
_TABLE = re.compile(r'^YIELDS: .*?^\}\n(?:""".*?"""\n)?', re.MULTILINE | re.DOTALL)
_NAMES = re.compile(r'"(\w+)": \{([^}]*)\}')

Yields = dict[str, dict[str, float]]


class PlanError(Exception):
    """Raised if the figures do not form a plan; the message says why."""


def measured(report: dict[str, Any]) -> tuple[Yields, str]:
    """Return the table of a report and its source: GPU and date."""
    for section in report["sections"]:
        if section["section"] == "yields" and "yields" in section["figures"]:
            if section["red"]:
                raise PlanError(f"the section yields is red: {'; '.join(section['red'])}")
            return section["figures"][
                "yields"
            ], f"{section['figures']['gpu']}, {report['started'][:10]}"
    raise PlanError("the report has no yields: run gpu_check.py --only yields")


def source(yields: Yields, where: str) -> str:
    """Return the table as Python source."""
    lines = ["YIELDS: dict[str, dict[str, float]] = {"]
    for kernel, tiles in yields.items():
        each = ", ".join(f'"{name}": {round(share, 2)}' for name, share in tiles.items())
        lines.append(f'    "{kernel}": {{{each}}},')
    lines += [
        "}",
        '"""What a tile reaches of a multiprocessor\'s arithmetic, relative to the best one. '
        "Measured:",
        f"{where} (gpu_check.py).",
        '"""',
    ]
    return "\n".join(lines) + "\n"


def planned(text: str, yields: Yields, where: str) -> str:
    """Return the plan's source with this table. Raises PlanError if the tiles differ."""
    old = _TABLE.search(text)
    if old is None:
        raise PlanError("the plan has no table YIELDS")
    known = {kernel: re.findall(r'"(\w+)":', tiles) for kernel, tiles in _NAMES.findall(old[0])}
    for kernel in known:
        if sorted(yields.get(kernel, {})) != sorted(known[kernel]):
            raise PlanError(
                f"{kernel}: the plan has {', '.join(known[kernel])}; measured were "
                f"{', '.join(yields.get(kernel, {})) or 'none'}"
            )
    if any(not 0 < share <= 1 for tiles in yields.values() for share in tiles.values()):
        raise PlanError("a share is not between 0 and 1")
    ordered = {
        kernel: {name: yields[kernel][name] for name in names} for kernel, names in known.items()
    }
    return text[: old.start()] + source(ordered, where) + text[old.end() :]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="gpu_check.json")
    parser.add_argument("--write", action="store_true", help=f"change {PLAN.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    try:
        yields, where = measured(json.loads(options.report.read_text()))
        text = planned(PLAN.read_text(), yields, where)
    except (OSError, ValueError, KeyError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.write:
        PLAN.write_text(text)
    print(source(yields, where), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
