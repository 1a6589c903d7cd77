"""The figures of a training run, one line of JSON each, and for TensorBoard where that is wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """Appends to metrics.jsonl (and to the folder tensorboard).

    Args:
        folder: of the run.
        step: steps done before; lines behind it, of a run that was stopped, are taken out.
        tensorboard: write event files too.

    Raises:
        ImportError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        self.writer = _tensorboard(folder / "tensorboard", step) if tensorboard else None
        kept = [line for line in read_metrics(self.file) if line["step"] <= step] if step else []
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a line."""
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps({"step": step, **figures}) + "\n")
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard's files."""
        if self.writer is not None:
            self.writer.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The whole lines of a metrics file; a last one that was cut short is left out."""
    lines = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard=true needs the package tensorboard: pip install tensorboard (or set it to false; "
            "metrics.jsonl has the same figures)."
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
