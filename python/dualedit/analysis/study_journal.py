"""A file of what the studies have measured, a line a piece, from which a stopped analysis goes on.

As `evaluation.journal`: the first line holds the arguments, and a run with other arguments is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MARK = "dualedit_analysis"
VERSION = 1


class StudyJournal:
    """Measured pieces by study and name.

    Args:
        file: made if it is not there; None keeps everything in memory alone.
        arguments: whatever decides the figures, as JSON holds it.

    Raises:
        ValueError: the file was begun with other arguments, is damaged, or is something else.
    """

    def __init__(self, file: str | os.PathLike | None, arguments: Mapping[str, Any]):
        self.file = None if file is None else Path(file)
        self._arguments = json.loads(json.dumps(dict(arguments)))
        self._known: dict[tuple[str, str], Any] = {}
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # a last line that was cut short is measured again
        if whole:
            self._read(whole.splitlines())
        if whole != text:
            self.file.write_text(whole, encoding="utf-8")
        if not whole:
            self._line({MARK: VERSION, "arguments": self._arguments})

    def get(self, study: str, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured before, or what `measure` finds now, which is then kept."""
        key = (study, name)
        if key not in self._known:
            found = json.loads(json.dumps(measure()))
            self._known[key] = found
            if self.file is not None:
                self._line({"study": study, "name": name, "found": found})
        return self._known[key]

    def knows(self, study: str, name: str) -> bool:
        """Whether a piece was measured before."""
        return (study, name) in self._known

    def of(self, study: str) -> dict[str, Any]:
        """All pieces of a study, by name."""
        return {name: found for (own, name), found in self._known.items() if own == study}

    def _read(self, lines: list[str]) -> None:
        try:
            head = json.loads(lines[0])
            began = head["arguments"] if head[MARK] == VERSION else None
        except (ValueError, TypeError, KeyError):
            began = None
        if began is None:
            raise ValueError(f"{self.file} holds something else than an analysis: pass another file.")
        names = [*dict.fromkeys([*began, *self._arguments])]
        other = [name for name in names if began.get(name) != self._arguments.get(name)]
        if other:
            told = "; ".join(f"{n} {began.get(n)!r}, now {self._arguments.get(n)!r}" for n in other)
            raise ValueError(
                f"{self.file} was begun by an analysis with other arguments ({told}): pass those again to "
                "continue it, or another file."
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                record = json.loads(line)
                self._known[record["study"], record["name"]] = record["found"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.file}, line {number} is damaged ({error}): pass another file."
                ) from error

    def _line(self, record: Mapping) -> None:
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(record, ensure_ascii=False, allow_nan=True) + "\n")
