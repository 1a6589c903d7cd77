"""What every command shares: quiet libraries, notes, and errors that fit on a line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DEBUG = "DUALEDIT_DEBUG"
_OFFLINE = "HF_HUB_OFFLINE"
USER_ERROR, INTERRUPTED = 2, 130


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"dualedit: {' '.join(str(message).split())}", file=sys.stderr)


def run(command: Callable[[], object]) -> int:
    """Run a command and give its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C.

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
        return USER_ERROR


def user_message(error: Exception) -> str | None:
    """What to tell the user about an error, or None for one that is not the user's to mend."""
    if hasattr(error, "format_message"):  # a wrong option or argument, from typer
        context = getattr(error, "ctx", None)
        hint = f" Try '{context.command_path} --help'." if context is not None else ""
        return error.format_message().rstrip(".") + "." + hint
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    if isinstance(error, KeyError):
        return str(error.args[0]) if error.args else "not found."
    if isinstance(error, (ValueError, OSError, ImportError)):
        return str(error)
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep other libraries' bars, advice and warnings off the terminal, and the libraries off the network.

    Our own warnings become notes.
    """
    offline = os.environ.get(_OFFLINE)
    os.environ[_OFFLINE] = "1"  # models and edits are local; PEFT would ask the hub about the embedded one
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if offline is None:
            del os.environ[_OFFLINE]
        else:
            os.environ[_OFFLINE] = offline
    for text in dict.fromkeys(str(w.message) for w in caught if _is_ours(w)):
        print(f"Note: {' '.join(text.split())}", file=sys.stderr)


def _is_ours(warning: warnings.WarningMessage) -> bool:
    package = Path(__file__).resolve().parents[1]
    return package in Path(warning.filename).resolve().parents


def use_few_threads() -> None:
    """One thread for the embedded model, which is too small for more, unless OMP_NUM_THREADS is set."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def shows_progress() -> bool:
    """Progress bars belong on a terminal, not in a log file."""
    return sys.stderr.isatty()
