"""The command line: joins the commands of ``portacnn.commands``, and turns errors into an exit
status.

0: done. 1: failed, because of a file, the data or the training. 2: wrong use: an option, a setting
or a device that there is not. 130, 143: stopped by Ctrl-C, by SIGTERM.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from portacnn.commands import train
from portacnn.commands.environment import installed
from portacnn.commands.messages import in_options, message
from portacnn.console import hang_up, say
from portacnn.errors import ArgumentError, BackendError, PortacnnError
from portacnn.version import VERSION

FAILURE, USAGE_ERROR, INTERRUPTED = 1, 2, 130
COMMANDS = (
    *("train", "evaluate", "predict", "export", "summary", "report"),
    *("info", "backends", "bench"),
)
"""The commands, each a module of its name in ``portacnn.commands``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``portacnn`` command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="portacnn", description="CNNs on NumPy, CuPy, PyTorch and other array libraries"
    )
    parser.add_argument("--version", action="version", version=f"portacnn {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = import_module(f"portacnn.commands.{name}")
        if installed(getattr(command, "NEEDS", "portacnn")):
            made = commands.add_parser(name, help=command.HELP, description=_sentence(command.HELP))
            _add_options(made, command)
    return _run(parser, arguments)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``train`` command alone, as ``scripts/train.py``; return the exit status."""
    parser = argparse.ArgumentParser(prog="train.py", description=_sentence(train.HELP))
    _add_options(parser, train)
    return _run(parser, arguments)


def _add_options(parser: argparse.ArgumentParser, command: ModuleType) -> None:
    command.add_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=command.run)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run a command. Print an error that the user can fix as one line on stderr."""
    debug = False
    names: tuple[str, ...] = ()
    try:
        options = parser.parse_args(arguments)
        debug, names = options.debug, tuple(vars(options))
        return int(options.run(options))
    except (PortacnnError, OSError, MemoryError) as error:
        if debug:
            raise
        say(f"error: {in_options(message(error), names)}", error=True)
        return USAGE_ERROR if isinstance(error, ArgumentError | BackendError) else FAILURE
    except KeyboardInterrupt:
        if debug:
            raise
        say("interrupted", error=True)
        return INTERRUPTED
    finally:
        hang_up()


if __name__ == "__main__":
    sys.exit(main())
