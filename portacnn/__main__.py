"""``python -m portacnn``: the command ``portacnn``."""

import sys

from portacnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
