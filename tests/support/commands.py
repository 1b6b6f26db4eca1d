"""For commands: run one in this process, and a folder of images of three shapes."""

import subprocess

import numpy as np

from portacnn import cli

CLASSES = ("a circle", "square", "triangle")


def write_shapes(folder, count=8, size=12):
    """A folder for each class, with images of different sizes: bright shapes on a dark ground."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 60, (size + number % 3, size + number % 2, 3), dtype="uint8")
            y, x = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
            y, x = y - size // 2, x - size // 2
            inside = (y**2 + x**2 < 16, abs(y) + 0 * x < 3, y > 2 * abs(x) - 4)[label]
            pixels[inside & (abs(y) < 5) & (abs(x) < 5)] += 160
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


class Command:
    """``portacnn`` in this process: ``command("train", "--epochs", 1).stdout``."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *words):
        self.capsys.readouterr()
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stopped:  # argparse
            status = stopped.code
        return subprocess.CompletedProcess(words, status, *self.capsys.readouterr())

    def fails(self, *words, status=cli.FAILURE):
        """Return the one line that it ends with, which is no traceback."""
        done = self(*words)
        assert done.returncode == status, done
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        return lines[0]
