"""Seeds of the tests: the same in every run, or fresh ones with DUALEDIT_SEED=random."""

from __future__ import annotations

import os
import random
import zlib

VARIABLE = "DUALEDIT_SEED"
FIXED = "20260613"


def settle() -> str:
    """Draw a seed where a fresh one is asked for, for this process and those that it starts.

    Returns:
        the run's seed, a number as text.
    """
    if os.environ.get(VARIABLE) == "random":
        os.environ[VARIABLE] = str(random.SystemRandom().randrange(2**31))
    return os.environ.get(VARIABLE, FIXED)


def seed_of(name: str) -> int:
    """A seed for a test (or for what tests share) by its name, whatever runs before it or beside it."""
    return zlib.crc32(f"{settle()} {name}".encode()) % 2**31
