"""The command line: `dualedit demo | eval | report | ask | edit | list | remove | train | calibrate ...`."""

from .app import main

__all__ = ["main"]
