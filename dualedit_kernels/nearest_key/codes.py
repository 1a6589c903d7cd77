"""Codes of keys: 8 bits a value beside the keys, from which most keys can be ruled out without reading them.

With c the mean of the keys and S at most 16 dimensions that are far larger than the others (massive
activations, kept apart in fp32), each key is written as

    k_d = c_d + scale_p * code_d + residue_d,    code_d in -127..127,    ||residue||_2 <= error

with a scale for each of up to 16 parts p of the dimensions: the largest value sets a scale, and of fewer
dimensions it is smaller. For a query q coded in the same way (error f) the distance of the decoded forms
is off by at most error + f, by the triangle inequality. And scales are those of least squares, so that a
residue is at a right angle to the form q' or k' that it is the residue of; then the squared distance is
below that of the decoded forms by 2 (|k'| f + |q| error) at the most, which is less where the two are far
apart. A lookup reads the codes, keeps the keys whose lower bound is not above the smallest distance known,
and computes their exact distances: the result is that of the lookup without codes, bit for bit.

Source: filtering by bounds of quantised vectors is the VA-file (Weber, Schek and Blott, VLDB 1998).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import checks

METRICS = ("l2", "cosine")
BLOCK = 48  # keys whose codes lie side by side, as in csrc/cpu/nearest_key.h
MOST_DIMENSIONS = 65536
MOST_APART = 16
_FAR_LARGER = 8.0  # a dimension is kept apart from this multiple of the median dimension on
_CHUNK = 1 << 18  # values that are encoded at once, as fp64 copies


@dataclass(frozen=True, eq=False)
class KeyCodes:
    """Codes of keys [N, D], made by `encode_keys`. Room for more keys may follow the N coded ones.

    Attributes:
        codes: [N / 48, D / 4, 48, 4] uint8 (both rounded up), code + 128 of 4 dimensions of 48 keys together.
        values: [N / 48, parts + 5 + P, 48] fp32 of each key: the scale of each part; the length of
            scale * code in all dimensions, and in those of the first part; error, inf for a key about which
            the codes say nothing (not finite, or too large or small for fp32 squares); the length of k - c in
            the second half of the parts, and the error there (0 with fewer than 4 parts); the key at the
            dimensions kept apart.
        centre: [D rounded up to 16] fp32, zero where a dimension is kept apart.
        apart: [P] int64, those dimensions.
        metric: of the lookup; codes for "cosine" are those of keys scaled to length 1.
        dtype: of the keys.
        count, dim: N and D.
        chosen: how many keys centre and apart were chosen from.
    """

    codes: Tensor
    values: Tensor
    centre: Tensor
    apart: Tensor
    metric: str
    dtype: torch.dtype
    count: int
    dim: int
    chosen: int
    # Keys that are written in the tensors, shared by all codes that share them: [count].
    written: list[int] = field(default_factory=lambda: [0])

    def tensors(self) -> list[Tensor]:
        """The tensors in the order in which the operator takes them."""
        return [self.codes, self.values, self.centre, self.apart]

    def nbytes(self) -> int:
        """Bytes of all tensors, room for more keys included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def select(self, rows: Tensor) -> KeyCodes:
        """Codes of the keys ``rows`` [n] (int64 indices), without encoding them again."""
        empty = self._emptied(0)
        block, place = rows // BLOCK, rows % BLOCK
        return empty._written(self.codes[block, :, place], self.values[block, :, place], len(rows))

    def _emptied(self, room: int) -> KeyCodes:
        """Codes of no keys, alike in all else, with room for some."""
        blocks = -(-room // BLOCK)
        codes = torch.full((blocks, *self.codes.shape[1:]), 128, dtype=torch.uint8, device=self.codes.device)
        values = torch.zeros((blocks, *self.values.shape[1:]), device=self.codes.device)
        return replace(self, codes=codes, values=values, count=0, written=[0])

    def _written(self, quads: Tensor, values: Tensor, room: int = 0) -> KeyCodes:
        """These codes with more keys behind them, in place if there is room.

        Args:
            quads: [n, D / 4, 4], what ``codes`` holds of each.
            values: [n, parts + 5 + P].
            room: for so many keys in all, where new room is made.
        """
        count = self.count + len(quads)
        known = self
        if count > self.codes.shape[0] * BLOCK or self.written[0] != self.count:
            # Rows behind the known ones are free, unless other codes that grew from these have taken them.
            known = self._emptied(max(room, count))
            used = -(-self.count // BLOCK)
            known.codes[:used], known.values[:used] = self.codes[:used], self.values[:used]
        number = torch.arange(self.count, count, device=quads.device)
        block, place = number // BLOCK, number % BLOCK
        known.codes[block, :, place], known.values[block, :, place] = quads, values
        known.written[0] = count
        return replace(known, count=count)


def encode_keys(keys: Tensor, metric: str = "l2", known: KeyCodes | None = None) -> KeyCodes:
    """Codes with which `nearest_key` finds the nearest of these keys from a quarter of their bytes (fp32).

    Args:
        keys: [N, D], fp32, bf16, fp16 or fp64; D at most 65536.
        metric: the metric of the lookups.
        known: codes of the first rows of ``keys`` (unchanged since). Only the others are encoded, unless the
            table is twice the one that centre and dimensions were chosen from: then all are, so that a key is
            encoded about twice, however many steps there are. ``known`` stays valid.

    Returns:
        codes of all rows; about D + 84 bytes a key (D + 24 for 128 dimensions or fewer), and up to 64 more
            where activations are massive.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
    """
    checks.tensor("keys", keys, ("N", "D"), checks.FLOATS, keys)
    checks.choice("metric", metric, METRICS)
    if not 1 <= keys.shape[1] <= MOST_DIMENSIONS:
        raise ValueError(f"keys has D={keys.shape[1]} dimensions: codes hold 1 to {MOST_DIMENSIONS}.")
    keys = keys.detach()
    with torch.inference_mode(False), torch.no_grad():
        if known is not None:
            first = keys[: known.count] if isinstance(known, KeyCodes) else keys
            check_codes("known", known, first, metric)
        if known is None or len(keys) > 2 * known.chosen:
            known, room = _none(keys, metric), len(keys)
        else:
            room = len(keys) + len(keys) // 8 + BLOCK  # not twice as many: all room that is made is filled
        for chunk in _chunks(keys[known.count :]):
            known = known._written(*_encoded(known, chunk), room)
        return known


def check_codes(name: str, codes: object, keys: Tensor, metric: str) -> None:
    """Raise unless ``codes`` are a `KeyCodes` for keys like these. Their values are not compared."""
    if not isinstance(codes, KeyCodes):
        raise TypeError(f"{name} must be KeyCodes, got {type(codes).__name__}: make them with encode_keys.")
    made_for = (codes.count, codes.dim, codes.dtype, codes.metric, codes.codes.device)
    given = (*keys.shape, keys.dtype, metric, keys.device)
    if made_for == given:  # at once: a lookup takes microseconds
        return
    names = ("keys", "dimensions", "dtype", "metric", "device")
    for what, has, wanted in zip(names, made_for, given, strict=True):
        if has != wanted:
            raise ValueError(
                f"{name} were made for {what} {has}, this lookup has {what} {wanted}: encode the keys again."
            )


def part_of(dim: int) -> int:
    """Dimensions of each part but the last, as in csrc/cpu/nearest_key.h."""
    return 128 if dim <= 2048 else -(-dim // 1024) * 64


def _none(keys: Tensor, metric: str) -> KeyCodes:
    """Codes of none of the keys, with the centre and the dimensions apart of all of them."""
    dim, device = keys.shape[1], keys.device
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    largest, fine = torch.zeros_like(total), 0
    for chunk in _chunks(keys):
        values, usable, _ = _values(chunk, metric)
        total += values.sum(0)
        largest = torch.maximum(largest, values.abs().amax(0))
        fine += int(usable.sum())
    far = (largest > _FAR_LARGER * largest.median()).nonzero()[:, 0]
    apart = far[largest[far].argsort(descending=True)[:MOST_APART]].sort().values
    centre = torch.zeros(-(-dim // 16) * 16, device=device)
    centre[:dim] = total / max(fine, 1)
    centre[apart] = 0.0
    codes = torch.empty((0, -(-dim // 4), BLOCK, 4), dtype=torch.uint8, device=device)
    values = torch.empty((0, -(-dim // part_of(dim)) + 5 + len(apart), BLOCK), device=device)
    return KeyCodes(codes, values, centre, apart, metric, keys.dtype, 0, dim, len(keys))


def _chunks(keys: Tensor) -> list[Tensor]:
    return list(keys.split(max(1, _CHUNK // keys.shape[1]))) if len(keys) else []


def _values(chunk: Tensor, metric: str) -> tuple[Tensor, Tensor, float]:
    """The vectors [n, D] in fp64 that a lookup compares, which of them [n] codes can hold, and their error.

    The kernel scales keys to length 1 in fp32: a sum of D squares, a root, a quotient and a product.
    """
    values, rounding = chunk.double(), 0.0
    squares = values.square().sum(1)
    if metric == "l2":
        usable = squares <= 1e37  # false for NaN
    else:
        usable = (squares <= 1e37) & (squares >= 1e-25)
        values = values / squares.sqrt()[:, None]
        rounding = (chunk.shape[1] / 8 + 32) * 6.1e-8
    return torch.where(usable[:, None], values, 0.0), usable, rounding


def _encoded(codes: KeyCodes, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """The quads [n, D / 4, 4] and values [n, parts + 5 + P] of the keys chunk [n, D], computed in fp64."""
    keys, usable, rounding = _values(chunk, codes.metric)
    apart = keys[:, codes.apart]
    keys = keys - codes.centre[: codes.dim]
    keys[:, codes.apart] = 0.0
    quads = torch.full((len(chunk), codes.codes.shape[1] * 4), 128, dtype=torch.uint8, device=chunk.device)
    scales, lengths, left = [], [], []
    for part, code in zip(keys.split(part_of(codes.dim), 1), quads.split(part_of(codes.dim), 1), strict=True):
        scale = (part.abs().amax(1) / 127).float()
        # Smaller scales would lose precision in products: all of such a part is residue.
        steps = torch.where(scale >= 1e-15, scale, torch.inf).double()[:, None]
        own = (part / steps).round_().clamp_(-127, 127)
        fitted = ((part * own).sum(1) / own.square().sum(1)).float()  # NaN where all codes are zero
        scales.append(torch.where(fitted >= 1e-15, fitted, 0.0))
        decoded = own * scales[-1].double()[:, None]
        lengths.append(torch.linalg.vector_norm(decoded, dim=1))
        left.append((part - decoded).square().sum(1))
        code[:, : own.shape[1]] = own + 128
    cut = len(left) if len(left) < 4 else len(left) // 2  # as in csrc/cpu/nearest_key.h
    tail = torch.linalg.vector_norm(keys[:, cut * part_of(codes.dim) :], dim=1)
    # 1e-15: fp64 itself rounds. 1e-6: the conversion to fp32 does.
    doubt = torch.linalg.vector_norm(keys, dim=1) * 1e-15 + rounding
    left = torch.stack(left, 1)
    errors = [(parts.sum(1).sqrt() + doubt) * (1 + 1e-6) for parts in (left, left[:, cut:])]
    error, tail_error = (torch.where(usable, error, torch.inf) for error in errors)
    length = torch.linalg.vector_norm(torch.stack(lengths, 1), dim=1)
    values = torch.stack([*scales, length, lengths[0], error, tail, tail_error], 1)
    return quads.view(len(chunk), -1, 4), torch.cat([values, apart], 1).float()
