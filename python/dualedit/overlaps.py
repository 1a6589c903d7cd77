"""Edits that are near each other: what is done about a new one, and which stored ones contradict."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .editing import Edit, Near, TriedEdit, edits_of
from .records import uid_of

if TYPE_CHECKING:
    from .tuners.adapter import EditAdapter

log = logging.getLogger("dualedit.policies")
_BLOCK = 1024  # edits whose distances to all others are held at a time


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Policies:
    """What happens to a new edit where another one is stored already. Each decision is logged
    ("dualedit.policies") and noted with the edit (`Edit.overlaps`).

    Attributes:
        repeated: the same picture and question, the same answer. "replace": the new one takes the old one's
            place; "refuse": the old one stays.
        changed: the same picture and question, another answer. "replace" or "refuse".
        inside: its key lies inside the nearest edit's radius, or that one's key inside its own; the same
            answer. "nearest": both are stored, and an input is answered by the nearer one; "refuse".
        opposite: likewise, with another answer. "nearest", "replace" or "refuse".
    """

    repeated: str = "replace"
    changed: str = "replace"
    inside: str = "nearest"
    opposite: str = "nearest"

    def __post_init__(self) -> None:
        for name in ("repeated", "changed", "inside", "opposite"):
            known = ("replace", "refuse")
            known += () if name in ("repeated", "changed") else ("nearest",)
            if getattr(self, name) not in known:
                raise ValueError(f"policies: {name}={getattr(self, name)!r}: choose one of {known}.")

    def settle(self, tried: TriedEdit, target: str, radius: float) -> None:
        """Decide about a tried edit, inside its trial.

        Args:
            radius: how far the new edit reaches.

        Raises:
            ValueError: a policy refuses it.
        """
        noted = []
        for old in tried.replaced:
            kind = "repeated" if _plain(old.record.get("target", "")) == _plain(target) else "changed"
            noted.append(self._decide(kind, old.edit_id, old.record, 0.0, None))
        for near in tried.near[:1]:
            if near.distance > max(near.radius, radius):
                continue
            alike = _plain(near.record.get("target", "")) == _plain(target)
            kind = "inside" if alike else "opposite"
            noted.append(self._decide(kind, near.edit_id, near.record, near.distance, near))
            if getattr(self, kind) == "replace":
                tried.replace(near)
        if noted:
            tried.record["overlaps"] = noted

    def _decide(self, kind: str, edit_id: int, record: dict, distance: float, near: Near | None) -> dict:
        policy = getattr(self, kind)
        what = {
            "repeated": "says the same of the same picture and question",
            "changed": "answers the same picture and question otherwise",
            "inside": f"is {distance:.3g} away and gives the same answer",
            "opposite": f"is {distance:.3g} away and gives another answer",
        }[kind]
        told = f"edit {edit_id} ({record.get('prompt', '')!r} -> {record.get('target', '')!r}) {what}"
        if policy == "refuse":
            log.info("%s: %s; the new edit is refused", kind, told)
            raise ValueError(f"{told}, and the policy for that is {kind}='refuse'. Remove that edit first.")
        log.info("%s: %s; policy %s", kind, told, policy)
        radius = None if near is None else near.radius
        noted = {"id": edit_id, "uid": uid_of(record, edit_id), "kind": kind, "policy": policy}
        return noted | {"distance": distance, "radius": radius}


@dataclass(frozen=True)
class Conflict:
    """Two stored edits of which one reaches the other's key, with different answers.

    Attributes:
        first, second: the edits, the older one first.
        distance: between their keys.
        same_question: whether the keys are the same, so that only one of the two can ever answer.
    """

    first: Edit
    second: Edit
    distance: float
    same_question: bool


def distances(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    """From each query [B, P] to each key [N, P]: [B, N] float32, "l2" or "cosine" distance."""
    one, other = query.float(), keys.float().to(query.device)
    if metric == "l2":
        return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
    unit = torch.nn.functional.normalize
    return (1.0 - unit(one, dim=-1) @ unit(other, dim=-1).T).clamp(min=0.0)


def conflicts_in(adapter: EditAdapter) -> Iterator[Conflict]:
    """The conflicts among an adapter's edits that may answer, in the order of their numbers."""
    stored = adapter.stored()
    if len(stored) < 2:
        return
    edits = {edit.id: edit for edit in edits_of(adapter)}
    keys, radii = stored.tables["key"], adapter.radii(stored)
    targets = [_plain(edits[i].target) for i in stored.ids]
    for begin in range(0, len(stored), _BLOCK):
        far = distances(keys[begin : begin + _BLOCK], keys, adapter.metric)
        reach = torch.maximum(radii[begin : begin + _BLOCK, None], radii[None])
        for row, other in (far <= reach).nonzero().tolist():
            one = begin + row
            if one < other and targets[one] != targets[other]:
                apart = float(far[row, other])
                scale = float(keys[one].float().norm()) if adapter.metric == "l2" else 1.0
                pair = edits[stored.id_of(one)], edits[stored.id_of(other)]
                yield Conflict(*pair, apart, apart <= 1e-5 * scale)


def nearest_few(adapter: EditAdapter, query: Tensor, count: int) -> list[list[tuple[int, float, float]]]:
    """For each query [B, P], the nearest edits that may answer: number, distance, radius; nearest first."""
    stored = adapter.stored()
    if not len(stored):
        return [[] for _ in range(len(query))]
    radii = adapter.radii(stored)
    # A stable order, so that of equally near ones the oldest comes first, as the lookup has it.
    far, index = distances(query, stored.tables["key"], adapter.metric).sort(dim=1, stable=True)
    found = zip(far[:, :count].tolist(), index[:, :count].tolist(), strict=True)
    return [
        [(stored.id_of(i), d, float(radii[i])) for d, i in zip(row, order, strict=True)]
        for row, order in found
    ]


def shadowed_by(adapter: EditAdapter, edit_ids: Sequence[int]) -> dict[int, int]:
    """Edits whose own key another edit is looked up for: number to that edit's number."""
    stored = adapter.stored()
    rows = {i: row for row, i in enumerate(stored.ids)}
    hidden = {}
    for edit_id in edit_ids:
        if edit_id in rows:
            query = stored.tables["key"][rows[edit_id]][None]
            nearest = nearest_few(adapter, query, 1)[0][0][0]
            if nearest != edit_id:
                hidden[edit_id] = nearest
    return hidden
