"""What the running calls of this thread know, innermost last: a context variable, so threads do not meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

FRAMES: ContextVar[tuple[Frame, ...]] = ContextVar("dualedit_frames", default=())


class States(dict[str, Tensor]):
    """What the wrapped layers see of an input: layer name to tensor [B, L, D].

    Attributes:
        mean_image: [B, D] float32, the mean image token as it enters the decoder, where an adapter's routing
            key reads it.
    """

    mean_image: Tensor | None = None


@dataclass
class Record:
    """Run the frozen model and keep what the wrapped layers see."""

    states: States = field(default_factory=States)


@dataclass
class Bound:
    """Run the model with given edits instead of stored ones (training): no gate, row i has edit `route[i]`.

    Attributes:
        route: [B] int64, -1 for none.
        edits: layer name to what that layer's adapter needs of the edits, with gradients.
    """

    route: Tensor
    edits: Mapping[str, Any]


@dataclass
class Frame:
    """One level of what the running call of a runtime knows.

    `kind`: "generate", "call", "pass", "mode", "masks", "disabled" (names of adapters) or "replayed" (a
    pass that backward repeats).
    """

    runtime: Any
    kind: str
    content: Any


def find(runtime: Any, *kinds: str) -> Frame | None:
    """The innermost frame of these kinds."""
    for frame in reversed(FRAMES.get()):
        if frame.runtime is runtime and frame.kind in kinds:
            return frame
    return None


def push(frame: Frame) -> None:
    """Enter a frame."""
    FRAMES.set((*FRAMES.get(), frame))


def pop(runtime: Any, kind: str) -> None:
    """Leave the innermost frame of a kind, and what was entered inside it."""
    frames = FRAMES.get()
    for i in range(len(frames) - 1, -1, -1):
        if frames[i].runtime is runtime and frames[i].kind == kind:
            FRAMES.set(frames[:i])
            return


def drop(runtime: Any, *kinds: str) -> None:
    """Forget calls that never ended: PyTorch skips the hooks of a call that Ctrl-C interrupts."""
    frames = FRAMES.get()
    kept = tuple(frame for frame in frames if frame.runtime is not runtime or frame.kind not in kinds)
    if len(kept) < len(frames):
        FRAMES.set(kept)


@contextmanager
def framed(runtime: Any, kind: str, content: Any) -> Iterator[Any]:
    """Let the calls inside the block know `content`."""
    before = FRAMES.get()
    push(Frame(runtime, kind, content))
    try:
        yield content
    finally:
        FRAMES.set(before)
