"""What is noted about an edit: a mapping that JSON can hold, read with or without torch.

Every record has "uid", an id that sorts by time and that no other edit anywhere has; the number of an edit is
short, and its own only in one memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from datetime import date, datetime, timezone
from typing import Any

Record = Mapping[str, Any]
# Of an edit that another one took the place of, this is kept with the new one.
_BRIEF = ("uid", "prompt", "target", "created", "author", "note", "tags")
ANNOTATIONS = ("author", "note", "tags", "expires", "disabled")  # what may change after an edit was stored


def new_uid() -> str:
    """A new id of 32 hexadecimal digits: milliseconds since 1970, then chance (the layout of UUID version 7).

    Ids made in one process sort in the order of their making, as long as its clock does not go back.
    """
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    fraction = rest * 4096 // 1_000_000
    chance = int.from_bytes(os.urandom(8), "big") >> 2
    return f"{milliseconds:012x}7{fraction:03x}{(0b10 << 62) | chance:016x}"


def uid_of(record: Record, edit_id: int) -> str:
    """The id of an edit; of one that was stored before there were ids, made of what is known of it."""
    uid = record.get("uid")
    if isinstance(uid, str) and uid:
        return uid
    known = json.dumps([edit_id, record.get("prompt"), record.get("target"), record.get("created")])
    return "old-" + hashlib.sha256(known.encode()).hexdigest()[:24]


def timestamp() -> str:
    """Now, ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def moment(when: str | date | None, argument: str = "expires") -> str | None:
    """A point in time as records hold it, ISO 8601, UTC; a day by itself begins at midnight UTC.

    Raises:
        ValueError: no point in time.
    """
    if when is None:
        return None
    if isinstance(when, date) and not isinstance(when, datetime):
        when = when.isoformat()
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when.strip().replace("Z", "+00:00"))
        except ValueError as error:
            raise ValueError(
                f"{argument}={when!r} is no point in time: pass ISO 8601, as 2030-01-31 or "
                "2030-01-31T12:00:00Z."
            ) from error
    if not isinstance(when, datetime):
        raise ValueError(f"{argument}={when!r}: pass a text in ISO 8601, a date or a datetime.")
    aware = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return aware.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_of(when: str) -> float:
    """Seconds since 1970 of a point in time as records hold it. Raises ValueError."""
    return datetime.fromisoformat(when.replace("Z", "+00:00")).timestamp()


def expires_at(record: Record) -> float | None:
    """When an edit stops to answer, in seconds since 1970; None: never. A damaged time never comes."""
    try:
        return seconds_of(record["expires"]) if record.get("expires") else None
    except (ValueError, TypeError, AttributeError):
        return None


def answers(record: Record, now: float | None = None) -> bool:
    """Whether an edit may answer: it is not disabled and has not expired."""
    if record.get("disabled"):
        return False
    end = expires_at(record)
    return end is None or (time.time() if now is None else now) < end


def brief(edit_id: int, record: Record) -> dict[str, Any]:
    """What is kept of an edit that another one took the place of."""
    kept = {name: record[name] for name in _BRIEF if name in record}
    return {"id": edit_id, **kept}


def noted(
    author: str | None = None,
    note: str | None = None,
    tags: Iterable[str] | None = None,
    expires: str | date | None = None,
) -> dict[str, Any]:
    """What people note about an edit, checked; what is None is left out.

    Raises:
        ValueError: a text that is none, tags in one text, or no point in time.
    """
    found: dict[str, Any] = {}
    for name, text in (("author", author), ("note", note)):
        if text is not None:
            if not isinstance(text, str):
                raise ValueError(f"{name}={text!r}: pass a text.")
            found[name] = text
    if tags is not None:
        if isinstance(tags, (str, bytes)):
            raise ValueError(f"tags={tags!r} is one text: pass a list with it, tags=[{tags!r}].")
        listed = list(tags)
        if not all(isinstance(tag, str) and tag for tag in listed):
            raise ValueError(f"tags={listed!r}: pass texts that are not empty.")
        found["tags"] = sorted(set(listed))
    if expires is not None:
        found["expires"] = moment(expires)
    return found
