"""``portacnn backends``: the array libraries and their devices."""

import argparse

from portacnn.console import say
from portacnn.runtime import available_backends

HELP = "list the array libraries and their devices"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: it has none."""


def run(options: argparse.Namespace) -> int:
    """Print the list; return the exit status."""
    say(*(str(info) for info in available_backends()))
    return 0
