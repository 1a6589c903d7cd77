"""A safetensors file read and rewritten row by row, without torch or numpy and without holding it in memory.

The safetensors library writes whole files only, while taking one edit out has to leave gigabytes of other
tensors as they are; and it reads through torch or numpy, which take longer to import than the rest of the
command. So bytes are read and copied here, by the format's own description
(https://github.com/huggingface/safetensors#format): the length of the header (8 bytes, little-endian), the
header (JSON: name to dtype, shape, first and last byte), then the bytes of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

# dtype to bytes of a value and its letter for `struct`, which lacks bfloat16: read as whole numbers.
_DTYPES = {"F64": (8, "d"), "F32": (4, "f"), "F16": (2, "e"), "BF16": (2, "H"), "I64": (8, "q")}
_SIZES = {name: size for name, (size, _) in _DTYPES.items()} | {"U8": 1, "I32": 4, "BOOL": 1}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_PIECE = 1 << 24  # bytes copied at a time


class TensorFile:
    """An open safetensors file.

    Attributes:
        shapes: name to shape.

    Raises:
        ValueError: the file is cut short or damaged.
    """

    def __init__(self, file: Path):
        self._opened = open(file, "rb")
        try:
            self._read_header(file.stat().st_size)
        except BaseException:
            self._opened.close()
            raise

    def _read_header(self, size: int) -> None:
        length = int.from_bytes(self._opened.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("the header is not whole")
        self._header = json.loads(self._opened.read(length))
        self._metadata = self._header.pop("__metadata__", None)
        self._begin, end = 8 + length, 0
        try:
            self._names = sorted(self._header, key=lambda name: self._header[name]["data_offsets"])
            for name in self._names:
                first, last = self._header[name]["data_offsets"]
                if first != end or last < first:
                    raise ValueError(f"{name} lies at {first} to {last}, what is before it ends at {end}")
                end = last
        except (KeyError, TypeError) as error:
            raise ValueError(f"the header says {error}") from error
        if self._begin + end != size:
            raise ValueError(f"the file has {size} bytes, its header speaks of {self._begin + end}")
        self.shapes: dict[str, list[int]] = {name: entry["shape"] for name, entry in self._header.items()}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def places(self) -> dict[str, tuple[str, list[int], int]]:
        """Each tensor's dtype, shape, and first byte in the file."""
        return {
            name: (entry["dtype"], entry["shape"], self._begin + entry["data_offsets"][0])
            for name, entry in self._header.items()
        }

    def sizes(self) -> dict[str, int]:
        """Each tensor's bytes."""
        places = ((name, entry["data_offsets"]) for name, entry in self._header.items())
        return {name: last - first for name, (first, last) in places}

    def data(self, name: str) -> bytes:
        """A tensor's bytes. Raises KeyError for an unknown name."""
        first, last = self._header[name]["data_offsets"]
        self._opened.seek(self._begin + first)
        return self._opened.read(last - first)

    def numbers(self, name: str) -> list:
        """A tensor's values in a flat list. Raises KeyError for an unknown name or dtype."""
        dtype, data = self._header[name]["dtype"], self.data(name)
        size, letter = _DTYPES[dtype]
        values = list(struct.unpack(f"<{len(data) // size}{letter}", data))
        if dtype == "BF16":  # the upper half of a float32
            values = [struct.unpack("<f", struct.pack("<I", value << 16))[0] for value in values]
        return values

    def write_without(
        self, file: Path, cuts: Mapping[str, tuple[int, int]], contents: Mapping[str, bytes]
    ) -> None:
        """Write the file anew, leaving out some rows.

        Args:
            cuts: name to the rows that are left out, from the first to before the last.
            contents: name of a one-dimensional tensor of bytes to what takes its place.
        """
        header: dict[str, object] = {} if self._metadata is None else {"__metadata__": self._metadata}
        pieces: dict[str, list[tuple[int, int]]] = {}
        place = 0
        # In the old order, wide types before narrow ones, so that each tensor stays aligned.
        for name in self._names:
            first, last = self._header[name]["data_offsets"]
            shape, kept = list(self.shapes[name]), [(first, last)]
            if name in contents:
                shape, kept = [len(contents[name])], []
            elif name in cuts:
                start, end = cuts[name]
                row = (last - first) // shape[0]
                shape[0] -= end - start
                kept = [(first, first + start * row), (first + end * row, last)]
            size = sum(end - start for start, end in kept) + len(contents.get(name, b""))
            header[name] = {**self._header[name], "shape": shape, "data_offsets": [place, place + size]}
            pieces[name] = kept
            place += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for name in self._names:
                target.write(contents.get(name, b""))
                for start, end in pieces[name]:
                    self._copy(start, end, target)

    def _copy(self, start: int, end: int, target: BinaryIO) -> None:
        self._opened.seek(self._begin + start)
        while start < end:
            piece = self._opened.read(min(_PIECE, end - start))
            if not piece:
                raise ValueError("the file ends before its last tensor")
            target.write(piece)
            start += len(piece)


def write_tensors(
    file: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    pieces: Callable[[str], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file without holding a tensor in memory.

    Args:
        tensors: name to dtype, as the format calls it, and shape. They are written widest type first, as the
            format wants them aligned.
        pieces: name to the tensor's bytes, one piece after the other.

    Raises:
        ValueError: a tensor gets another number of bytes than its shape says. OSError: the disk refused.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    names = sorted(tensors, key=lambda name: (-_SIZES[tensors[name][0]], name))
    place, sizes = 0, {}
    for name in names:
        dtype, shape = tensors[name]
        sizes[name] = _SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + sizes[name]]}
        place += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            written = sum(target.write(piece) for piece in pieces(name))
            if written != sizes[name]:
                raise ValueError(f"{name} has {written} bytes, its shape asks for {sizes[name]}")
