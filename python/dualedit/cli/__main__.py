"""`python -m dualedit.cli`, for when the command itself is not on the PATH."""

import sys

from .app import main

if __name__ == "__main__":
    sys.exit(main())
