"""Train the embedded model from scratch: ``python -m recipes.toy.train_vlm --out DIR [--seed N]
[--steps-scale F] [--start DIR [--first STAGE]]``.

"vision" teaches the vision tower with labels (entity, facts, strokes, digits, scenes); without it shapes and
digits stay at chance.  "language" and "polish" teach answering, with copy tasks (answers stay readable in the
residual stream) and a loss on the last prompt token's state after ``GATE_LAYERS`` (the same fact close,
everything else apart), whose purpose is a gate that generalises; the gate loss has no weights.  "Strangers",
logos of no world, are in every stage: a gate must tell apart what nobody taught the model.  Strokes stay
labelled to the end, or the tower keeps only what tells the known logos apart.

"sharpen" and "apart" do both once more, mostly on strangers: with one logo in four a stranger, a linear probe
read every stroke of 98 known logos in 100 but of 87 strange ones, and the gate let one strange look-alike in
six pass.  Strangers come in families of four, most members one stroke apart: with pairs that differed in
anything, 24 in 100 look-alikes with a moved stroke still passed, and of those with another colour or shape 2.
The shipped weights had them twice, the first time with pairs.

"focus" is for the tower alone: it learns to see more sharply, and its tokens stay near those it showed to the
language model before, so that nothing above it has to learn anew.  "compare" goes on, with the projector, on
what a routing key reads, the mean image token: two pictures of one stranger close, look-alikes apart.  Naming
an outline or a colour is easier than keeping it apart from others whatever else a picture varies in: by the
tokens of "focus" 2.1 of 100 look-alikes with another outline still passed for the same logo.

Those that begin with new heads ("sharpen", "focus", "compare") can be ``--first`` for a finished model
(``--start``).

The heads are dropped.  About two hours on one CPU core.  One thread is used: on shared cores more are slower.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from dualedit.toy.model import build_model, build_processor, load_embedded, save_embedded
from dualedit.toy.world import ATTRIBUTES, World
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from recipes.toy.vlm_batches import FAMILY, IGNORE, RowBatches, Rows, VisionBatches
from recipes.toy.vlm_losses import (
    VisionHeads,
    image_tokens,
    language_loss,
    language_states,
    shown_tokens,
    vision_loss,
)
from recipes.toy.vlm_measures import accuracies, gate_separation, held_out_cases

GATE_LAYERS = (2, 4)
STAGES = ("vision", "language", "polish", "sharpen", "apart", "focus", "compare")
_ANEW = ("sharpen", "focus", "compare")  # begin with new heads, so that a finished model can go on there


@dataclass(frozen=True)
class Seeing:
    """One stretch of the tower's own training: how long, how fast, and what a batch holds."""

    steps: int
    rate: float
    logos: float  # shares of the batch; what is left are digits
    strangers: float
    scenes: float
    batch: int = 64
    reading: int = 0  # steps in which the heads learn and the tower does not
    staying: float = 0.0  # weight of how far the tokens move from those before this stretch
    families: int = 0  # of four strangers in two pictures each, besides the batch, to be compared
    alike_weight: float = 2.0  # of the loss of comparing them, which the projector learns from, too


@dataclass(frozen=True)
class Answering:
    """One stretch of training the whole model: how long, how fast, and what a batch holds."""

    steps: int
    rate: float
    tower_share: float  # learning rate of the vision tower, relative to the rest
    logo_pairs: int  # of look-alikes, two pictures each
    strangers: int  # families of four that belong to no world, for the gate loss alone
    scenes: int
    digits: int
    text_rows: int = 3
    stroke_weight: float = 2.0
    stranger_gate_weight: float = 0.0  # of the gate loss among strangers, besides that among all


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run."""

    seed: int = 0
    vision: Seeing = Seeing(6500, 1e-3, logos=0.48, strangers=0.24, scenes=0.15)
    language: Answering = Answering(
        6750, 1.5e-3, tower_share=0.15, logo_pairs=5, strangers=2, scenes=3, digits=3
    )
    # Facts are known by then; what is seen in scenes and digits is not yet.
    polish: Answering = Answering(1500, 6e-4, tower_share=0.5, logo_pairs=3, strangers=1, scenes=9, digits=5)
    sharpen: Seeing = Seeing(9000, 1e-3, logos=0.18, strangers=0.65, scenes=0.1, reading=300)
    apart: Answering = Answering(
        7500, 1e-3, tower_share=0.3, logo_pairs=3, strangers=6, scenes=4, digits=3, text_rows=2,
        stroke_weight=4.0, stranger_gate_weight=0.2,
    )  # fmt: skip
    focus: Seeing = Seeing(12000, 6e-4, logos=0.18, strangers=0.65, scenes=0.1, reading=500, staying=2.0)
    compare: Seeing = Seeing(
        7000, 4e-4, logos=0.36, strangers=0.3, scenes=0.2, batch=32, reading=500, staying=10.0, families=6
    )
    gate_weight: float = 0.1
    weight_decay: float = 0.02


def _optimiser(groups: list[dict], steps: int, decay: float) -> tuple:
    """Fused AdamW with 100 steps of warm-up and a cosine down to 2 per cent."""
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=decay, fused=True)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, rate)


class Tally:
    """Running means per name since the last ``flush``."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add ``count`` observations that sum to ``total``."""
        self._sums[name][0] += total
        self._sums[name][1] += count

    def flush(self) -> str:
        """``name=mean`` of everything, and forget it."""
        text = " ".join(f"{k}={s / c:.3f}" for k, (s, c) in sorted(self._sums.items()) if c)
        self._sums.clear()
        return text


class Checkpoint:
    """What a killed run continues from: weights, optimiser, generators, the step of one stage, seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = time.monotonic() - (self._read()["seconds"] if path.exists() else 0.0)

    def _read(self) -> dict:
        return torch.load(self.path, weights_only=False)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the whole run so far, earlier sessions up to their last save included."""
        return time.monotonic() - self._start

    def save(self, stage: str, step: int, parts: dict) -> None:
        """Write the states of ``parts`` atomically."""
        state = {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}
        rng = {name: part.rng.bit_generator.state for name, part in parts.items() if hasattr(part, "rng")}
        temporary = self.path.with_suffix(".tmp")
        saved = {"stage": stage, "step": step, "state": state, "rng": rng, "seconds": self.seconds}
        torch.save(saved, temporary)
        temporary.replace(self.path)

    def load(self, stage: str, parts: dict) -> int:
        """Restore ``parts`` if the file is of this stage; the step to go on from (0 if not)."""
        if self.stage() != stage:
            return 0
        saved = self._read()
        for name, state in saved["state"].items():
            parts[name].load_state_dict(state)
        for name, state in saved["rng"].items():
            parts[name].rng.bit_generator.state = state
        return saved["step"]

    def stage(self) -> str | None:
        """The stage the file was written in, if there is one."""
        return self._read()["stage"] if self.path.exists() else None


def train_vision(
    model: LlavaForConditionalGeneration,
    heads: VisionHeads,
    world: World,
    recipe: Recipe,
    name: str,
    checkpoint: Checkpoint,
) -> None:
    """The vision tower learns to show what is in a picture; ``name`` is that of a `Seeing` stage."""
    stage: Seeing = getattr(recipe, name)
    batches = VisionBatches(
        world,
        recipe.seed + {"vision": 0, "sharpen": 10, "focus": 20, "compare": 20}[name],
        (stage.logos, stage.strangers, stage.scenes),
    )
    before = copy.deepcopy(model).requires_grad_(False) if stage.staying else None
    tower = list(model.model.vision_tower.parameters())
    if stage.families:
        tower += list(model.model.multi_modal_projector.parameters())
    parameters = [*tower, *heads.parameters()]

    def losses() -> tuple[torch.Tensor, dict]:
        pixel_values, labels, bits = batches.draw(stage.batch, stage.families)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = image_tokens(model, pixel_values)
            loss, counts = vision_loss(heads, tokens, labels, bits)
            if stage.families:
                tokens = shown_tokens(model, tokens)
                compared = tokens[: stage.families * FAMILY * 2].float().mean(1)
                alike, *counts["alike"] = heads.alike_loss(compared)
                loss, counts["alike_loss"] = loss + stage.alike_weight * alike, (float(alike.detach()), 1)
            if before is not None:
                seen = image_tokens(before, pixel_values)
                moved = _moved(tokens, shown_tokens(before, seen) if stage.families else seen)
                loss, counts["moved"] = loss + stage.staying * moved, (float(moved.detach()), 1)
        return loss, counts

    optimiser, schedule = _optimiser(
        [{"params": parameters, "lr": stage.rate}], stage.steps, recipe.weight_decay
    )
    parts = {"model": model, "heads": heads, "optimiser": optimiser, "schedule": schedule, "batches": batches}
    if before is not None:
        parts["before"] = before  # a stopped run stays near the tokens before the stage, not before the stop
    first, tally = checkpoint.load(name, parts), Tally()
    if not first:
        _read_tower(heads, tower, losses, stage.reading)
    for step in tqdm(range(first + 1, stage.steps + 1), desc=name, mininterval=10):
        loss, counts = losses()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tally.add("loss", loss.item())
        for kind, (right, count) in counts.items():
            tally.add(kind, right, count)
        if step % 200 == 0 or step == stage.steps:
            tqdm.write(f"{name} {step}: {tally.flush()}")
            checkpoint.save(name, step, parts)


def _moved(tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """How far image tokens [B, 36, D] are from those before, as a share of what these vary by."""
    before = before.float()
    return (tokens.float() - before).square().mean() / before.var(0).mean()


def _read_tower(heads: VisionHeads, tower: list, losses: Callable, steps: int) -> None:
    """Let new heads learn to read a trained tower, which their first gradients would only disturb."""
    optimiser = torch.optim.AdamW(heads.parameters(), lr=5e-3)
    for weight in tower:
        weight.requires_grad_(False)
    for _ in range(steps):
        losses()[0].backward()
        optimiser.step()
        optimiser.zero_grad()
    for weight in tower:
        weight.requires_grad_(True)


def _tally_rows(tally: Tally, rows: Rows, right: torch.Tensor) -> None:
    """Token accuracies of a batch: first answer token per attribute, and everything else."""
    fact = rows.fact[rows.label != IGNORE]
    for number, attribute in enumerate(ATTRIBUTES):
        found = right[(fact >= 0) & (fact % len(ATTRIBUTES) == number)]
        tally.add(attribute, float(found.sum()), len(found))
    tally.add("other", float(right[fact < 0].sum()), float((fact < 0).sum()))


def train_language(
    model: LlavaForConditionalGeneration,
    heads: VisionHeads,
    processor: LlavaProcessor,
    world: World,
    recipe: Recipe,
    name: str,
    checkpoint: Checkpoint,
    states: Callable = language_states,
) -> None:
    """Answering questions; ``name`` is "language", "polish" or "apart".

    ``states`` is ``language_states`` or a compiled version of it.
    """
    stage: Answering = getattr(recipe, name)
    batches = RowBatches(world, processor, recipe.seed + {"language": 0, "polish": 1, "apart": 10}[name])
    tower = list(model.model.vision_tower.parameters())
    inside = {id(p) for p in tower}
    rest = [p for p in model.parameters() if id(p) not in inside] + heads.lasting()
    optimiser, schedule = _optimiser(
        [
            {"params": tower, "lr": stage.rate * stage.tower_share},
            {"params": rest, "lr": stage.rate},
        ],
        stage.steps,
        recipe.weight_decay,
    )
    parts = {"model": model, "heads": heads, "optimiser": optimiser, "schedule": schedule, "batches": batches}
    first, tally = checkpoint.load(name, parts), Tally()
    cases = held_out_cases(world, per_family=24, seed=5)
    for step in tqdm(range(first + 1, stage.steps + 1), desc=name, mininterval=10):
        rows = batches.draw(stage.logo_pairs, stage.scenes, stage.digits, stage.text_rows)
        others = batches.strange(stage.strangers)
        with torch.autocast("cpu", torch.bfloat16):
            found = states(model, rows, GATE_LAYERS)
            unknown = states(model, others, GATE_LAYERS, answered=False)
            answer, gate, strange, right = language_loss(
                found, unknown, rows, others, model.get_input_embeddings().weight
            )
            pictured = torch.cat([found[2], unknown[2]]), torch.cat([rows.strokes, others.strokes])
            strokes, seen, logos = heads.stroke_loss(*pictured)
        gates = recipe.gate_weight * gate + stage.stranger_gate_weight * strange
        (answer + gates + stage.stroke_weight * strokes).backward()
        torch.nn.utils.clip_grad_norm_([*tower, *rest], 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tally.add("loss", answer.item())
        tally.add("gate", gate.item())
        tally.add("strange", strange.item())
        tally.add("strokes", seen, logos)
        _tally_rows(tally, rows, right)
        if step % 250 == 0 or step == stage.steps:
            tqdm.write(f"{name} {step}: {tally.flush()}")
            checkpoint.save(name, step, parts)
        if step % 1000 == 0:
            found = accuracies(model.eval(), processor, cases)
            tqdm.write(f"held out {step}: " + " ".join(f"{k}={v:.2f}" for k, v in found.items()))
            model.train()


def report(folder: Path, recipe: Recipe, seconds: float, before: dict | None) -> dict:
    """Measure the model as saved (float16 upcast) and write ``training.json`` beside it.

    ``before``: what ``training.json`` says of the model that this one was started from; its seconds count.
    """
    model, processor = load_embedded(folder)
    world = World(0)
    result = {
        "recipe": asdict(recipe),
        "world_seed": world.seed,
        "gate_layers": list(GATE_LAYERS),
        "gate_loss": "pairwise sigmoid on cosines of last-prompt-token states after gate_layers, "
        "all entities and strangers; it has no weights of its own",
        "seconds": round(seconds + (before["seconds"] if before else 0)),
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracies(model, processor, held_out_cases(world, per_family=200, seed=1)),
        "gate": gate_separation(model, processor, world, count=200),
    }
    if before is not None:
        kept = ("recipe", "seconds", "accuracy", "started_from")
        result["started_from"] = {name: before[name] for name in kept if name in before}
    (folder / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def train(
    out: Path, recipe: Recipe, compiled: bool = True, start: Path | None = None, first: str = "sharpen"
) -> dict:
    """Train, save to ``out`` and return the report; a killed run with the same ``out`` continues.

    ``start``: folder of a model that has the stages before ``first`` behind it.
    """
    before, processor = None, build_processor()
    model = build_model(processor.tokenizer, recipe.seed)
    if start is not None:
        before = json.loads((start / "training.json").read_text())
        model.load_state_dict(load_embedded(start)[0].state_dict())
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, world = Checkpoint(out / "checkpoint.pt"), World(0)
    heads = VisionHeads(model.config.vision_config.hidden_size)
    model.train()
    model.set_attn_implementation("eager")  # the fused kernel's backward pass takes twice as long here
    states = torch.compile(language_states, dynamic=False) if compiled else language_states
    begin = checkpoint.stage() or ("vision" if start is None else first)
    for name in STAGES[STAGES.index(begin) :]:
        if name in _ANEW:
            heads = VisionHeads(model.config.vision_config.hidden_size)
        if isinstance(getattr(recipe, name), Seeing):
            train_vision(model, heads, world, recipe, name, checkpoint)
        else:
            train_language(model, heads, processor, world, recipe, name, checkpoint, states)
    save_embedded(model, processor, out)
    checkpoint.path.unlink()
    return report(out, recipe, checkpoint.seconds, before)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded vision-language model from scratch.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model; a killed run continues there"
    )
    parser.add_argument("--start", type=Path, help="folder of a trained model, to do the last stages on")
    parser.add_argument("--first", choices=_ANEW, default="sharpen", help="the stage to --start with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of all stages")
    parser.add_argument(
        "--eager", action="store_true", help="do not use torch.compile (needs a C++ compiler)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(seed=options.seed)
    for name in STAGES:
        stage = getattr(recipe, name)
        steps = max(1, round(stage.steps * options.steps_scale))
        recipe = replace(recipe, **{name: replace(stage, steps=steps)})
    result = train(options.out, recipe, not options.eager, options.start, options.first)
    print(json.dumps({key: result[key] for key in ("seconds", "parameters", "accuracy")}, indent=1))


if __name__ == "__main__":
    main()
