"""`dualedit eval`: figures of the editors on the embedded benchmark, one edit at a time or many at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .demo import figure, write_whole
from .running import shows_progress, use_few_threads

if TYPE_CHECKING:
    from ..evaluation import Row

BENCHMARKS = ("embedded",)
PROTOCOLS = ("single", "batch")
METHODS = ("dualedit", "balancedit")


@dataclass(frozen=True)
class Options:
    """Options of an evaluation.

    Attributes:
        methods: editors to measure.
        protocol: "single" stores one edit at a time, "batch" stores all at once.
        edits: numbers of edits; each gives a row a method.
        asked: most facts whose questions are asked in a batch.
        json: file for the rows, or None.
        seed: which test facts, counterfactual answers and pictures.
        world_seed: another number, other brands: ones that the embedded model has never seen.
        weights: folder of a retrained model and its editors, or None for those of the package.
    """

    methods: tuple[str, ...]
    protocol: str
    edits: tuple[int, ...]
    asked: int
    json: Path | None
    seed: int
    world_seed: int
    weights: Path | None

    def check(self, benchmark: str) -> None:
        """Refuse what cannot be done. Raises ValueError."""
        if benchmark not in BENCHMARKS:
            raise ValueError(f"--benchmark {benchmark}: choose one of {', '.join(BENCHMARKS)}.")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"--protocol {self.protocol}: choose one of {', '.join(PROTOCOLS)}.")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"--methods {','.join(self.methods)}: choose from {', '.join(METHODS)}.")
        if not self.edits or min(self.edits) < 1 or self.asked < 1:
            raise ValueError("--edits and --asked: pass numbers of at least 1.")
        if self.json is not None and self.json.is_dir():
            raise ValueError(f"--json {self.json} is a folder: pass a file.")


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from "1,10,100". Raises ValueError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text}: pass whole numbers, such as 1,10,100.") from None


def run(options: Options) -> None:
    """Measure, print a line as each row is done, write the JSON."""
    from rich.console import Console

    from ..demo.embedded import load_editor
    from ..demo.samples import edit_samples
    from ..demo.world import ATTRIBUTES, World
    from ..evaluation import METRICS

    world = World(options.world_seed)
    facts = len(world.entities("test")) * len(ATTRIBUTES)
    if max(options.edits) > facts:
        raise ValueError(f"--edits {max(options.edits)}: this world has {facts} test facts.")
    console = Console(highlight=False)
    use_few_threads()
    vlm, editors = (
        (None, None) if options.weights is None else (options.weights / "vlm", options.weights / "editors")
    )
    console.print("method, edits, facts asked: " + " ".join(METRICS) + "   (% right ± standard error)")
    rows: list[Row] = []
    for count in options.edits:
        samples = edit_samples(world, "test", count, options.seed)
        for method in options.methods:
            row = _row(load_editor(method, vlm=vlm, weights=editors), method, samples, options)
            rows.append(row)
            cells = "  ".join(figure(row.metrics[name], row.stderr[name]) for name in METRICS)
            console.print(f"{method}, {row.edits}, {row.n}: {cells}", soft_wrap=True)
            if options.json is not None:
                write_whole(options.json, json.dumps({"rows": [r.to_dict() for r in rows]}, indent=1) + "\n")


def _row(editor, method: str, samples: list, options: Options) -> Row:
    from ..evaluation import evaluate_batch, evaluate_single

    if options.protocol == "single":
        return evaluate_single(editor, samples, method, progress=shows_progress()).row
    return evaluate_batch(editor, samples, method, asked=options.asked, progress=shows_progress()).row
