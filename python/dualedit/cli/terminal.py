"""What commands do to the terminal and the machine: quiet libraries, notes, progress bars, threads."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OFFLINE = "HF_HUB_OFFLINE"
_WISHED = os.environ.get(_OFFLINE, "")


def offline_by_wish() -> bool:
    """Whether the user has told the hub's library to stay off the network."""
    return _WISHED.upper() in ("1", "ON", "YES", "TRUE")


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
