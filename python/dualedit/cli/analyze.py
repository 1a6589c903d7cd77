"""`dualedit analyze`: which layers of a model to edit, and what its gate would see."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .evaluate import fingerprint
from .loading import is_smol, load_base
from .terminal import shows_progress, use_few_threads

if TYPE_CHECKING:
    from ..analysis.studies import Plan
    from ..data import EditSample

TOY = ("toy", "embedded")
# Facts that adapters are trained on.
_TRAINING = 800


@dataclass(frozen=True)
class Options:
    """Options of an analysis.

    Attributes:
        model: "toy", "smol" or a folder.
        data, format, images, skip_bad: facts, for a folder's model.
        facts: how many the gate is studied with; the other studies take fewer.
        pairs: pairs of layers whose adapters are trained briefly.
        grid: layers of an exhaustive grid of trained pairs, in place of `pairs`; empty for none.
        steps: of their training.
        layers: decoder layers that are looked at, at most.
        seed: which facts, and the noise.
        json, page, records: files, or None.
    """

    model: str
    data: Path | None = None
    format: str = "auto"
    images: Path | None = None
    skip_bad: bool = False
    facts: int = 24
    pairs: int = 0
    grid: tuple[int, ...] = ()
    steps: int = 150
    layers: int = 10
    seed: int = 0
    json: Path | None = None
    page: Path | None = None
    records: Path | None = None

    @property
    def own(self) -> bool:
        """Whether the model is a folder."""
        return self.model not in TOY and not is_smol(Path(self.model))

    def check(self) -> None:
        """Refuse what cannot be done. Raises ValueError."""
        if self.own and self.data is None:
            raise ValueError(
                f"--model {self.model}: pass --data FILE with facts of yours ({TOY[0]} and smol bring their "
                f"own)."
            )
        if self.facts < 4 or self.layers < 2:
            raise ValueError("--facts takes a number from 4 up, --layers one from 2 up.")
        if self.pairs < 0 or self.steps < 1:
            raise ValueError("--pairs takes a number from 0 up, --steps one from 1 up.")
        for option, file in (("--json", self.json), ("--page", self.page), ("--records", self.records)):
            if file is not None and file.is_dir():
                raise ValueError(f"{option} {file} is a folder: pass a file.")


def run(options: Options) -> None:
    """Measure, print what to begin with, write the files."""
    from ..analysis.studies import Plan, Studies
    from ..analysis.study_journal import StudyJournal

    use_few_threads()
    plan = Plan(
        facts=options.facts, most_layers=options.layers, pairs=options.pairs, exhaustive=bool(options.grid),
        grid_layers=options.grid or None, training=_TRAINING, seed=options.seed,
    )  # fmt: skip
    plan = dataclasses.replace(
        plan, recipe=dataclasses.replace(plan.recipe, steps=options.steps, seed=options.seed)
    )
    journal = StudyJournal(options.records, _arguments(options, plan))
    base, processor = load_base(None if options.model in TOY else Path(options.model))
    samples, training, held_out = _samples(options, plan)
    studies = Studies(base, processor, samples, plan, journal, training, held_out, shows_progress())
    found = {"arguments": _arguments(options, plan), **studies.run()}
    _tell(found)
    if options.json is not None:
        write_whole(options.json, json.dumps(found, indent=1) + "\n")
        print(f"figures: {options.json}")
    if options.page is not None:
        from ..analysis.study_page import render_analysis

        write_whole(options.page, render_analysis(found, samples))
        print(f"page: {options.page}")


def _arguments(options: Options, plan: Plan) -> dict[str, Any]:
    """Everything that decides the figures, by option."""
    from .. import __version__
    from ..analysis.layer_grid import SIZES

    told: dict[str, Any] = {
        "--model": options.model, "--facts": options.facts, "--layers": options.layers,
        "--seed": options.seed, "version": __version__,
    }  # fmt: skip
    told |= {name: getattr(plan, name) for name in ("questions", "writes", "batch")}
    told |= {"sigmas": list(plan.sigmas), "sizes": list(SIZES)}
    if plan.pairs or plan.exhaustive:
        told |= {"--pairs": options.pairs, "--grid": list(options.grid), "--steps": options.steps}
        told |= {name: getattr(plan, name) for name in ("held_out", "training")}
        recipe = ("mid_dim", "num_heads", "batch_size", "learning_rate")
        told["recipe"] = {name: getattr(plan.recipe, name) for name in recipe}
    if options.data is not None:
        told |= {"--data": str(options.data), "contents of --data": fingerprint(options.data)}
    return told


def _samples(options: Options, plan: Plan) -> tuple[Sequence[EditSample], ...]:
    """Facts to choose by, to train on, and to measure trained adapters on; none of a test."""
    wanted = max(plan.facts, plan.questions, plan.writes, plan.held_out)
    trains = plan.pairs or plan.exhaustive
    if options.data is not None:
        from ..datasets import load_samples

        loaded = list(load_samples(options.data, options.format, options.images, options.skip_bad))
        random.Random(options.seed).shuffle(loaded)
        if trains and len(loaded) < 2 * plan.held_out:
            raise ValueError(
                f"--pairs {plan.pairs}: {options.data} has {len(loaded)} facts, too few to train on some and "
                "measure on others. Leave --pairs out."
            )
        kept = min(wanted, len(loaded) // 2) if trains else wanted
        return loaded[:kept], loaded[kept:], ()
    if options.model in TOY:
        return _toy(options.seed, wanted, plan)
    from ..smol import load_concepts
    from ..smol.benchmark import Pictures

    benchmark = Pictures(load_concepts(), options.seed)
    training = benchmark.samples("training", plan.training) if trains else ()
    return benchmark.samples("validation", wanted), training, ()


def _toy(seed: int, wanted: int, plan: Plan) -> tuple[Sequence[EditSample], ...]:
    """Facts about training entities; those to train on are about other families of look-alikes.

    Adapters are trained on, and asked, the questions whose answers are one word of few: what can be learned
    in minutes.
    """
    from ..toy.samples import edit_samples
    from ..toy.world import World

    world = World(0)

    def drawn(count: int, odd: bool, number: int, short: bool = False) -> list[EditSample]:
        def only(entity: int, attribute: str) -> bool:
            return world.family[entity] % 2 == odd and not (short and attribute in ("brand", "founder"))

        found: list[EditSample] = []
        tried = 2 * count + 16
        while len(found) < count:
            found, tried = edit_samples(world, "train", tried, seed + number, only)[:count], 2 * tried
        return found

    samples = drawn(wanted, False, 0)
    if not (plan.pairs or plan.exhaustive):
        return samples, (), ()
    return samples, drawn(plan.training, True, 1_000, True), drawn(plan.held_out, False, 2_000, True)


def _tell(found: dict[str, Any]) -> None:
    for method, told in found["recommendation"].items():
        inside = ", ".join(f"{name}={value!r}" for name, value in told["arguments"].items())
        print(f"inject_{method}(model, {inside})" if inside else f"{method}: nothing to recommend")
        for reason in told["reasons"]:
            print(f"  {reason}")
