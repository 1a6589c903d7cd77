"""Train DualEdit's adapters on the embedded model; set both editors' keys and thresholds on training facts.

    python -m recipes.toy.train_editors --out DIR

writes DIR/dualedit (the adapters, routing key and calibrated tau included), DIR/balancedit (routing key and
alpha) and DIR/editors.json (settings, seconds, figures on training facts that the adapters were not trained
on). ``--adapters DIR`` takes adapters that are trained already and does what comes after. Training itself is
`dualedit.training.train`; DIR/adapters and DIR/finished are the folders of its two stages, and a stopped run
goes on there.

The shipped adapters come from an earlier form of this script, with the same questions and weights on average:
of the kinds of locality each edit asked one, drawn at random, where it now asks all that it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from dualedit.data import EditSample
from dualedit.editor import Editor
from dualedit.models.prompting import Prompter
from dualedit.storage import save_edits
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples, renumbered
from dualedit.toy.world import ATTRIBUTES, World, answer_vocabulary
from dualedit.training import (
    Recipe,
    fit_pooled_key,
    measure_curve,
    save_calibration,
    sweep_alpha,
    sweep_threshold,
    train,
)
from dualedit.training.calibration import with_alpha, with_threshold
from dualedit.training.metrics import read_metrics
from dualedit.training.recipe import TERMS
from dualedit.tuners import inject_balancedit, inject_dualedit
from dualedit.tuners.adapter import active_adapter
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

# Where adapters and keys worked best on training facts of an earlier model by the same script.
TEXT_LAYER, VIS_LAYER = 1, 1
BALANCEDIT_LAYER = "layers.5.mlp.up_proj"
# Locality counts a twentieth of what must change: a quarter of it is unrelated questions with an image, a
# quarter those without, half look-alikes and other questions about the same thing.
SETTINGS = Recipe(
    text_layer=TEXT_LAYER, vis_layer=VIS_LAYER, mid_dim=256, num_heads=8, steps=5500, batch_size=16,
    learning_rate=5e-3, schedule="cosine", warmup=50, weight_decay=0.01, beta2=0.98, grad_clip=1.0,
    reliability=1 / 3, text_generality=1 / 3, image_generality=1 / 3,
    text_locality=0.0125, image_locality=0.0125, hard_locality=0.025,
    by_difficulty=True, precision="bf16", shuffle=False, checkpoint_every=500, log_every=1,
)  # fmt: skip
# A second, shorter run at a lower rate: the first left one name in a hundred with a wrong ending.
FINISH = replace(SETTINGS, steps=1400, learning_rate=1.5e-3, warmup=20)
# The adapters' figures come from entities that they have not met. Tau and alpha decide by states of the
# frozen model alone, so that all training entities will do for them: their look-alikes differ in number and
# nearness, and tau from 195 facts was too tight for 1,000, alpha from 195 too loose. Tau is the same for all
# edits; a radius is an edit's own, and how many others lie in it shows with all of them stored.
CALIBRATION_FACTS, THRESHOLD_FACTS, STORED = 200, 1000, 100
# Worlds that the model has never seen, from this number on (those below are for evaluation): of the facts
# that set tau and alpha every other one, of the edits that adapters learn on a third. The brands that the
# model knows lie so far apart that almost any threshold suits them; it matters for those it does not.
STRANGE_WORLDS = 100
# The routing key is fitted on facts of the model's own world and of others of its own that it has not seen.
KEY_DIM, KEY_FACTS, KEY_WORLDS = 256, 1500, range(50, 55)
# What the cosine of the pictures weighs in BalancEdit's key, that of the questions one. More weight suits one
# radius for all. An edit's own lies between a rewording and a black image, and varies with black: of
# 200 training facts of an unseen world, the best alpha for each, 97.5 % of new images were inside and all
# look-alikes outside at 3, 99.3 and 99.5 % at 1.5.
BALANCEDIT_IMAGE_WEIGHT = 1.5
# An edit whose answer does not come out by itself is mended. Of 400 held-out training facts three did not,
# and those written with less than 0.9 made all the mistakes in new pictures.
REFINE = {"refine_steps": 200, "refine_rate": 3e-2, "refine_probability": 0.95}
TRAINING, REPORT = "training.json", "editors.json"
# Facts drawn at a time.
CHUNK = 1600


def balancedit_config(layer: str = BALANCEDIT_LAYER, alpha: float = 0.2) -> dict:
    """Arguments of `inject_balancedit` for the embedded model.

    A value fitted until its answer has probability 0.999 in the edit's own picture was too weak in one of
    twelve new pictures of a brand that the model has never seen (training facts of such a world, the right
    edit given): 92.0 of 100; at 0.99999 99.3, and 100 with the higher rate.
    """
    return {
        "layer": layer, "alpha": alpha, "metric": "l2", "key": "pooled", "key_dim": KEY_DIM,
        "value": "low_rank", "rank": 8, "learning_rate": 4e-2, "max_steps": 400, "stop_probability": 0.99999,
    }  # fmt: skip


def held_out_entities(world: World, share: float = 0.125) -> set[int]:
    """Training entities kept from the adapters, whole look-alike families, for calibration."""
    entities = world.entities("train")
    families = sorted({world.family[e] for e in entities})
    kept = set(families[: max(1, int(share * len(families)))])
    return {e for e in entities if world.family[e] in kept}


def calibration_samples(world: World, count: int, seed: int, entities: set[int] | None = None) -> list:
    """Edits of the training entities, or of those named, each fact once."""
    among = set(world.entities("train")) if entities is None else entities
    everything = 5 * len(world.entities("train"))
    return edit_samples(world, "train", everything, 777 + seed, lambda entity, _: entity in among)[:count]


def threshold_samples(world: World, count: int, seed: int) -> list:
    """Edits of training entities, by turns of the model's own world and of one that it has never seen."""
    known = calibration_samples(world, (count + 1) // 2, seed)
    strange = calibration_samples(World(STRANGE_WORLDS), count // 2, seed)
    strange = [renumbered(sample, len(world.logos)) for sample in strange]
    return [sample for pair in itertools.zip_longest(known, strange) for sample in pair if sample is not None]


def key_samples(world: World, count: int, seed: int) -> list:
    """Edits of training entities for the routing key: a third of the model's own world, then of others."""
    found = calibration_samples(world, count // 3, 1 + seed)
    each = -(-(count - len(found)) // len(KEY_WORLDS))
    for number in KEY_WORLDS:
        found += calibration_samples(World(number), each, seed)
    return found[:count]


def training_samples(world: World, count: int, seed: int) -> list:
    """Edits of the training entities that calibration does not use, with several targets a fact.

    A quarter of the targets are answers to other questions, and two-token names come more than twice as often
    as their facts: what is to be learned is to copy an answer, not which answers a question usually has.
    """
    held_out = held_out_entities(world)
    generator = torch.Generator().manual_seed(seed)

    def wanted(entity: int, attribute: str) -> bool:
        often = attribute == "brand" or torch.rand(1, generator=generator) > 0.6
        return often and entity not in held_out

    drawn = edit_samples(world, "train", int(2.6 * count) + 64, 1_000_000 + seed, wanted)[:count]
    return [
        _any_target(sample, generator) if torch.rand(1, generator=generator) < 0.25 else sample
        for sample in drawn
    ]


def _any_target(sample: EditSample, generator: torch.Generator) -> EditSample:
    family = ATTRIBUTES[int(torch.randint(len(ATTRIBUTES), (1,), generator=generator))]
    answers = answer_vocabulary(family)
    target = answers[int(torch.randint(len(answers), (1,), generator=generator))]
    return replace(sample, request=replace(sample.request, target=target))


class FreshEdits(Sequence[EditSample]):
    """Training edits that are drawn chunk by chunk when they are asked for; every third chunk of a new world.

    No edit comes twice. Five passes over 10,000 edits left adapters that knew those edits by heart (two-token
    names right in 99 of 100) and wrote new ones for the same entities, let alone for others, in 87 of 100.

    Args:
        world: the embedded model's own.
        count: how many edits.
        seed: the same seed gives the same edits.
    """

    def __init__(self, world: World, count: int, seed: int):
        self.world, self.count, self.seed = world, count, seed
        self._number, self._chunk = -1, []

    @property
    def fingerprint(self) -> str:
        """What a run that goes on compares."""
        return f"{self.count} drawn with seed {self.seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int | slice) -> EditSample | list[EditSample]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(self.count))]
        number, within = divmod(place, CHUNK)
        if number != self._number:
            seed = 1000 * self.seed + number
            among = World(STRANGE_WORLDS + 1 + seed) if number % 3 == 2 else self.world
            size = min(CHUNK, self.count - CHUNK * number)
            self._number, self._chunk = number, training_samples(among, size, seed)
        return self._chunk[within]


def train_adapters(world: World, vlm: Path | None, recipe: Recipe, out: Path) -> dict:
    """Train adapters of the embedded model into a folder; a stopped run goes on. Returns what is said of it.

    The gate has no part in it: while adapters are trained, each question is told which edit it belongs to.
    """
    began = time.perf_counter()
    base, processor = load_embedded(vlm)
    edits = FreshEdits(world, recipe.steps * recipe.batch_size, recipe.seed)
    train(base, processor, edits, [], recipe, out, resume=True)
    tail = read_metrics(out / "metrics.jsonl")[-50:]

    def mean(*terms: str) -> float:
        found = [line[term] for line in tail for term in terms if term in line]
        return sum(found) / len(found)

    return {
        "steps": recipe.steps, "batch_size": recipe.batch_size, "learning_rate": recipe.learning_rate,
        "facts": len(edits), "seed": recipe.seed, "seconds": round(time.perf_counter() - began, 1),
        "loss_change": mean(*TERMS[:3]), "loss_keep": mean(*TERMS[3:]),
    }  # fmt: skip


def trained_adapters(folder: Path, vlm: Path | None, layers: tuple[int, int], mid_dim: int) -> Editor:
    """The embedded model with the adapters of an earlier run, whatever key they were saved with."""
    base, processor = load_embedded(vlm)
    torch.manual_seed(0)  # of the key, where it is not fitted
    model = inject_dualedit(
        base,
        text_layer=layers[0],
        vis_layer=layers[1],
        mid_dim=mid_dim,
        num_heads=8,
        key="pooled",
        key_dim=KEY_DIM,
    )
    editor = Editor(model, processor)
    saved = load_file(folder / "adapter_model.safetensors")
    weights = {name: value for name, value in saved.items() if ".dualedit_adapter." in name}
    missing = set_peft_model_state_dict(editor.model, weights).missing_keys
    lacking = [name for name in missing if ".dualedit_adapter." in name]
    if lacking or not weights:
        raise ValueError(f"{folder} lacks {(lacking or ['adapters'])[0]}: pass a folder of adapters.")
    editor.model.eval()
    return editor


def make_dualedit(
    out: Path, vlm: Path | None, recipe: Recipe, calibration: int, finish: int, adapters: Path | None = None
) -> dict:
    """Train, fit the key, set tau, save to out/dualedit; returns what editors.json says of it.

    Args:
        finish: steps of the second stage, or 0.
        adapters: folder of adapters that are trained already.
    """
    world = World(0)
    if adapters is None:
        adapters = out / "adapters"  # what takes longest: --adapters goes on from here
        training = train_adapters(world, vlm, recipe, adapters)
        if finish:
            last = replace(
                FINISH, text_layer=recipe.text_layer, vis_layer=recipe.vis_layer, mid_dim=recipe.mid_dim,
                steps=finish, warmup=min(FINISH.warmup, finish - 1), seed=recipe.seed + 1,
                adapters=str(adapters),
            )  # fmt: skip
            adapters = out / "finished"
            training["finish"] = train_adapters(world, vlm, last, adapters)
        (out / TRAINING).write_text(json.dumps(training, indent=1) + "\n")
    else:
        report = adapters.parent / TRAINING
        training = json.loads(report.read_text()) if report.is_file() else {}
    layers = (recipe.text_layer, recipe.vis_layer)
    editor = trained_adapters(adapters, vlm, layers, recipe.mid_dim)
    keys = key_samples(world, KEY_FACTS * calibration // CALIBRATION_FACTS, recipe.seed)
    fitted = fit_pooled_key(editor.model, Prompter(editor.processor), keys)
    config = active_adapter(editor.model).config
    for name, value in REFINE.items():
        setattr(config, name, value)
    facts = threshold_samples(world, THRESHOLD_FACTS * calibration // CALIBRATION_FACTS, recipe.seed)
    curve = measure_curve(editor, facts, STORED)
    sweep = sweep_threshold(curve)
    with_threshold(editor, sweep.chosen)
    save_edits(editor.model, out / "dualedit")
    save_calibration(out / "dualedit", sweep, curve)
    samples = calibration_samples(world, calibration, recipe.seed, held_out_entities(world))
    held_out = measure_curve(editor, samples, together=True)
    figures = held_out.figures(lambda point: 1.0 - sweep.chosen)
    return {
        "threshold": sweep.chosen, "text_layer": layers[0], "vis_layer": layers[1], "mid_dim": recipe.mid_dim,
        "key": "pooled", "key_dim": KEY_DIM, "key_facts": fitted["facts"], **REFINE, **training,
        "threshold_facts": len(facts), "threshold_figures": sweep.chosen_figures,
        "calibration_facts": len(samples), "calibration_figures": figures,
        "calibration_protocol": f"all of them stored at once; threshold_facts {STORED} at a time",
    }  # fmt: skip


def make_balancedit(out: Path, vlm: Path | None, seed: int, calibration: int) -> dict:
    """Fit the key, set alpha, save to out/balancedit; returns what editors.json says of it."""
    facts = threshold_samples(World(0), THRESHOLD_FACTS * calibration // CALIBRATION_FACTS, seed)
    base, processor = load_embedded(vlm)
    torch.manual_seed(seed)  # of the key, where it is not fitted
    editor = Editor(inject_balancedit(base, **balancedit_config()), processor)
    keys = key_samples(World(0), KEY_FACTS * calibration // CALIBRATION_FACTS, seed)
    weight = BALANCEDIT_IMAGE_WEIGHT
    fitted = fit_pooled_key(editor.model, Prompter(processor), keys, image_weight=weight)
    curve = measure_curve(editor, facts, together=True)
    sweep = sweep_alpha(curve)
    with_alpha(editor, sweep.chosen)
    save_edits(editor.model, out / "balancedit")
    save_calibration(out / "balancedit", sweep, curve)
    return {
        "config": balancedit_config(alpha=sweep.chosen), "key_facts": fitted["facts"],
        "threshold_facts": len(facts), "threshold_figures": sweep.chosen_figures,
    }  # fmt: skip


def _note(out: Path, name: str, found: dict) -> dict:
    """Write what is known of an editor into editors.json, beside the other's."""
    file = out / REPORT
    report = json.loads(file.read_text()) if file.is_file() else {}
    report |= {name: found, "torch": torch.__version__, "python": platform.python_version(),
               "threads": torch.get_num_threads()}  # fmt: skip
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(file)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the editors to")
    parser.add_argument("--vlm", type=Path, help="folder of the embedded model; the shipped one if not given")
    parser.add_argument("--editor", choices=("both", "dualedit", "balancedit"), default="both")
    parser.add_argument("--adapters", type=Path, help="folder of trained adapters: only set key and tau")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--finish", type=int, default=FINISH.steps, help="steps of the second, slower stage")
    parser.add_argument("--batch-size", type=int, default=SETTINGS.batch_size)
    parser.add_argument("--learning-rate", type=float, default=SETTINGS.learning_rate)
    parser.add_argument("--text-layer", type=int, default=TEXT_LAYER)
    parser.add_argument("--vis-layer", type=int, default=VIS_LAYER)
    parser.add_argument("--mid-dim", type=int, default=256)
    parser.add_argument(
        "--calibration",
        type=int,
        default=CALIBRATION_FACTS,
        help="training facts to take the figures on, a fifth of those for tau and alpha",
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    recipe = replace(
        SETTINGS, steps=given.steps, batch_size=given.batch_size, learning_rate=given.learning_rate,
        text_layer=given.text_layer, vis_layer=given.vis_layer, mid_dim=given.mid_dim, seed=given.seed,
        warmup=min(SETTINGS.warmup, given.steps - 1),
    )  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    if given.editor in ("both", "dualedit"):
        made = make_dualedit(given.out, given.vlm, recipe, given.calibration, given.finish, given.adapters)
        report = _note(given.out, "dualedit", made)
    if given.editor in ("both", "balancedit"):
        made = make_balancedit(given.out, given.vlm, given.seed, given.calibration)
        report = _note(given.out, "balancedit", made)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
