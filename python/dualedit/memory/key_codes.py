"""Codes of the stored keys: made when a lookup asks for them, kept while the table grows, never saved."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from dualedit_kernels import KeyCodes, codes_pay, encode_keys


class TableCodes:
    """Codes of one table of keys, shared by all snapshots of it.

    Appending changes no row that is there, so the codes of a shorter snapshot are the beginning of a longer
    one's. Whoever moves, replaces or converts the table starts a new one.
    """

    def __init__(self):
        self._known: dict[str, KeyCodes] = {}
        self._lock = threading.Lock()  # of threads that ask at once, one encodes and the others wait for it

    def __reduce__(self):
        return TableCodes, ()  # copies and pickles make their own

    def of(self, keys: Tensor, metric: str) -> KeyCodes | None:
        """Codes of keys [N, D], the first N rows of the table; None where a lookup is as well off without."""
        if not codes_pay(keys):
            return None
        with self._lock:
            known = self._known.get(metric)
            if known is not None and (known.count == 0 or known.dtype != keys.dtype):
                known = None  # all keys were removed, and others came
            if known is not None and known.count > len(keys):
                return None  # a snapshot of before; it is looked up in until its sequence ends, seldom again
            if known is None or known.count < len(keys):
                known = self._known[metric] = encode_keys(keys, metric, known)
            return known

    def fork(self) -> TableCodes:
        """The same codes for a table that goes on differently; codes that one of the two adds the other
        does not
        see."""
        result = TableCodes()
        with self._lock:
            result._known = dict(self._known)
        return result

    def keep(self, rows: Tensor) -> TableCodes:
        """Codes of the table that has only rows [n] (int64, ascending) of this one."""
        result = TableCodes()
        with self._lock:
            there = dict(self._known)
        for metric, known in there.items():
            with torch.inference_mode(False):
                result._known[metric] = known.select(rows[rows < known.count])
        return result
