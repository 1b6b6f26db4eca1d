"""``portacnn report``: an HTML page about a run."""

import argparse
from importlib import import_module
from pathlib import Path

from portacnn import run_folder
from portacnn.console import say

HELP = "write an HTML page about a run"
NEEDS = "portacnn.report"
"""The package that makes the page. Without it there is no such command."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", metavar="FILE", help=f"by default RUN/{run_folder.REPORT}")


def run(options: argparse.Namespace) -> int:
    """Write the page; return the exit status."""
    path = options.out or Path(options.run_folder) / run_folder.REPORT
    import_module(NEEDS).write(options.run_folder, path)
    say(f"wrote {path}")
    return 0
