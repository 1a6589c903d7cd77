"""Train the image adapter of the VisEdit baseline on the embedded model, on the editors' training facts.

    python -m recipes.toy.train_visedit --out DIR [--start DIR]

writes DIR/visedit (the adapter, its gate open to everything) and DIR/visedit.json (settings, seconds, figures
on training facts that the adapter was not trained on). DIR is the folder of the other editors' weights.
--start names a folder of adapters whose image half to begin with.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from dualedit.baselines.visedit import inject_image_adapter
from dualedit.editor import Editor
from dualedit.evaluation import evaluate_single
from dualedit.storage import save_edits
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import Recipe
from dualedit.tuners import inject_dualedit

from recipes.toy.train_editors import SETTINGS as OF_DUALEDIT
from recipes.toy.train_editors import held_out_entities, train_adapters

VIS_LAYER, MEASURED_FACTS = 1, 40
# Shorter than DualEdit's own training. From nothing that leaves the loss where it began.
SETTINGS = replace(OF_DUALEDIT, text_layer=None, vis_layer=VIS_LAYER, steps=1000)


def run(out: Path, vlm: Path | None, recipe: Recipe, measured: int, start: Path | None = None) -> dict:
    """Train, measure on held-out training facts, save; returns what is written to visedit.json.

    start: folder of adapters whose image half to begin with, at its layer, instead of a new one.
    """
    world = World(0)
    out.mkdir(parents=True, exist_ok=True)
    if start is not None:
        recipe = _begin_with(vlm, start, recipe, out / "begun")
    report = train_adapters(world, vlm, recipe, out / "image-adapter")
    base, processor = load_embedded(vlm)
    # Every cosine is at least -1: no gate, as in the paper.
    editor = Editor(inject_dualedit(base, threshold=-1.0, adapter=out / "image-adapter"), processor)
    editor.model.eval()
    held_out = held_out_entities(world)
    drawn = edit_samples(world, "train", 12 * measured, seed=778)
    samples = [sample for sample in drawn if sample.entity in held_out][:measured]
    figures = evaluate_single(editor, samples, "visedit").row.metrics
    save_edits(editor.model, out / "visedit")
    report |= {
        "vis_layer": recipe.vis_layer, "mid_dim": recipe.mid_dim,
        "began_with": "a new adapter" if start is None else "the image half of adapters trained for both",
        "held_out_training_facts": len(samples), "figures": figures,
    }  # fmt: skip
    (out / "visedit.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _begin_with(vlm: Path | None, start: Path, recipe: Recipe, folder: Path) -> Recipe:
    """Save the image half of trained adapters to a folder; the recipe that goes on from there."""
    base, _ = load_embedded(vlm)
    model, _ = inject_image_adapter(base, start)
    save_edits(model, folder)
    config = model.peft_config["default"]
    return replace(recipe, vis_layer=config.vis_layer, mid_dim=config.mid_dim, adapters=str(folder))


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
    recipe = replace(
        SETTINGS, steps=given.steps, learning_rate=given.learning_rate, vis_layer=given.layer,
        seed=given.seed, warmup=min(SETTINGS.warmup, given.steps - 1),
    )  # fmt: skip
    report = run(given.out, given.vlm, recipe, given.measured, given.start)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
