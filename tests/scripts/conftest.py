"""The training script, run as a process (``train``) and in this one (``inside``)."""

import os
import subprocess
import sys

import pytest
from threadpoolctl import threadpool_limits

from portacnn import cli
from support.digits import write_digits
from support.train_script import script


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def train(tmp_path, digits):
    return script(tmp_path, digits)


@pytest.fixture
def inside(train, digits, monkeypatch, capsys):
    """As ``train``, in this process: where nothing depends on the process, since starting one takes
    most of a second."""
    monkeypatch.chdir(train.here)
    for name in os.environ:
        if name.startswith("PORTACNN_"):
            monkeypatch.delenv(name)

    def run(*arguments, data=digits, blocked=("matplotlib",), seed="0", without=(), **variables):
        standard = {"--epochs": "1", "--batch-size": "20", "--data": data, "--seed": seed}
        words = [
            str(word)
            for name, value in standard.items()
            if value is not None and name not in without
            for word in (name, value)
        ]
        capsys.readouterr()
        # one thread of BLAS, as in the process: bits are compared
        with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
            for name, value in variables.items():
                patch.setenv(name, value)
            for name in [*sys.modules, *blocked]:
                if name.partition(".")[0] in blocked:
                    patch.setitem(sys.modules, name, None)
            try:
                status = cli.train_main([*words, *map(str, arguments)])
            except SystemExit as end:  # argparse
                status = end.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run
