"""The version of the library, which saved folders name."""

__version__ = "0.1.0"
