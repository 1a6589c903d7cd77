"""Codes of keys: 8 bits a value beside the keys, from which most keys can be ruled out without reading them.

With c the mean of the keys and S at most 16 dimensions that are far larger than the others (massive
activations, kept apart in fp32), each key is written as

    k_d = c_d + scale_p * code_d + residue_d,    code_d in -127..127,    ||residue||_2 <= error

with a scale for each of 4 or 8 parts p of the dimensions: the largest value sets a scale, and of fewer
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
BLOCK = 16  # keys whose codes lie side by side, as in csrc/cpu/nearest_key_coarse.h
MOST_DIMENSIONS = 65536
MOST_APART = 16
_FEWEST_QUADS = 128  # of dimensions; shorter codes are not cut
_FAR_LARGER = 8.0  # a dimension is kept apart from this multiple of the median dimension on
_CHUNK = 1 << 16  # values that are encoded at once: their fp64 copies stay in the second-level cache


@dataclass(frozen=True, eq=False)
class KeyCodes:
    """Codes of keys [N, D], made by `encode_keys`. Room for more keys may follow the N coded ones.

    Attributes:
        codes: [N / 16, D / 4, 16, 4] uint8 (both rounded up), code + 128 of 4 dimensions of 16 keys together.
        scale: [N / 16, parts, 16] fp32 of each part of each key.
        square, error: [N / 16 * 16] fp32 of each key; square is the sum of (scale * code)^2. error is inf for
            a key about which the codes say nothing (not finite, or too large or small for fp32 squares).
        centre: [D] fp32, zero where a dimension is kept apart.
        rows: [N / 16, P, 16] fp32, the keys at the dimensions kept apart.
        tails: [N / 16, 4, 16] fp32, lengths of k - c behind a quarter and behind half of the dimensions, and
            errors there: an exact distance can be given up at these places. None below 509 dimensions.
        apart: [P] int64, those dimensions.
        metric: of the lookup; codes for "cosine" are those of keys scaled to length 1.
        dtype: of the keys.
        count, dim: N and D.
        chosen: how many keys centre and apart were chosen from.
    """

    codes: Tensor
    scale: Tensor
    square: Tensor
    error: Tensor
    centre: Tensor
    rows: Tensor
    apart: Tensor
    tails: Tensor
    metric: str
    dtype: torch.dtype
    count: int
    dim: int
    chosen: int
    # Keys that are written in the tensors, shared by all codes that share them: [count].
    written: list[int] = field(default_factory=lambda: [0])

    def tensors(self) -> list[Tensor]:
        """The tensors in the order in which the operator takes them."""
        values = [self.codes, self.scale, self.square, self.error, self.centre, self.rows]
        return [*values, self.apart, self.tails]

    def nbytes(self) -> int:
        """Bytes of all tensors, room for more keys included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def select(self, rows: Tensor) -> KeyCodes:
        """Codes of the keys ``rows`` [n] (int64 indices), without encoding them again."""
        count, blocks = len(rows), -(-len(rows) // BLOCK)
        room = _room(self.codes, count, self.codes.shape[1] * 4, self.apart)
        for new, old in zip(room[2:4], self.tensors()[2:4], strict=True):
            new[:count] = old[rows]
        block, place = rows.div(BLOCK, rounding_mode="floor"), rows % BLOCK
        blocked = (self.codes, self.scale, self.rows, self.tails)
        for new, old in zip((*room[:2], *room[4:]), blocked, strict=True):
            flat = old.new_empty(blocks * BLOCK, old.shape[1], *old.shape[3:])
            flat[:count] = old[block, :, place]
            flat[count:] = 128 if new is room[0] else 0
            new.copy_(flat.view(blocks, BLOCK, *flat.shape[1:]).transpose(1, 2))
        return replace(
            self,
            codes=room[0],
            scale=room[1],
            square=room[2],
            error=room[3],
            rows=room[4],
            tails=room[5],
            count=count,
            written=[count],
        )


def encode_keys(keys: Tensor, metric: str = "l2", known: KeyCodes | None = None) -> KeyCodes:
    """Codes with which `nearest_key` finds the nearest of these keys from a quarter of their bytes (fp32).

    Args:
        keys: [N, D], fp32, bf16, fp16 or fp64; D at most 65536.
        metric: the metric of the lookups.
        known: codes of the first rows of ``keys`` (unchanged since). Only the others are encoded, unless the
            table is twice the one that centre and dimensions were chosen from: then all are, so that a key is
            encoded about twice, however many steps there are. ``known`` stays valid.

    Returns:
        codes of all rows; about D + 56 bytes a key (D + 40 below 2045 dimensions, D + 12 below 509), and
            up to 64 more where activations are massive.

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
            if len(keys) <= 2 * known.chosen:
                return _extended(known, keys)
        return _encoded(keys, metric)


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


def _encoded(keys: Tensor, metric: str) -> KeyCodes:
    centre, apart = _centre(keys, metric)
    empty = _room(keys, 0, keys.shape[1], apart)
    tensors = (*empty[:4], centre, empty[4], apart, empty[5])
    codes = KeyCodes(*tensors, metric, keys.dtype, 0, keys.shape[1], len(keys))
    return _extended(codes, keys, exactly=True)


def _extended(known: KeyCodes, keys: Tensor, exactly: bool = False) -> KeyCodes:
    """Codes of ``keys``, whose first rows ``known`` holds; written behind them where there is room."""
    count, blocks = len(keys), -(-len(keys) // BLOCK)
    # Rows behind the known ones are free unless other codes that grew from the same ones have taken them.
    if blocks > known.codes.shape[0] or known.written[0] != known.count:
        room = _room(keys, count if exactly else 2 * count, known.dim, known.apart)
        used = -(-known.count // BLOCK)
        for new, old in zip(room, [*known.tensors()[:4], known.rows, known.tails], strict=True):
            size = used * (BLOCK if new.ndim == 1 else 1)
            new[:size] = old[:size]
        known = replace(
            known,
            codes=room[0],
            scale=room[1],
            square=room[2],
            error=room[3],
            rows=room[4],
            tails=room[5],
            written=[0],
        )
    known.written[0] = count
    step = max(BLOCK, _CHUNK // known.dim // BLOCK * BLOCK)
    first = known.count
    while first < count:
        last = min(count, first // step * step + step)  # chunks end where blocks end
        _write(known, keys[first:last], first)
        first = last
    return replace(known, count=count)


def _room(like: Tensor, count: int, dim: int, apart: Tensor) -> list[Tensor]:
    """codes, scale, square, error, rows and tails of keys about which nothing is known, where ``like`` is."""
    device, quads, blocks = like.device, -(-dim // 4), -(-count // BLOCK)
    return [
        torch.full((blocks, quads, BLOCK, 4), 128, dtype=torch.uint8, device=device),
        torch.zeros(blocks, len(_parts(dim)), BLOCK, device=device),
        torch.zeros(blocks * BLOCK, device=device),
        torch.full((blocks * BLOCK,), torch.inf, device=device),
        torch.zeros(blocks, len(apart), BLOCK, device=device),
        torch.zeros(blocks, 4 if quads >= _FEWEST_QUADS else 0, BLOCK, device=device),
    ]


def _parts(dim: int) -> list[int]:
    """Dimensions of each part, as in csrc/cpu/nearest_key_coarse.h."""
    quads = -(-dim // 4)
    parts = 1 if quads < _FEWEST_QUADS else 4 if quads < 4 * _FEWEST_QUADS else 8
    size = quads // (4 * parts) * 16
    return [size] * (parts - 1) + [dim - size * (parts - 1)]


def _chunks(keys: Tensor) -> list[Tensor]:
    return list(keys.split(max(1, _CHUNK // keys.shape[1]))) if len(keys) else []


def _centre(keys: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Mean [D] of the keys in fp32, zero at the dimensions to keep apart, and those dimensions [P]."""
    total = torch.zeros(keys.shape[1], dtype=torch.float64, device=keys.device)
    largest, fine = torch.zeros_like(total), 0
    for chunk in _chunks(keys):
        values, usable, _ = _values(chunk, metric)
        total += values.sum(0)
        largest = torch.maximum(largest, values.abs().amax(0))
        fine += int(usable.sum())
    centre = (total / max(fine, 1)).float()
    far = (largest > _FAR_LARGER * largest.median()).nonzero()[:, 0]
    apart = far[largest[far].argsort(descending=True)[:MOST_APART]].sort().values
    centre[apart] = 0.0
    return centre, apart


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
        rounding = (chunk.shape[1] / 16 + 32) * 6.1e-8
    return torch.where(usable[:, None], values, 0.0), usable, rounding


def _write(codes: KeyCodes, chunk: Tensor, first: int) -> None:
    """Encode the keys first, first+1, .. of which ``chunk`` [n, D] consists, all in fp64."""
    values, usable, rounding = _values(chunk, codes.metric)
    size = len(chunk)
    at = slice(first, first + size)
    rows = values[:, codes.apart].float()
    values = values - codes.centre
    values[:, codes.apart] = 0.0
    code, held, square, left = [], [], 0.0, []
    for part in values.split(_parts(codes.dim), 1):
        scale = (part.abs().amax(1) / 127).float()
        # Smaller scales would lose precision in products: all of such a part is residue.
        steps = torch.where(scale >= 1e-15, scale, torch.inf).double()[:, None]
        own = (part / steps).round_().clamp_(-127, 127)
        fitted = ((part * own).sum(1) / own.square().sum(1)).float()  # NaN where all codes are zero
        held.append(torch.where(fitted >= 1e-15, fitted, 0.0))
        decoded = own * held[-1].double()[:, None]
        square = square + decoded.square().sum(1)
        left.append((part - decoded).square().sum(1))
        code.append(own)
    left = torch.stack(left, 1)
    # 1e-15: fp64 itself rounds. 1e-6: the conversion to fp32 does.
    doubt = torch.linalg.vector_norm(values, dim=1) * 1e-15 + rounding
    error = (left.sum(1).sqrt() + doubt) * (1 + 1e-6)
    number = torch.arange(first, first + size, device=chunk.device)
    block, place = number.div(BLOCK, rounding_mode="floor"), number % BLOCK
    padded = torch.full((size, codes.codes.shape[1] * 4), 128, dtype=torch.uint8, device=chunk.device)
    padded[:, : codes.dim] = (torch.cat(code, 1) + 128).to(torch.uint8)
    quads = padded.view(size, -1, 4)
    if first % BLOCK == 0 and size % BLOCK == 0:  # much faster than by index
        together = quads.view(-1, BLOCK, *quads.shape[1:]).transpose(1, 2)
        codes.codes[first // BLOCK : (first + size) // BLOCK] = together
    else:
        codes.codes[block, :, place] = quads
    codes.rows[block, :, place] = rows
    codes.scale[block, :, place] = torch.stack(held, 1)
    codes.square[at] = square.float()
    codes.error[at] = torch.where(usable, error, torch.inf).float()
    parts = left.shape[1]
    for i, behind in enumerate([parts // 4, parts // 2] if parts > 1 else []):
        rest = values[:, sum(_parts(codes.dim)[:behind]) :]
        codes.tails[block, i, place] = torch.linalg.vector_norm(rest, dim=1).float()
        tail = (left[:, behind:].sum(1).sqrt() + doubt) * (1 + 1e-6)
        codes.tails[block, 2 + i, place] = torch.where(usable, tail, torch.inf).float()
