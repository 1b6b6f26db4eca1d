"""docs/start.md word for word: its commands and programs run in order, in one folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from docs.test_pages import ROOT, assert_printed, blocks

from support.matrix import needs
from support.processes import without_settings

PAGE = ROOT / "docs" / "start.md"


def run(words: list[str], folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**without_settings(), "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def photos(folder: Path) -> None:
    """Photos of two classes, and one more."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for name, brightness in (("cat", 60), ("dog", 190)):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.clip(draw.normal(brightness, 30, (48, 64, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.jpg")
    Image.fromarray(pixels).save(folder / "holiday.jpg")


@pytest.mark.slow
@needs("PIL", "matplotlib", "torch")
def test_the_first_page_works_word_for_word(tmp_path: Path):
    photos(tmp_path)
    printed, ran, program = "", 0, ""
    for block in blocks(PAGE):
        if block.kind == "python":
            program += block.text
            printed = run(["-c", block.text if "\nprint(" not in block.text else program], tmp_path)
        elif block.kind == "sh":
            for line in block.text.splitlines():
                *settings, command = re.fullmatch(r"(?:(\w+)=(\S+) )?(.+)", line).groups()
                words = shlex.split(command)
                if words[0] == "portacnn":
                    variables = {settings[0]: settings[1]} if settings[0] else {}
                    printed = run(["-m", *words], tmp_path, **variables)
                    ran += 1
                else:
                    assert words[:2] == ["pip", "install"]
        elif block.kind in ("text", "console"):  # console: of a command
            # the page leaves out what follows the last line that it shows
            shown = block.text.count("\n")
            assert_printed(block.text, "".join(printed.splitlines(True)[:shown]), f"{block.line}")
    assert ran == 11
    assert (tmp_path / "digits" / "report.html").stat().st_size > 10_000
