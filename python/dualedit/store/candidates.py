"""Which stored keys may be nearest to a query: all, those of an inverted index, those of other machines.

A source of candidates proposes rows; `nearest_key` alone decides among them, so that distance, ties and
radius are those of a lookup in one table. An exact source (`FlatKeys`, and `ShardedKeys` or `Together` of
such) gives the very decision of that lookup. An approximate one (`InvertedKeys`) may miss the nearest key;
then the nearest of its candidates decides, which can open an edit that the missed one would have kept closed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dualedit_kernels import KeyCodes, nearest_key

_FAISS = "InvertedKeys needs faiss: pip install faiss-cpu."
_TRAINED = 64  # keys to a list that the lists are placed by


@dataclass(frozen=True)
class Proposed:
    """Candidates of B queries, C for each.

    Attributes:
        rows: [B, C] int64, rows of the whole table; -1 where there is none.
        keys: [B, C, P], as they are stored.
        radius: [B, C] float32.
    """

    rows: Tensor
    keys: Tensor
    radius: Tensor


@dataclass(frozen=True)
class Nearest:
    """What was decided about B queries.

    Attributes:
        route: [B] int64, row of the edit that answers, -1 for none.
        row: [B] int64, the nearest row, within its radius or not; -1 where there is none.
        distance: [B] float32 to it.
    """

    route: Tensor
    row: Tensor
    distance: Tensor


class KeySource(ABC):
    """Proposes stored keys for queries.

    Attributes:
        metric: "l2" or "cosine".
    """

    metric: str

    @abstractmethod
    def propose(self, query: Tensor) -> Proposed:
        """Candidates of queries [B, P]."""

    def nearest(self, query: Tensor) -> Nearest:
        """The nearest of the candidates of queries [B, P], and whether each lies within its radius.

        Ties go to the lowest row. A key that is not finite (for "cosine": or zero) is never nearest.
        """
        return decide(query, self.propose(query), self.metric)


def decide(query: Tensor, found: Proposed, metric: str) -> Nearest:
    """The decision of `nearest_key` among the candidates of each query."""
    size = len(query)
    row = torch.full((size,), -1, dtype=torch.int64)
    route, distance = row.clone(), torch.full((size,), torch.inf)
    for i in range(size):
        rows, order = found.rows[i].sort()
        order = order[rows >= 0]
        if not len(order):
            continue
        keys, radius = found.keys[i, order].contiguous(), found.radius[i, order].contiguous()
        everywhere = torch.full_like(radius, torch.inf)
        near, far = nearest_key(query[i : i + 1], keys, everywhere, metric)
        if int(near) >= 0:
            row[i], distance[i] = found.rows[i, order[near]], far
            route[i] = row[i] if bool(far <= radius[near]) else -1
    return Nearest(route, row, distance)


class FlatKeys(KeySource):
    """Every key is compared: exact.

    Args:
        keys: [N, P], in memory or mapped from a file.
        radius: [N] float32, in the metric's unit.
        metric: "l2" or "cosine".
        first: row of the first key in the whole table.
        codes: of these keys, for `nearest_key`.
    """

    def __init__(
        self, keys: Tensor, radius: Tensor, metric: str, first: int = 0, codes: KeyCodes | None = None
    ):
        self.keys, self.radius, self.metric, self.first, self.codes = keys, radius, metric, first, codes
        self._everywhere = torch.full((len(keys),), torch.inf)

    def __len__(self) -> int:
        return len(self.keys)

    def propose(self, query: Tensor) -> Proposed:
        near, _ = nearest_key(query, self.keys, self._everywhere, self.metric, self.codes)
        return self._of(near[:, None])

    def nearest(self, query: Tensor) -> Nearest:
        """As of any source, without proposing: one lookup finds and measures."""
        near, distance = nearest_key(query, self.keys, self._everywhere, self.metric, self.codes)
        if not len(self.keys):
            return Nearest(near, near, distance)
        row = torch.where(near >= 0, near + self.first, -1)
        inside = (near >= 0) & (distance <= self.radius[near.clamp(min=0)])
        return Nearest(torch.where(inside, row, -1), row, distance)

    def _of(self, near: Tensor) -> Proposed:
        """The rows [B, C] of this table, -1 for none."""
        if not len(self.keys):
            shape = (*near.shape, self.keys.shape[1])
            return Proposed(torch.full_like(near, -1), self.keys.new_zeros(shape), torch.zeros(near.shape))
        place = near.clamp(min=0)
        rows = torch.where(near >= 0, near + self.first, -1)
        return Proposed(rows, self.keys[place], self.radius[place])


class InvertedKeys(FlatKeys):
    """Candidates from faiss's inverted lists of eight-bit keys; keys themselves may stay on the disk.

    Args:
        keys: [N, P] float32, in memory or mapped (`torch.from_file`, a safetensors file).
        radius, metric, first: as `FlatKeys`.
        lists: inverted lists; None takes about 4 sqrt(N).
        probed: lists that are looked into for each query.
        candidates: for each query, whose true distance is computed.
        seed: of the keys by which the lists are placed.

    Raises:
        ImportError: no faiss.
    """

    def __init__(
        self, keys: Tensor, radius: Tensor, metric: str, first: int = 0, lists: int | None = None,
        probed: int = 16, candidates: int = 16, seed: int = 0,
    ):  # fmt: skip
        super().__init__(keys, radius, metric, first)
        try:
            import faiss
        except ImportError as error:
            raise ImportError(_FAISS) from error
        count, width = keys.shape
        lists = max(1, min(count, int(4 * count**0.5) if lists is None else lists))
        self.candidates = candidates
        coarse = faiss.IndexFlatL2(width)
        self._index = faiss.IndexIVFScalarQuantizer(
            coarse, width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2
        )
        self._index.nprobe = min(probed, lists)
        self._index.cp.seed = seed
        self._index.cp.niter = 8
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(count, generator=generator)[: _TRAINED * lists].sort().values
        if count:
            self._index.train(self._compared(keys[chosen]))
        for start in range(0, count, 1 << 16):  # so that mapped keys are not all in memory at once
            self._index.add(self._compared(keys[start : start + (1 << 16)]))

    def _compared(self, keys: Tensor):
        """Of unit vectors, the order of Euclidean distances is that of cosines."""
        keys = keys.float()
        if self.metric == "cosine":
            keys = torch.nn.functional.normalize(keys, dim=1)
        return torch.nan_to_num(keys).contiguous().numpy()

    def nearest(self, query: Tensor) -> Nearest:
        return KeySource.nearest(self, query)

    def propose(self, query: Tensor) -> Proposed:
        if not len(self.keys):
            return self._of(torch.full((len(query), 1), -1))
        wanted = min(self.candidates, len(self.keys))
        return self._of(torch.from_numpy(self._index.search(self._compared(query), wanted)[1]))


class Together(KeySource):
    """The candidates of several sources: a large index and the few edits that came after it was made.

    Args:
        sources: of one metric, with rows of one table.
    """

    def __init__(self, *sources: KeySource):
        self.sources, self.metric = sources, sources[0].metric

    def propose(self, query: Tensor) -> Proposed:
        return _joined([source.propose(query) for source in self.sources])


def _joined(found: list[Proposed]) -> Proposed:
    return Proposed(
        torch.cat([each.rows for each in found], 1), torch.cat([each.keys for each in found], 1),
        torch.cat([each.radius for each in found], 1),
    )  # fmt: skip


class ShardedKeys(KeySource):
    """Each process of a group holds some of the rows, proposes its own candidates, and all are gathered.

    Args:
        own: this process's rows; `first` says where they lie in the whole table.
        group: of torch.distributed; None: all processes.

    `nearest` is called by all processes with queries of one shape; those of the first process count, and all
    get the same decision.
    """

    def __init__(self, own: KeySource, group: dist.ProcessGroup | None = None):
        self.own, self.group, self.metric = own, group, own.metric

    def propose(self, query: Tensor) -> Proposed:
        return self._gathered(self.own.propose(query))

    def nearest(self, query: Tensor) -> Nearest:
        query = query.contiguous()
        dist.broadcast(query, dist.get_global_rank(self.group, 0) if self.group else 0, self.group)
        return super().nearest(query)

    def _gathered(self, own: Proposed) -> Proposed:
        parts = []
        for table in (own.rows, own.keys.float(), own.radius):
            everywhere = [torch.empty_like(table) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(everywhere, table.contiguous(), self.group)
            parts.append(torch.cat(everywhere, 1))
        return Proposed(*parts)
