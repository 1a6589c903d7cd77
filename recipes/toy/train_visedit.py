"""Train the image adapter of the VisEdit baseline on the embedded model, on the editors' training facts.

    python -m recipes.toy.train_visedit --out DIR [--start DIR]

writes DIR/visedit (the adapter, its gate open to everything) and DIR/visedit.json (settings, seconds, figures
on training facts that the adapter was not trained on). DIR is the folder of the other editors' weights.
--start names a folder of adapters whose image half to begin with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dualedit.baselines.visedit import inject_image_adapter
from dualedit.editor import Editor
from dualedit.evaluation import evaluate_single
from dualedit.storage import save_edits
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import TrainSettings
from dualedit.training.calibration import with_threshold

from recipes.toy.train_editors import held_out_entities, train_dualedit, train_on

# Shorter than DualEdit's own training. From nothing that leaves the loss where it began.
SETTINGS = TrainSettings(steps=1000, batch_size=16, learning_rate=5e-3, warmup=50, locality_weight=0.05)
VIS_LAYER, MID_DIM, MEASURED_FACTS = 1, 256, 40


def run(
    out: Path,
    vlm: Path | None,
    settings: TrainSettings,
    layer: int,
    measured: int,
    start: Path | None = None,
) -> dict:
    """Train, measure on held-out training facts, save; returns what is written to visedit.json.

    start: folder of adapters whose image half to begin with, at its layer, instead of a new one at `layer`.
    """
    world = World(0)
    if start is None:
        editor, history, seconds = train_dualedit(world, vlm, settings, (None, layer), MID_DIM, "last")
    else:
        editor = _begun(vlm, start)
        layer = editor.model.peft_config["default"].vis_layer
        history, seconds = train_on(editor, world, settings)
    with_threshold(editor, -1.0)  # every cosine is at least -1: no gate, as in the paper
    held_out = held_out_entities(world)
    drawn = edit_samples(world, "train", 12 * measured, seed=778)
    samples = [sample for sample in drawn if sample.entity in held_out][:measured]
    figures = evaluate_single(editor, samples, "visedit").row.metrics
    out.mkdir(parents=True, exist_ok=True)
    save_edits(editor.model, out / "visedit")
    tail = history[-50:]
    report = {
        "vis_layer": layer, "mid_dim": MID_DIM, "steps": settings.steps, "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate, "locality_weight": settings.locality_weight,
        "facts": settings.steps * settings.batch_size, "seed": settings.seed, "seconds": round(seconds, 1),
        "began_with": "a new adapter" if start is None else "the image half of adapters trained for both",
        "loss_change": sum(change for change, _ in tail) / len(tail),
        "loss_keep": sum(keep for _, keep in tail) / len(tail),
        "held_out_training_facts": len(samples), "figures": figures,
    }  # fmt: skip
    (out / "visedit.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _begun(vlm: Path | None, start: Path) -> Editor:
    """The embedded model with the image half of trained adapters, to be trained on alone."""
    base, processor = load_embedded(vlm)
    model, _ = inject_image_adapter(base, start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dualedit_adapter." in name)
    return Editor(model, processor)


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the editors' weights")
    parser.add_argument("--vlm", type=Path, help="folder of the embedded model; the shipped one if not given")
    parser.add_argument("--start", type=Path, help="folder of adapters whose image half to begin with")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--learning-rate", type=float, default=SETTINGS.learning_rate)
    parser.add_argument("--layer", type=int, default=VIS_LAYER)
    parser.add_argument("--measured", type=int, default=MEASURED_FACTS, help="training facts to measure on")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    settings = TrainSettings(
        given.steps, SETTINGS.batch_size, given.learning_rate, SETTINGS.warmup,
        locality_weight=SETTINGS.locality_weight, seed=given.seed,
    )  # fmt: skip
    report = run(given.out, given.vlm, settings, given.layer, given.measured, given.start)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
