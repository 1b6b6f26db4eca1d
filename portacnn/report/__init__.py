"""An HTML page about a run: ``portacnn report RUN``.

    portacnn.report.write("runs/latest")  # writes runs/latest/report.html

The page is one file that loads nothing else. What can't be had any more, such as data that have
moved, is left out, and the page says so.
"""

import os
from pathlib import Path

from portacnn import run_folder
from portacnn.files import write_atomically
from portacnn.report.contents import MOST_IMAGES, gather
from portacnn.report.document import document

__all__ = ["write"]


def write(
    run: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    images: int = MOST_IMAGES,
) -> Path:
    """Write the page about a run; return its path.

    Args:
        run: the run's folder.
        path: of the page; None writes RUN/report.html.
        images: of the test set that are classified, at most, the first ones.

    Raises:
        FileNotFoundError: if the folder is not that of a run.
        OSError: if the page cannot be written.
    """
    target = Path(run) / run_folder.REPORT if path is None else Path(path)
    write_atomically(target, document(gather(Path(run), images)).encode())
    return target
