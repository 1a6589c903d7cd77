"""Who changed what and when, and small pictures of what the edits are about."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from ..files import write_whole

_FILE, _PICTURES = "changes.jsonl", "pictures"
_SIDE = 320  # of a kept picture, in pixels


@dataclass(frozen=True)
class Change:
    """One change of the edits.

    Attributes:
        when: ISO 8601, UTC.
        who: as the person named herself; "" where she did not.
        what: "add", "remove" or "undo".
        edit: its number.
        prompt, target: the question and the answer.
        picture: name of the kept picture, "" where there is none.
    """

    when: str
    who: str
    what: str
    edit: int
    prompt: str
    target: str
    picture: str = ""


class History:
    """The changes of one memory, oldest first; on disk where there is a folder, or else in this process.

    Args:
        folder: of the saved edits, or None.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._lock = threading.Lock()
        self._pictures: dict[str, bytes] = {}
        self.changes: list[Change] = [] if folder is None else _read(folder / _FILE)

    def note(self, change: Change) -> None:
        """Add a change; on disk when this returns."""
        with self._lock:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / _FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(change), ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self.changes = [*self.changes, change]

    def added(self, edit: int) -> Change | None:
        """The change that stored an edit."""
        return next((c for c in reversed(self.changes) if c.edit == edit and c.what == "add"), None)

    def keep_picture(self, image: Image.Image | None) -> str:
        """Keep a small copy of a picture; its name."""
        if image is None:
            return ""
        small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        name = hashlib.sha256(buffer.getvalue()).hexdigest()[:16] + ".png"
        if self.folder is None:
            self._pictures[name] = buffer.getvalue()
        elif not (file := self.folder / _PICTURES / name).is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_bytes(buffer.getvalue())
            os.replace(part, file)
        return name

    def picture(self, name: str) -> bytes | None:
        """The kept picture of a name, as PNG."""
        if not name or self.folder is None:
            return self._pictures.get(name)
        file = self.folder / _PICTURES / name
        return file.read_bytes() if file.is_file() else None


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
