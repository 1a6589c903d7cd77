"""Exit codes, and errors that fit on a line and speak of options."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DEBUG = "DUALEDIT_DEBUG"
USER_ERROR, INTERRUPTED = 2, 130


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"dualedit: {' '.join(str(message).split())}", file=sys.stderr)


def run(command: Callable[[], object]) -> int:
    """Run a command and give its exit code: 0, 1 for an edit that failed, 2 for what the user can mend,
    130 for
    Ctrl-C.

    Anything else is a bug and keeps its traceback; so does everything with DUALEDIT_DEBUG=1.
    """
    try:
        code = command()
        if code == INTERRUPTED:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        complain("stopped; saved files are as they were.")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        return 0
    except Exception as error:
        message = user_message(error)
        if message is None or os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        complain(message)
        return getattr(error, "exit_code", USER_ERROR)


def user_message(error: Exception) -> str | None:
    """What to tell the user about an error, or None for one that is not the user's to mend."""
    if hasattr(error, "format_message"):  # a wrong option or argument, from typer
        context = getattr(error, "ctx", None)
        hint = f" Try '{context.command_path} --help'." if context is not None else ""
        return error.format_message().rstrip(".") + "." + hint
    if hasattr(error, "exit_code"):  # EditFailed
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    if isinstance(error, KeyError):
        return str(error.args[0]) if error.args else "not found."
    if isinstance(error, (ValueError, OSError, ImportError)):
        return (
            str(error) if str(error).strip() else f"{type(error).__name__}, without a word of what is wrong."
        )
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's text with something in it, or the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


@contextmanager
def options(**names: str) -> Iterator[None]:
    """Let errors name the options that a user typed in place of the arguments of Python functions.

    Args:
        names: argument to option: with image_root="--images", "Pass image_root=" becomes "Pass --images".
    """
    try:
        yield
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (with_options(error.args[0], names), *error.args[1:])
        raise


def with_options(message: str, names: dict[str, str]) -> str:
    """A message with options for the arguments that it names: `name=value` becomes `--name value`."""
    if not names:
        return message
    argument = re.compile(rf"(?<![\w.(])({'|'.join(map(re.escape, names))})=(True\b|None\b)?(\S?)")

    def option(found: re.Match) -> str:
        name, constant, following = found.groups()
        shown = names[name]
        if constant == "None" and shown.isupper():
            return f"{shown} -{following}"
        if constant == "None":
            return f"{shown} (not given){following}"
        gap = " " if following and constant is None and following not in ",.;:" else ""
        return shown + gap + following

    return argument.sub(option, message)
