"""An adapter's tensors with the commits of its folder's journal, as PEFT loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..folder import Damaged, View
from ..folder.manifest import WEIGHTS, read_manifest
from ..folder.reading import UNREAD
from ..memory.rows import IDS, LENGTHS, RECORDS, Rows, memories_in, records_in, records_tensor, together

_T = TypeVar("_T")


def read_own(view: View, adapter: str, read: Callable[[Path], _T]) -> _T:
    """Read an adapter's own file, again where it was moved to its place meanwhile.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    while True:
        own = view.own_file(adapter, WEIGHTS)
        try:
            return read(own)
        except (OSError, RuntimeError, SafetensorError) as error:
            if own.is_file():
                raise
            if own == view.folder / view.adapters[adapter] / WEIGHTS:
                raise FileNotFoundError(2, "No such file", str(own)) from error


def with_journal(view: View, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter's own file with what was committed since.

    Args:
        view: the folder.
        adapter: its name in the folder.
        state: what was read of its own file.

    Raises:
        Damaged: files that do not fit together, or that were written anew since the view was taken.
    """
    own = view.own_file(adapter, WEIGHTS)
    place = view.folder / view.adapters[adapter] / WEIGHTS
    if view.manifest is not None and (view.moving or own != place):
        # A save was stopped, or is at work, before its files are in their places: `state` was read there.
        state = read_own(view, adapter, lambda file: load_file(str(file)))
    now = read_manifest(view.folder)
    if view.manifest is not None and (now is None or now != view.manifest):
        raise Damaged(f"folder={str(view.folder)!r} was written anew while it was read. Load it again.")
    if not any(change["adapter"] == adapter for entry in view.entries for change in entry.changes):
        return dict(state)
    try:
        return _merged(view, adapter, state)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise Damaged(
            f"folder={str(view.folder)!r}: the segments do not fit {own.name} ({error}). Restore the folder "
            "from a copy."
        ) from error


def _merged(view: View, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    edits = dict(sorted(view.contents[adapter].items()))
    needed = sorted({kept.source for kept in edits.values()} - {0})
    segments = {seq: load_file(str(view.segment(seq))) for seq in needed}
    result = dict(state)
    for memory in memories_in(list(state)):
        own = Rows(state, memory)
        sources = {0: own} | {seq: Rows(found, f"{adapter}:{memory}") for seq, found in segments.items()}
        tables, lengths = together(sources, [(kept.source, number) for number, kept in edits.items()])
        records = [{} for _ in edits]
        if "radius" in own.tables:
            noted = dict(zip(own.ids, records_in(state[f"{memory}.{RECORDS}"], len(own.ids)), strict=True))
            records = [noted[i] if kept.record is UNREAD else dict(kept.record) for i, kept in edits.items()]
        result |= {f"{memory}.{name}": table for name, table in tables.items()}
        result[f"{memory}.{IDS}"] = torch.tensor(list(edits), dtype=torch.int64)
        result[f"{memory}.{LENGTHS}"] = torch.tensor(lengths, dtype=torch.int64)
        result[f"{memory}.{RECORDS}"] = records_tensor(records)
    return result
