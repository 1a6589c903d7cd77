"""`dualedit fetch NAME`: bring a pretrained model and its pictures into the user's cache."""

from __future__ import annotations

NAMES = ("smol",)


def fetch(name: str) -> None:
    """Fetch what goes by `name`; a second call goes on where the first one stopped."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is nothing to fetch: choose {' or '.join(NAMES)}")
    from ..smol import fetch_smol

    fetch_smol()
