"""Choose the baselines' settings for the embedded model, on training facts that no adapter was trained on:
half of them of the model's own world, half of one that it has never seen, as for the editors' thresholds.

    python -m recipes.toy.tune_baselines --out DIR

writes DIR/baselines.json: settings, seconds and figures of every baseline that has something to choose. One
edit at a time; what is maximised is what calibration maximises for the library's own editors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from dualedit.baselines import FineTuneSettings, GRACESettings, LoRASettings, Settings, open_baseline
from dualedit.data import EditSample
from dualedit.evaluation.metrics import exact_match, figures_of
from dualedit.evaluation.single import probes_of
from dualedit.toy.baselines import FILE
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training.calibration import objective
from tqdm.auto import tqdm

from .train_editors import STRANGE_WORLDS, held_out_entities

FACTS = 36
CANDIDATES: dict[str, tuple[Settings, ...]] = {
    "ft-l": tuple(FineTuneSettings(learning_rate=rate, max_steps=50) for rate in (1e-3, 3e-3, 1e-2)),
    "ft-v": tuple(FineTuneSettings(learning_rate=rate, max_steps=50) for rate in (1e-4, 3e-4, 1e-3)),
    "lora": tuple(LoRASettings(learning_rate=rate, max_steps=50) for rate in (5e-4, 1e-3, 2e-3)),
    # One radius for every key: measured with it wide open, then chosen for each layer.
    "grace": tuple(GRACESettings(learning_rate=1.0, layer=layer, epsilon=1e9) for layer in (2, 3, 4)),
}


@dataclasses.dataclass(frozen=True)
class _Answered:
    sample: int
    metric: str
    distance: float  # to the edit's key; 0 where a method has no gate
    edited: bool  # whether the answer is right with the edit in force
    unedited: bool  # and without


def _answered(name: str, settings: Settings, samples: Sequence[EditSample], vlm: Path | None) -> list:
    method = open_baseline(name, *load_embedded(vlm), settings)
    points = []
    for number, sample in enumerate(tqdm(samples, desc=f"tuning {name}", unit="fact", mininterval=2)):
        probes = probes_of(sample)
        questions = [(probe.image, probe.prompt) for _, probe in probes]
        before = method.answers(questions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rate that is too low is a candidate like any other
            method.edit(sample)
        rows = zip(probes, before, method.answers(questions), method.explain(questions), strict=True)
        for (metric, _), old, new, why in rows:
            wanted = old if metric in sample.locality else sample.request.target
            right = exact_match(new, wanted), exact_match(old, wanted)
            points.append(_Answered(number, metric, 0.0 if why is None else why.distance, *right))
        method.reset()
    return points


def _figures(points: Sequence[_Answered], radius: float) -> dict[str, float | None]:
    samples: dict[int, dict[str, list[bool]]] = {}
    for point in points:
        right = point.edited if point.distance <= radius else point.unedited
        samples.setdefault(point.sample, {}).setdefault(point.metric, []).append(right)
    return figures_of(list(samples.values()))


def _score(figures: dict[str, float | None]) -> float:
    # An edit that does not take leaves locality whole; reliability keeps that from winning.
    return objective(figures) + (figures["rel"] or 0.0) / 4


def _best_radius(points: Sequence[_Answered]) -> float:
    """The middle of the plateau of the best radii."""
    highest = max(point.distance for point in points)
    grid = [highest * i / 200 for i in range(1, 201)]
    scores = [_score(_figures(points, radius)) for radius in grid]
    good = [radius for radius, score in zip(grid, scores, strict=True) if score >= max(scores) - 0.25]
    return round(good[len(good) // 2], 2)


def tune(name: str, samples: Sequence[EditSample], vlm: Path | None = None) -> dict:
    """Settings and figures of the best candidate of one baseline, as `baselines.json` holds them."""
    tried = []
    for settings in CANDIDATES[name]:
        began = time.perf_counter()
        points = _answered(name, settings, samples, vlm)
        radius = float("inf")
        if isinstance(settings, GRACESettings):
            radius = _best_radius(points)
            settings = dataclasses.replace(settings, epsilon=radius)
        figures = _figures(points, radius)
        tried.append((_score(figures), settings, figures, time.perf_counter() - began))
    score, settings, figures, seconds = max(tried, key=lambda row: row[0])
    return {
        "settings": dataclasses.asdict(settings), "figures": figures, "score": score,
        "seconds_per_fact": round(seconds / len(samples), 3),
        "scores_of_candidates": [round(row[0], 2) for row in tried],
    }  # fmt: skip


def tuning_samples(count: int, seed: int = 778) -> list[EditSample]:
    """Edits of training entities that the adapters are not trained on, half of an unseen world."""
    chosen = []
    for world, share in ((World(0), (count + 1) // 2), (World(STRANGE_WORLDS), count // 2)):
        held_out = held_out_entities(world)
        drawn = edit_samples(world, "train", 12 * count, seed)
        chosen += [sample for sample in drawn if sample.entity in held_out][:share]
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the editors' weights")
    parser.add_argument("--vlm", type=Path, help="folder of the embedded model; the shipped one if not given")
    parser.add_argument("--facts", type=int, default=FACTS, help="training facts to choose by")
    given = parser.parse_args(arguments)
    samples = tuning_samples(given.facts)
    report = {name: tune(name, samples, given.vlm) for name in CANDIDATES}
    report["training_facts"] = len(samples)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / FILE).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
