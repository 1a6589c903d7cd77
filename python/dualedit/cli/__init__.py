"""The command line: `dualedit demo | ask | edit | list | remove | sample | layers | kernels`."""

from .app import main

__all__ = ["main"]
