"""Train SimpleConvNet on digits, from a checkout, installed or not: ``python scripts/train.py
--help``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from portacnn.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
