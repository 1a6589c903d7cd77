"""A file of what was asked, answered and routed, a line a sample, from which a stopped run goes on.

The first line holds the arguments of the run; another run with other arguments is refused, because its
figures would be a mixture. Each further line is one sample under one method, written when it is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .processes import Alone, Processes

MARK = "dualedit_eval"
VERSION = 1
Key = tuple[str, str, int]


class Journal:
    """Records of an evaluation in a JSONL file.

    Args:
        file: made if it is not there.
        arguments: whatever decides the figures, as JSON holds it; names are shown in errors.
        processes: each writes a part of its own, and `close` puts them together.

    Raises:
        ValueError: the file was begun with other arguments, or is something else.
    """

    def __init__(
        self, file: str | os.PathLike, arguments: Mapping[str, Any], processes: Processes | None = None
    ):
        self.file = Path(file)
        self.processes = Alone() if processes is None else processes
        self._arguments = json.loads(json.dumps(dict(arguments)))
        self._known: dict[Key, dict[tuple[str, int], dict]] = {}
        for part in self._parts():
            for record in self._read(part):
                key = (record.pop("method"), record.pop("protocol"), record.pop("edits"))
                self._known.setdefault(key, {})[record["phase"], record["sample"]] = record
        self.processes.wait()  # nobody writes before all have read
        own = self.file if self.processes.index == 0 else self._part(self.processes.index)
        own.parent.mkdir(parents=True, exist_ok=True)
        _cut_unfinished(own)
        fresh = not own.is_file() or own.stat().st_size == 0
        self._out = own.open("a", encoding="utf-8")
        if fresh:
            self._line({MARK: VERSION, "arguments": self._arguments})

    def known(self, key: Key) -> dict[tuple[str, int], dict]:
        """What an earlier run recorded of (method, protocol, edits): by phase and sample."""
        return dict(self._known.get(key, {}))

    def write(self, key: Key, unit: Mapping) -> None:
        """Keep a sample's records; on the disk when this returns, as far as the process is concerned."""
        method, protocol, edits = key
        self._line({"method": method, "protocol": protocol, "edits": edits, **unit})

    def close(self) -> None:
        """Put the parts of all processes into the one file."""
        self._out.close()
        self.processes.wait()
        if self.processes.index == 0 and len(self._parts()) > 1:
            lines = [json.dumps({MARK: VERSION, "arguments": self._arguments}, ensure_ascii=False)]
            for part in self._parts():
                lines += [json.dumps(record, ensure_ascii=False) for record in self._read(part)]
            whole = self.file.with_name(f".{self.file.name}.whole")
            whole.write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
            parts = self._parts()[1:]
            os.replace(whole, self.file)
            for part in parts:
                part.unlink()
        self.processes.wait()

    def _line(self, record: Mapping) -> None:
        self._out.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._out.flush()

    def _part(self, index: int) -> Path:
        return self.file.with_name(f"{self.file.name}.part{index}")

    def _parts(self) -> list[Path]:
        """The file and what is left of other processes' parts."""
        start = f"{self.file.name}.part"
        others = sorted(file for file in self.file.parent.glob("*") if file.name.startswith(start))
        return [part for part in (self.file, *others) if part.is_file() and part.stat().st_size]

    def _read(self, part: Path) -> Iterator[dict]:
        """The records of a part. A last line that was cut short belongs to a sample that is asked again."""
        lines = part.read_text(encoding="utf-8", errors="replace").split("\n")
        try:
            head = json.loads(lines[0])
            began = head["arguments"] if head[MARK] == VERSION else None
        except (ValueError, TypeError, KeyError):
            began = None
        if began is None:
            if len(lines) == 1 and lines[0].startswith(f'{{"{MARK}"'):
                return  # stopped while writing its very first line
            raise ValueError(
                f"{part} holds something else than the records of an evaluation: pass another file."
            )
        self._check(part, began)
        for number, line in enumerate(lines[1:-1], start=2):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{part}, line {number} is damaged ({error}): pass another file.") from error

    def _check(self, part: Path, began: Mapping) -> None:
        names = [*dict.fromkeys([*began, *self._arguments])]
        other = [name for name in names if began.get(name) != self._arguments.get(name)]
        if other:
            told = "; ".join(
                f"{name} {began.get(name)!r}, now {self._arguments.get(name)!r}" for name in other
            )
            raise ValueError(
                f"{part} was begun by a run with other arguments ({told}): pass those again to continue it, "
                "or another file."
            )


def _cut_unfinished(file: Path) -> None:
    """Take off a last line without its end."""
    if file.is_file():
        text = file.read_bytes()
        if text and not text.endswith(b"\n"):
            with file.open("r+b") as opened:
                opened.truncate(text.rfind(b"\n") + 1)
