"""What generators made and the model said, a line each: a stopped build goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Cache:
    """Results by what they depend on, in a JSONL file; a last line that was cut short is made again.

    Args:
        file: made if it is not there; None keeps results in memory alone.

    Raises:
        ValueError: the file is damaged, or something else.
    """

    def __init__(self, file: str | os.PathLike[str] | None = None):
        self.file = None if file is None else Path(file)
        self._known: dict[str, Any] = {}
        if self.file is None or not self.file.is_file():
            return
        text = self.file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self._known[record["key"]] = record["found"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.file}, line {number} is no line of a cache: pass another file."
                ) from error
        if whole != text:
            self.file.write_text(whole, encoding="utf-8")

    @staticmethod
    def key(*parts: object) -> str:
        """A name for what a result depends on."""
        return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:24]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """A known result, or what `make` gives now (as JSON holds it), which is then kept."""
        if key not in self._known:
            found = json.loads(json.dumps(make()))
            self._known[key] = found
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as opened:
                    opened.write(json.dumps({"key": key, "found": found}, ensure_ascii=False) + "\n")
        return self._known[key]
