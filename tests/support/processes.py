"""Processes that tests start."""

import os


def without_settings() -> dict[str, str]:
    """Return this process's environment without the variables that portacnn reads."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PORTACNN_")}
