"""``portacnn info``: what portacnn finds on this machine."""

import argparse
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from portacnn.commands.environment import caches, threads, variables, versions
from portacnn.console import say
from portacnn.errors import PortacnnError
from portacnn.runtime import available_backends, resolve
from portacnn.text import printable

HELP = "versions, backends, devices, threads and caches of this machine"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print what there is; return the exit status."""
    backends = available_backends()
    found = {
        "versions": versions(),
        "platform": platform.platform(),
        "backends": [asdict(each) for each in backends],
        "default": _default(),
        "threads": threads(),
        "variables": variables(),
        "caches": [{"folder": folder, "bytes": size} for folder, size in caches()],
    }
    if options.json:
        say(json.dumps(found, indent=1))
    else:
        say(*_lines(found, list(map(str, backends))))
    return 0


def _width() -> int:
    return shutil.get_terminal_size().columns - 1


def _default() -> str:
    """Return the backend that is taken if none is named, or why there is none."""
    try:
        return str(resolve())
    except PortacnnError as error:
        return f"none: {error}"


def _lines(found: Mapping[str, Any], backends: list[str]) -> Iterator[str]:
    """Yield what was found for people."""
    for name, version in found["versions"].items():
        yield f"{name:18}{version or 'not installed'}"
    yield f"{'platform':18}{found['platform']}"
    yield ""
    yield "backends"
    for line in backends:
        yield from wrap(line, _width(), initial_indent="  ", subsequent_indent="    ")
    yield f"  default: {found['default']}"
    yield ""
    yield "threads"
    for name, count in found["threads"].items():
        yield f"  {name:16}{count}"
    for name, value in found["variables"].items():
        yield f"  {name}={printable(value)}"
    yield ""
    yield "caches"
    for each in found["caches"]:
        yield f"  {each['folder']}  {each['bytes'] / (1 << 20):,.1f} MiB"
