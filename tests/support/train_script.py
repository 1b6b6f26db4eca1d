"""scripts/train.py, run as a process or in this one."""

import os
import subprocess
import sys

from portacnn import cli
from support.digits import BLOCK, ROOT
from support.processes import without_settings


def script(folder, digits):
    """A function that runs the script in an empty folder; without matplotlib unless ``blocked``
    says otherwise, since that is slow."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(BLOCK)
    here = folder / "here"
    here.mkdir()

    def run(
        *arguments,
        data=digits,
        script=ROOT / "scripts" / "train.py",
        blocked=("matplotlib",),
        seed="0",
        without=(),
        **variables,
    ):
        environment = without_settings()
        path = [str(folder / "hook"), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {
            "PYTHONPATH": os.pathsep.join(path),
            "BLOCKED": ",".join(blocked),
            "OMP_NUM_THREADS": "1",
        }
        standard = {"--epochs": "1", "--batch-size": "20", "--data": data}
        options = [
            word
            for name, value in standard.items()
            if name not in without
            for word in (name, value)
        ]
        command = [sys.executable, script, *options, *arguments]
        command += [] if seed is None else ["--seed", seed]
        return subprocess.run(
            [str(word) for word in command],
            cwd=here,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    run.here = here
    return run


def one_line(result, *words):
    """A failure and one clear line, with these words in it."""
    assert result.returncode in (cli.FAILURE, cli.USAGE_ERROR), result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
