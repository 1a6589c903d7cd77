"""Train DualEdit's adapters on the embedded model and set both editors' thresholds, on training facts only.

    python -m dualedit.demo.train_editors --out DIR

writes DIR/dualedit (the adapters, calibrated tau included) and DIR/editors.json (settings, seconds, figures on
training facts that the adapters were not trained on).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dualedit.editor import Editor
from dualedit.evaluation import ask_before
from dualedit.model import inject_balancedit, inject_dualedit
from dualedit.prompting import Prompter
from dualedit.storage import save_edits
from dualedit.training import TrainSettings, calibrate_alpha, calibrate_threshold, measure_curve, train_adapters
from dualedit.training.calibration import with_threshold

from .samples import edit_samples
from .vlm import load_embedded
from .world import World

# Measured on training facts of the shipped model: where adapters and keys work best (see editors.json).
TEXT_LAYER, VIS_LAYER = 3, 3
BALANCEDIT_LAYER = "layers.5.mlp.up_proj"
SETTINGS = TrainSettings(steps=1500, batch_size=12, learning_rate=3e-3, warmup=50)
CALIBRATION_FACTS = 120


def balancedit_config(layer: str = BALANCEDIT_LAYER, alpha: float = 0.2) -> dict:
    """Arguments of `inject_balancedit` for the embedded model."""
    return {
        "layer": layer, "alpha": alpha, "metric": "l2", "key": "last", "value": "low_rank", "rank": 8,
        "learning_rate": 1e-2, "max_steps": 60, "stop_probability": 0.95,
    }  # fmt: skip


class Stream:
    """Training samples drawn step by step; facts kept for calibration never appear."""

    def __init__(self, world: World, batch_size: int, seed: int, held_out: set[int]):
        self.world, self.batch_size, self.seed = world, batch_size, seed
        self.held_out = held_out
        self._pool: list = []
        self._round = 0

    def __call__(self, step: int) -> list:
        while len(self._pool) < self.batch_size:
            drawn = edit_samples(self.world, "train", 400, seed=1_000_000 + 1000 * self.seed + self._round)
            self._pool += [sample for sample in drawn if sample.entity not in self.held_out]
            self._round += 1
        batch, self._pool = self._pool[: self.batch_size], self._pool[self.batch_size :]
        return batch


def held_out_entities(world: World, share: float = 0.125) -> set[int]:
    """Training entities kept from the adapters, whole look-alike families, for calibration."""
    entities = world.entities("train")
    families = sorted({world.family[e] for e in entities})
    kept = set(families[: max(1, int(share * len(families)))])
    return {e for e in entities if world.family[e] in kept}


def calibration_samples(world: World, held_out: set[int], count: int, seed: int) -> list:
    """Edits of the held-out training entities."""
    drawn = edit_samples(world, "train", 5 * len(world.entities("train")), seed=777 + seed)
    return [sample for sample in drawn if sample.entity in held_out][:count]


def train_dualedit(world: World, vlm: Path | None, settings: TrainSettings, layers: tuple[int, int], mid_dim: int):
    """The embedded model with freshly trained adapters, its losses, and the seconds it took."""
    base, processor = load_embedded(vlm)
    torch.manual_seed(settings.seed)
    model = inject_dualedit(base, *layers, mid_dim=mid_dim, num_heads=8, threshold=0.8)
    stream = Stream(world, settings.batch_size, settings.seed, held_out_entities(world))
    began = time.perf_counter()
    with tqdm(total=settings.steps, desc="training adapters", unit="step") as bar:

        def report(step: int, change: float, keep: float) -> None:
            bar.update()
            bar.set_postfix(change=f"{change:.3f}", keep=f"{keep:.3f}")

        history = train_adapters(model, Prompter(processor), stream, settings, report)
    model.eval()
    return Editor(model, processor), history, time.perf_counter() - began


def _tail_mean(history: list[tuple[float, float]], column: int, steps: int = 50) -> float:
    tail = [losses[column] for losses in history[-steps:]]
    return sum(tail) / len(tail)


def run(out: Path, vlm: Path | None, settings: TrainSettings, layers: tuple[int, int], mid_dim: int, facts: int) -> dict:
    """Train, calibrate, save; returns what is written to editors.json."""
    world = World(0)
    editor, history, seconds = train_dualedit(world, vlm, settings, layers, mid_dim)
    samples = calibration_samples(world, held_out_entities(world), facts, settings.seed)
    before = ask_before(editor, samples)
    tau, figures = calibrate_threshold(measure_curve(editor, samples, before=before))
    with_threshold(editor, tau)
    out.mkdir(parents=True, exist_ok=True)
    save_edits(editor.model, out / "dualedit")
    base, processor = load_embedded(vlm)
    balance = Editor(inject_balancedit(base, **balancedit_config()), processor)
    alpha, balance_figures = calibrate_alpha(measure_curve(balance, samples, before=before))
    report = {
        "dualedit": {
            "threshold": tau, "text_layer": layers[0], "vis_layer": layers[1], "mid_dim": mid_dim,
            "steps": settings.steps, "batch_size": settings.batch_size, "learning_rate": settings.learning_rate,
            "seed": settings.seed, "seconds": round(seconds, 1),
            "loss_change": _tail_mean(history, 0), "loss_keep": _tail_mean(history, 1),
            "calibration_figures": figures,
        },
        "balancedit": {"config": balancedit_config(alpha=alpha), "calibration_figures": balance_figures},
        "calibration_facts": len(samples),
        "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    (out / "editors.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the editors to")
    parser.add_argument("--vlm", type=Path, help="folder of the embedded model; the shipped one if not given")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--batch-size", type=int, default=SETTINGS.batch_size)
    parser.add_argument("--learning-rate", type=float, default=SETTINGS.learning_rate)
    parser.add_argument("--locality-weight", type=float, default=SETTINGS.locality_weight)
    parser.add_argument("--text-layer", type=int, default=TEXT_LAYER)
    parser.add_argument("--vis-layer", type=int, default=VIS_LAYER)
    parser.add_argument("--mid-dim", type=int, default=128)
    parser.add_argument("--facts", type=int, default=CALIBRATION_FACTS, help="training facts to calibrate on")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    settings = TrainSettings(
        given.steps, given.batch_size, given.learning_rate, SETTINGS.warmup,
        locality_weight=given.locality_weight, seed=given.seed,
    )  # fmt: skip
    report = run(given.out, given.vlm, settings, (given.text_layer, given.vis_layer), given.mid_dim, given.facts)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
