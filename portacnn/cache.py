"""Locate the folder for downloaded data and compiled kernels."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    r"""Return the folder for downloads and compiled kernels. It is not created here.

    The first of these that applies:

    - the environment variable ``PORTACNN_CACHE``;
    - Windows: ``%LOCALAPPDATA%\\portacnn\\Cache``;
    - macOS: ``~/Library/Caches/portacnn``;
    - elsewhere: ``$XDG_CACHE_HOME/portacnn`` if that variable is an absolute path, else
      ``~/.cache/portacnn``.

    Raises:
        FileNotFoundError: if no variable is set and the user has no home folder.
    """
    if chosen := os.environ.get("PORTACNN_CACHE"):
        # absolute, because the working folder may change
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else _home() / "AppData" / "Local") / "portacnn" / "Cache"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "portacnn"
    # by the XDG standard a relative path is ignored
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else _home() / ".cache") / "portacnn"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # a container's user without a home
        raise FileNotFoundError(
            "this user has no home folder for the cache; set PORTACNN_CACHE to a writable folder"
        ) from error
