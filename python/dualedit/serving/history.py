"""Who changed what and when: a line for each change, beside the saved edits."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_whole

_FILE = "changes.jsonl"


@dataclass(frozen=True)
class Change:
    """One change of the edits.

    Attributes:
        when: ISO 8601, UTC.
        who: as the person named herself; "" where she did not.
        what: "add", "remove", "undo", "redo", "enable" or "disable".
        edit: its number.
        prompt, target: the question and the answer.
    """

    when: str
    who: str
    what: str
    edit: int
    prompt: str
    target: str


class History:
    """The changes of one memory, oldest first; on disk where there is a folder, or else in this process.

    Args:
        folder: of the saved edits, or None.
    """

    def __init__(self, folder: Path | None):
        self.file = None if folder is None else folder / _FILE
        self._lock = threading.Lock()
        self.changes: list[Change] = [] if self.file is None else _read(self.file)

    def note(self, change: Change) -> None:
        """Add a change; on disk when this returns. Raises OSError."""
        with self._lock:
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(change), ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self.changes = [*self.changes, change]


def _read(file: Path) -> list[Change]:
    """The changes of a file; a last line that a power cut left half is dropped."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole, _, rest = text.rpartition("\n")
    if rest:
        write_whole(file, whole + "\n" if whole else "")
    changes = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            changes.append(Change(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number}, is damaged ({error}): restore the file.") from error
    return changes
