"""``python -m padkern``: the command line."""

import sys

from padkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
