"""Choose the baselines' settings for the embedded model, on training facts that no adapter was trained on:
half of them of the model's own world, half of one that it has never seen, as for the editors' thresholds.

    python -m recipes.toy.tune_baselines --out DIR --work DIR [--only mend,tp]

writes DIR/baselines.json: settings, seconds and figures of every baseline that has something to choose, and
the score of every candidate. It is written after each method; what stands in it already is left alone unless
it is named by --only. Networks are those that `train_baselines` left in the folder of --work; the best one is
copied to DIR/<method>. One edit at a time; what is maximised is what calibration maximises for the library's
own editors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualedit.baselines import (
    FITTED,
    FineTuneSettings,
    GRACESettings,
    LoRASettings,
    RetrievalSettings,
    Settings,
    TPatcherSettings,
    TrainingSettings,
    WISESettings,
    fit_baseline,
    open_baseline,
)
from dualedit.data import EditSample
from dualedit.evaluation.metrics import exact_match, figures_of
from dualedit.evaluation.single import probes_of
from dualedit.toy.baselines import FILE, NOTED
from dualedit.toy.editors import EDITORS
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training.calibration import objective
from tqdm.auto import tqdm

from .train_baselines import BATCH, NETWORKS, RATES, SEED, noted_folder, run_folder
from .train_editors import STRANGE_WORLDS, FreshEdits, held_out_entities

FACTS = 36
NOTED_EDITS = 64  # training edits of which T-Patcher and WISE note what their layer is given
_LAYERS = "language_model.layers"
WIDE = 1e9  # a radius that is chosen afterwards: measured with it open to everything
CANDIDATES: dict[str, tuple[Settings, ...]] = {
    "ft-l": tuple(FineTuneSettings(learning_rate=rate, max_steps=50) for rate in (1e-3, 3e-3, 1e-2)),
    "ft-v": tuple(FineTuneSettings(learning_rate=rate, max_steps=50) for rate in (1e-4, 3e-4, 1e-3)),
    "lora": tuple(LoRASettings(learning_rate=rate, max_steps=50) for rate in (5e-4, 1e-3, 2e-3)),
    # One radius for every key, chosen for each layer.
    "grace": tuple(GRACESettings(learning_rate=1.0, layer=layer, epsilon=WIDE) for layer in (2, 3, 4)),
    "retrieval": (
        RetrievalSettings(adapter=EDITORS / "balancedit", radius=WIDE, **NOTED),
        RetrievalSettings(layer=5, radius=WIDE, **NOTED),
    ),
    "tp": tuple(
        TPatcherSettings(learning_rate=1e-2, memory_weight=weight, max_steps=50) for weight in (0.1, 1.0)
    ),
    "wise": tuple(
        WISESettings(
            learning_rate=1e-2, max_steps=40, routed_by="last", module=f"{_LAYERS}.{layer}.mlp.down_proj"
        )
        for layer in (4, 6)
    ),
}  # fmt: skip
_RADIUS = {"grace": "epsilon", "retrieval": "radius", "lte": "radius"}


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


def candidates_of(name: str, work: Path, vlm: Path | None) -> list[Settings]:
    """What is tried of a baseline; fitted ones with their networks in place."""
    if name in NETWORKS:
        folders = [run_folder(work, name, rate) for rate in RATES]
        there = [folder for folder in folders if (folder / "network.safetensors").is_file()]
        if not there:
            raise SystemExit(f"{work} holds no trained {name}: run recipes.toy.train_baselines first")
        radius = {_RADIUS[name]: WIDE} if name in _RADIUS else {}
        return [dataclasses.replace(NETWORKS[name], network=folder, **radius) for folder in there]
    found = []
    for settings in CANDIDATES[name]:
        if name in FITTED:
            folder = noted_folder(work, settings)
            samples = FreshEdits(World(0), NOTED_EDITS, SEED)
            training = TrainingSettings(steps=0, batch_size=BATCH)
            fit_baseline(name, *load_embedded(vlm), samples, folder, settings, training, half=True)
            settings = dataclasses.replace(settings, network=folder)
        found.append(settings)
    return found


def tune(
    name: str, candidates: Sequence[Settings], samples: Sequence[EditSample], vlm: Path | None = None
) -> tuple[dict, Settings]:
    """What `baselines.json` holds of one baseline, and the best of its candidates."""
    tried = []
    for settings in candidates:
        began = time.perf_counter()
        points = _answered(name, settings, samples, vlm)
        radius = float("inf")
        if name in _RADIUS:
            radius = _best_radius(points)
            settings = dataclasses.replace(settings, **{_RADIUS[name]: radius})
        figures = _figures(points, radius)
        tried.append((_score(figures), settings, figures, time.perf_counter() - began))
    score, settings, figures, seconds = max(tried, key=lambda row: row[0])
    return {
        "settings": _told(settings), "figures": figures, "score": score,
        "training_facts": len(samples), "seconds_per_fact": round(seconds / len(samples), 3),
        "scores_of_candidates": [round(row[0], 2) for row in tried],
        "candidates": [_candidate(row[1]) for row in tried],
    }, settings  # fmt: skip


def _told(settings: Settings) -> dict[str, Any]:
    """Settings as baselines.json holds them: a network lies beside it, an adapter is named."""
    told = {key: value for key, value in dataclasses.asdict(settings).items() if key != "network"}
    if told.get("adapter") is not None:
        told["adapter"] = Path(told["adapter"]).name
    return told


def _candidate(settings: Settings) -> dict[str, Any]:
    told = _told(settings)
    folder = getattr(settings, "network", None)
    if folder is not None:
        report = json.loads((Path(folder) / "network.json").read_text())
        told |= {key: report[key] for key in ("training", "facts", "seconds")}
    return told


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
    parser.add_argument("--work", type=Path, required=True, help="folder of train_baselines")
    parser.add_argument("--vlm", type=Path, help="folder of the embedded model; the shipped one if not given")
    parser.add_argument("--facts", type=int, default=FACTS, help="training facts to choose by")
    parser.add_argument("--only", help="methods to tune, again if need be")
    given = parser.parse_args(arguments)
    file = given.out / FILE
    given.out.mkdir(parents=True, exist_ok=True)
    report: Mapping[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    names = given.only.split(",") if given.only else [n for n in (*CANDIDATES, *NETWORKS) if n not in report]
    samples = tuning_samples(given.facts)
    for name in names:
        found, best = tune(name, candidates_of(name, given.work, given.vlm), samples, given.vlm)
        report = {**report, name: found}
        network = getattr(best, "network", None)
        if network is not None:
            shutil.copytree(network, given.out / name, dirs_exist_ok=True)
        part = file.with_suffix(".tmp")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(file)
        print(name, json.dumps(found["figures"]), flush=True)


if __name__ == "__main__":
    main()
