"""Step 7: DualEdit's adapters on `smol`, trained on facts about training concepts.

    python recipes/smol/adapters.py --steps 520 --layers 21 21

Pictures are by training and validation artists. `dualedit.training.train` does the work; the folder
`$SMOL_WORK/adapters` holds its checkpoints, from which a stopped run goes on. `editors.py` makes an editor
of them.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from common import WORK
from dualedit.smol import load_concepts, load_smol
from dualedit.smol.benchmark import Pictures
from dualedit.smol.wordings import EVERYDAY
from dualedit.training import Recipe, train

SETTINGS = Recipe(
    mid_dim=512, num_heads=8, copying=6000, batch_size=16, learning_rate=5e-4, schedule="cosine", warmup=30,
    weight_decay=0.01, beta2=0.98, grad_clip=1.0,
    reliability=1.0, text_generality=1.0, image_generality=1.0,
    text_locality=0.0, image_locality=0.0, hard_locality=0.0,
    precision="bf16", checkpoint_every=100, log_every=10,
)  # fmt: skip


class Edits:
    """Facts about training concepts, each time with another new answer: `count` of them, drawn when asked.

    What is to be learned is to copy an answer, whichever it is: any name of any thing, or words of everyday
    life, are the new answers of any question.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self.pictures = Pictures(load_concepts(), 0)
        self.facts = self.pictures.facts("training")
        names = {c.name for c in self.pictures.concepts if c.seen}
        values = {v for c in self.pictures.concepts for v in c.facts.values()}
        everyday = {text for texts in EVERYDAY.values() for text in texts}
        self.answers = sorted(names | values | everyday)

    @property
    def fingerprint(self) -> str:
        """What a run that goes on compares."""
        return f"{self.count} drawn with seed {self.seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(self.count))]
        sample = self.pictures.sample("training", *self.facts[place % len(self.facts)])
        rng = np.random.default_rng([self.seed, place])
        target = self.answers[int(rng.integers(len(self.answers)))]
        generality = {
            kind: [replace(probe, answer=target) for probe in probes]
            for kind, probes in sample.generality.items()
        }
        return replace(sample, request=replace(sample.request, target=target), generality=generality)


def main(steps: int, layers: tuple[int, int], copying: int, seed: int):
    torch.set_num_threads(1)
    base, processor = load_smol()
    recipe = replace(
        SETTINGS, steps=steps, text_layer=layers[0], vis_layer=layers[1], copying=copying, seed=seed
    )
    edits = Edits(recipe.steps * recipe.batch_size, seed)
    train(base, processor, edits, [], recipe, WORK / f"adapters-{layers[0]}-{layers[1]}", resume=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=520)
    parser.add_argument("--layers", type=int, nargs=2, default=(21, 21), help="for text and for image tokens")
    parser.add_argument("--copying", type=int, default=SETTINGS.copying, help="tokens; 0: as published")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.steps, tuple(given.layers), given.copying, given.seed)
