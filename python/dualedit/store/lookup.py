"""Which edit of a store answers a question, by its routing key."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .candidates import FlatKeys, KeySource
from .reading import EditFile, Moment

Maker = Callable[[Tensor, Tensor, str], KeySource]


@dataclass(frozen=True)
class Route:
    """What was decided about one question.

    Attributes:
        edit: the file of the edit that answers, None for none.
        nearest: number of the nearest edit; None where there is none.
        distance: to it.
    """

    edit: EditFile | None
    nearest: int | None
    distance: float


class Lookup:
    """The edits of one moment that may answer, looked up by their keys.

    Args:
        moment: of a store.
        metric: "l2" or "cosine".
        radii: how far edits reach [N], from the table "radius" [N] (`EditMethod.radii`).
        make: makes the source of candidates from keys [N, P], radius [N] and metric; `FlatKeys` is exact.
    """

    def __init__(
        self, moment: Moment, metric: str, radii: Callable[[Tensor], Tensor], make: Maker = FlatKeys
    ):
        self.moment, self.metric, self._radii, self._make = moment, metric, radii, make
        self._lock = threading.Lock()
        self._made: tuple[Tensor, KeySource] | None = None
        self._until = 0.0

    def _source(self) -> tuple[Tensor, KeySource]:
        """Rows of the moment that answer now, and their keys; made anew when one of them expires."""
        with self._lock:
            now = time.time()
            if self._made is None or now >= self._until:
                answers, ends = self.moment.answering(now), self.moment.ends
                rows = answers.nonzero()[:, 0]
                keys, radius = self.moment.keys, self._radii(self.moment.radius).float()
                if len(rows) < len(answers):
                    keys, radius = keys[rows], radius[rows]
                self._made = (rows, self._make(keys, radius, self.metric))
                self._until = float(ends[rows].min()) if len(rows) else float("inf")
            return self._made

    def routes(self, query: Tensor) -> list[Route]:
        """What is decided about questions of these routing keys [B, P]."""
        rows, source = self._source()
        if not len(rows):
            return [Route(None, None, float("inf")) for _ in query]
        found = source.nearest(query)
        routes = []
        decided = (found.route.tolist(), found.row.tolist(), found.distance.tolist())
        for route, row, far in zip(*decided, strict=True):
            nearest = int(self.moment.ids[rows[row]]) if row >= 0 else None
            edit = self.moment.file_of(nearest) if route >= 0 and nearest is not None else None
            routes.append(Route(edit, nearest, far))
        return routes
