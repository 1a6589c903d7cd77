"""Which edit answers which sequence: decided once, at prefill, from prompt tokens only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dualedit_kernels import KeyCodes, nearest_key
from dualedit_kernels.nearest_key.codes import BLOCK

from .snapshot import Fired, Snapshot

_EVERYWHERE: dict[torch.device, Tensor] = {}
_TRIES = 3  # lookups around keys of removed edits, before all of those are left out at once


@dataclass(frozen=True)
class Decision:
    """What was decided for a sequence, kept until it ends.

    Attributes:
        route: [B] int64, row of each sequence's edit in the snapshots, -1 for none; None when no edit is
            stored.
        snapshots: memory name to the edits as they were when the decision was made.
    """

    route: Tensor | None
    snapshots: dict[str, Snapshot]
    _fired: dict[str, Fired] = field(default_factory=dict, repr=False, compare=False)

    def fired(self, memory: str) -> Fired:
        """The values of the edits that answer, of one memory; read once for a sequence."""
        if memory not in self._fired:
            self._fired[memory] = self.snapshots[memory].fetch(self.route)
        return self._fired[memory]

    @property
    def nothing(self) -> bool:
        """Whether it is known, without asking the device, that no edit applies."""
        return self.route is None or (self.route.device.type == "cpu" and not bool((self.route >= 0).any()))


def cosine_radius(radius: Tensor, threshold: float) -> Tensor:
    """Radii [N] in cosine distance: an edit's own, and 1 - threshold where it has none (negative)."""
    return torch.where(radius < 0, torch.full_like(radius, 1.0 - threshold), radius).float()


def last_state(hidden: Tensor, position: Tensor) -> Tensor:
    """States [B, D] at positions [B] of hidden [B, L, D]."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), position.to(hidden.device)]


def nearest_edit(
    query: Tensor, stored: Snapshot, metric: str, radius: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The stored edit nearest to each query, and only inside its radius.

    Args:
        query: [B, P], routing keys of the rows, any floating dtype.
        metric: "l2" or "cosine".
        radius: [N] float32; None: however far it is.

    Returns:
        row of the edit [B] int64 (-1: none within its radius), distance to the nearest key [B] float32.
    """
    # Keys as they are stored: widening ten thousand at every prompt takes longer than to look among them, and
    # the codes are of the stored ones.
    keys = stored.tables.kept["key"]
    if stored.tables.places is not None:
        return _nearest_of_kept(query, stored, metric, radius)
    if radius is None:
        radius = _everywhere(keys.shape[0], keys.device)
    return nearest_key(query, keys, radius, metric, stored.codes(keys, metric))


def _everywhere(count: int, device: torch.device) -> Tensor:
    """Infinite radii [count]; made once, as they take as long to make as half a lookup. Not to be changed."""
    known = _EVERYWHERE.get(device)
    if known is None or len(known) < count:
        with torch.inference_mode(False):
            known = _EVERYWHERE[device] = torch.full((count + count // 8,), float("inf"), device=device)
    return known[:count]


def _nearest_of_kept(
    query: Tensor, stored: Snapshot, metric: str, radius: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`nearest_edit` among keys of which some are of removed edits: these are passed over, exactly.

    Mostly no removed edit is the nearest, and one lookup does. Where one is, the keys before and behind it
    are looked among; distances are those of the single lookup, bit for bit, as each is of one key.
    """
    keys, places = stored.tables.kept["key"], stored.tables.places
    assert places is not None
    if not len(stored):
        return nearest_key(query, keys[:0], torch.empty(0, device=keys.device), metric)
    codes = stored.codes(keys, metric)
    cuts: list[int] = []
    for attempt in range(_TRIES + 1):
        row, distance = _nearest_between(query, keys, metric, codes, cuts)
        place = torch.searchsorted(places, row.clamp(min=0)).clamp(max=len(places) - 1)
        gone = row[(row >= 0) & (places[place] != row)].tolist()
        if not gone:
            break
        if attempt + 1 < _TRIES:
            cuts = sorted({*cuts, *gone})
        else:
            left = torch.ones(len(keys), dtype=torch.bool, device=places.device)
            left[places] = False
            cuts = left.nonzero()[:, 0].tolist()
    near = torch.where(row >= 0, place, -1)
    if radius is not None:
        near = torch.where((near >= 0) & (distance <= radius[near.clamp(min=0)]), near, -1)
    return near, distance


def _nearest_between(
    query: Tensor, keys: Tensor, metric: str, codes: KeyCodes | None, cuts: list[int]
) -> tuple[Tensor, Tensor]:
    """The nearest of the keys that are not in `cuts` (ascending rows), however far."""
    best: tuple[Tensor, Tensor] | None = None
    for first, last in zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(keys)], strict=True):
        for begin, end, coded in _pieces(first, last, codes):
            anywhere = _everywhere(end - begin, keys.device)
            row, distance = nearest_key(query, keys[begin:end], anywhere, metric, coded)
            row = torch.where(row >= 0, row + begin, -1) if begin else row
            if best is None:
                best = row, distance
                continue
            nearer = distance < best[1]  # of equally near ones the first stays
            best = torch.where(nearer, row, best[0]), torch.where(nearer, distance, best[1])
    if best is None:
        return nearest_key(query, keys[:0], torch.empty(0, device=keys.device), metric)
    return best


def _pieces(first: int, last: int, codes: KeyCodes | None) -> list[tuple[int, int, KeyCodes | None]]:
    """Rows from `first` to before `last` in pieces, with the codes of each that has whole blocks of them."""
    if codes is None:
        return [(first, last, None)] if last > first else []
    begin = -(-first // BLOCK)
    end = -(-last // BLOCK) if last == codes.count else last // BLOCK
    if begin >= end:
        return [(first, last, None)] if last > first else []
    among = replace(
        codes, codes=codes.codes[begin:end], values=codes.values[begin:end],
        count=min(end * BLOCK, codes.count) - begin * BLOCK,
    )  # fmt: skip
    found = [(first, begin * BLOCK, None), (begin * BLOCK, begin * BLOCK + among.count, among)]
    found.append((begin * BLOCK + among.count, last, None))
    return [piece for piece in found if piece[1] > piece[0]]
