"""The prefix cache's salt: what keeps the states of edited prompts to the questions that the edit answers."""

from __future__ import annotations

import hashlib


def salt_of(store: str, edit: str | None, own: str | None = None, fresh: str | None = None) -> str | None:
    """The salt of a request, which the server sets, never the client.

    Without one, an edited prompt's blocks would answer the same question of somebody whose version of the
    store has no such edit, and the other way round.

    Args:
        store: id of the store.
        edit: "3-v1", the edit's file; None for the model as it is.
        own: a salt that the client asked for, to share its blocks with nobody else: it goes into this one.
        fresh: something new, so that no block is shared at all.

    Returns:
        at most 64 hexadecimal digits; None where blocks may be shared with all unedited requests.
    """
    if edit is None and own is None and fresh is None:
        return None
    parts = (store, edit or "", own or "", fresh or "")
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
