"""``python -m fastbert.bench``: the same as ``fastbert bench``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
