"""`dualedit calibrate`: set the gate's threshold on facts of the user's own, hard negatives included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .loading import Start, start_editor
from .saved_folder import NAMES
from .terminal import shows_progress, use_few_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..data import EditSample
    from ..training.calibration import Sweep

EMBEDDED_EDITS = 100
PLOT = "calibration.png"


@dataclass(frozen=True)
class Options:
    """Options of a calibration.

    Attributes:
        model: folder of a Hugging Face model, or None for the embedded one.
        start: the editor: its method, trained adapters, linear layer.
        data: file of facts, as `datasets.load_samples` reads it; None with the embedded model.
        format, images, skip_bad: how it is read; `images` is the folder that image paths start from.
        edits: most facts to calibrate on, or None for all (100 of the embedded world's training facts).
        together: how many facts are stored at a time.
        seed: which facts are drawn.
        out: folder for the adapter, its curve and a plot.
    """

    model: Path | None
    start: Start
    data: Path | None
    format: str
    images: Path | None
    skip_bad: bool
    edits: int | None
    together: int
    seed: int
    out: Path

    def check(self) -> None:
        """Refuse what cannot be done, before a model is loaded. Raises ValueError."""
        self.start.check()
        if self.model is not None and self.data is None:
            raise ValueError("--data is missing: pass facts to calibrate --model on (not those you test on).")
        for option, value in (("--edits", self.edits), ("--together", self.together)):
            if value is not None and value < 1:
                raise ValueError(f"{option} {value}: pass a number of at least 1.")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out} exists: pass another folder, nothing is written over.")


def run(options: Options) -> None:
    """Measure, set the threshold, save adapter, curve and plot, print what was found."""
    from ..storage import save_edits
    from ..training.calibration import (
        measure_curve,
        plot_calibration,
        save_calibration,
        sweep_reach,
        sweep_threshold,
        with_alpha,
        with_threshold,
    )
    from ..tuners.adapter import active_adapter

    if options.model is None:
        use_few_threads()
    samples = _samples(options)
    editor = start_editor(options.model, options.start)
    curve = measure_curve(editor, samples, options.together, shows_progress())
    config = active_adapter(editor.model).config
    if NAMES[config.peft_type.value] == "BalancEdit":
        sweep, limit = sweep_reach(curve)
        with_alpha(editor, sweep.chosen, limit)
        if limit is not None:
            print(f"max_radius = {limit:.4g}: no edit reaches farther")
    else:
        sweep = sweep_threshold(curve)
        with_threshold(editor, sweep.chosen)
    save_edits(editor.model, options.out)
    save_calibration(options.out, sweep, curve)
    _tell(sweep, len(samples), options)
    try:
        plot = plot_calibration(sweep, options.out / PLOT)
    except ImportError as error:
        print(f"(no plot: {error})")
    else:
        print(f"curve: {plot}")


def _tell(sweep: Sweep, count: int, options: Options) -> None:
    name = {"threshold": "tau"}.get(sweep.setting, sweep.setting)
    stored = min(count, options.together)
    print(f"{name} = {sweep.chosen:.4g}, the best for {count} facts, {stored} of them stored at a time:")
    for metric, value in sweep.chosen_figures.items():
        if value is not None:
            print(f"  {metric:<14} {value:.1f}")
    print(f"adapter: {options.out}")


def _samples(options: Options) -> Sequence[EditSample]:
    if options.data is None:
        from ..toy.world import World
        from .recipes import recipe

        draw_samples = recipe("train_editors").calibration_samples
        return draw_samples(World(0), options.edits or EMBEDDED_EDITS, options.seed)
    from ..datasets import load_samples
    from .evaluate import draw

    loaded = load_samples(options.data, options.format, options.images, options.skip_bad)
    if loaded.skipped:
        print(f"{len(loaded.skipped)} of {len(loaded) + len(loaded.skipped)} rows are left out.")
    return draw(loaded, min(options.edits or len(loaded), len(loaded)), options.seed)
