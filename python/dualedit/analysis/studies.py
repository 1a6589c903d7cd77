"""All studies of a model in one go, piece by piece, so that a stopped run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from ..data import EditSample
from ..datasets.build import Answerer
from ..models import architectures
from ..models.prompting import Prompter
from ..training.recipe import Recipe
from . import gate_study, layer_grid, modality_attention, sensitivity, trained_pairs
from .asking_layers import LayerStates, Questions, counted, layers_to_study, linear_of, questions_from
from .recommendation import against_the_proxy, recommend_balancedit, recommend_dualedit, sensitivity_peaks
from .study_journal import StudyJournal

VERSION = 1
_HEAT_MAPS = 4  # layers whose attention is drawn over pictures: those that look at the image most
_COSINE = tuple(f"cosine/{key}" for key in gate_study.KEYS)
_ALL_KEYS = (*_COSINE, *(f"l2/{key}" for key in gate_study.LINEAR_KEYS))


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        questions: for attention and noise; facts: for the gate; writes: for the effects of writes.
        batch: questions that run together.
        most_layers: decoder layers that are looked at, evenly spaced; attention is read of all.
        sigmas: sizes of the noise.
        pairs: pairs of layers whose adapters are trained (0: none), and singles beside the best of them.
        exhaustive: train every pair of `grid_layers` instead of the best by the proxy.
        grid_layers: layers that pairs are made of, or None for those studied.
        recipe: of the training; layers are filled in.
        training, held_out: facts that adapters are trained and measured on.
        seed: of the noise.
        heat_maps: pictures that attention is drawn over.
    """

    questions: int = 8
    facts: int = 24
    writes: int = 5
    batch: int = 4
    most_layers: int = 10
    sigmas: tuple[float, ...] = (0.5, 1.0, 2.0)
    pairs: int = 0
    exhaustive: bool = False
    grid_layers: tuple[int, ...] | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(
        mid_dim=128, num_heads=4, copying=2000, steps=150, batch_size=16, learning_rate=2e-3, warmup=10,
        grad_clip=1.0,
        beta2=0.98, precision="fp32", text_generality=0.0, image_generality=0.0, text_locality=0.0,
        image_locality=0.0,
    ))  # fmt: skip
    training: int = 0
    held_out: int = 12
    seed: int = 0
    heat_maps: int = 2


class Studies:
    """The studies of one model on some facts.

    Args:
        model: a Hugging Face vision-language model without editors.
        processor: of the model.
        samples: facts to choose by, not those of a test; all studies begin with the first.
        plan: how much is measured.
        journal: keeps the pieces.
        training: facts that adapters are trained on, apart from `samples`; may be empty.
        held_out: facts that they are measured on; `samples` if empty.
        progress: show bars.
        template: of prompts, for models without a chat template.

    Raises:
        ValueError: no samples, or a model that cannot be edited.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        samples: Sequence[EditSample],
        plan: Plan,
        journal: StudyJournal,
        training: Sequence[EditSample] = (),
        held_out: Sequence[EditSample] = (),
        progress: bool = True,
        template: str | None = None,
    ):
        if not samples:
            raise ValueError("samples is empty: there is nothing to analyse the model by.")
        self.model, self.processor, self.samples = model, processor, samples
        self.plan, self.journal, self.progress = plan, journal, progress
        self.training, self.held_out = training, held_out or samples
        self.prompter, self.template = Prompter(processor, template), template
        path, stack = architectures.find_decoder_layers(model)
        self.depth = len(stack)
        self.layers = layers_to_study(self.depth, plan.most_layers)
        self.linear, self.linear_names = linear_of(model, path)
        model.eval().requires_grad_(False)
        self._resumes: bool | None = None  # whether layers run on their own, once a batch has told
        self.image = True
        try:
            architectures.check_image_positions(model, None, 0)
        except ValueError:
            self.image = False
        self.image = self.image and any(s.request.image_source is not None for s in samples)

    def run(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        began = time.monotonic()
        told: dict[str, Any] = {
            "version": VERSION,
            "model": {"type": self.model.config.model_type, "decoder_layers": self.depth,
                      "hidden_size": architectures.hidden_size(self.model)},
            "layers": self.layers,
            "attention": self.attention(),
            "sensitivity": self.sensitivity(),
            "gate": self.gate(),
            "layer_grid": self.layer_grid(),
        }  # fmt: skip
        told |= self.recommendation(told)
        told["seconds"] = round(time.monotonic() - began, 1)
        return told

    # ------------------------------------------------------------------ studies

    def attention(self) -> dict[str, Any]:
        """Mean shares by layer with standard errors, and heat maps of the first pictures."""
        rows: list[list[dict[str, float]]] = [[] for _ in range(self.depth)]
        maps: list[dict[str, Any]] = []
        for number, samples in self._batches("attention", self.plan.questions):
            found = self.journal.get(
                "attention", str(number), lambda s=samples, n=number: self._attention(s, n)
            )
            for layer, each in enumerate(found["shares"]):
                rows[layer] += each or []
            maps += found["maps"]
        names = ("text", "image", "first", "text_token", "image_token", "top_image_tokens")
        told = {name: [_mean([row[name] for row in layer]) for layer in rows] for name in names}
        told["stderr"] = {name: [_error([row[name] for row in layer]) for layer in rows] for name in names}
        return {"questions": len(rows[0]), **told, "heat_maps": maps}

    def _attention(self, samples: Sequence[EditSample], number: int) -> dict[str, Any]:
        asked = self._asked(samples)
        found = modality_attention.read_attention(self.model, asked)
        shares = [None if a is None else modality_attention.shares(a, asked) for a in found]
        maps = []
        if number == 0:
            looked = {
                layer: sum(told["image"] for told in each)
                for layer, each in enumerate(shares)
                if each is not None and not any(math.isnan(told["image"]) for told in each)
            }
            chosen = sorted(sorted(looked, key=looked.__getitem__)[-_HEAT_MAPS:])
            for row, sample in enumerate(samples[: self.plan.heat_maps]):
                image = sample.request.image
                if image is None:
                    continue
                for layer in chosen:
                    grid = modality_attention.heat_map(found[layer], asked, row, image.width / image.height)
                    if grid is not None:
                        maps.append({"sample": row, "layer": layer, "grid": grid})
        return {"shares": shares, "maps": maps}

    def sensitivity(self) -> dict[str, Any]:
        """Mean KL by group, layer and sigma, the layers where it peaks, and the layer runs that it took."""
        units: list[dict[str, list]] = []
        runs = plain = 0
        resumed = True
        for number, samples in self._batches("noise", self.plan.questions):
            found = self.journal.get("noise", str(number), lambda s=samples, n=number: self._noise(s, n))
            units += found["questions"]
            runs, plain, resumed = runs + found["runs"], plain + found["plain"], resumed and found["resumed"]
        told: dict[str, Any] = {"questions": len(units), "sigmas": list(self.plan.sigmas)}
        for group in ("text", "image", "all"):
            table = np.array([unit[group] for unit in units], dtype=float)  # [questions, layers, sigmas]
            with_some = table[np.isfinite(table).all((1, 2))]
            told[group] = [[_mean(cell) for cell in layer] for layer in with_some.transpose(1, 2, 0)]
            told[f"{group}_stderr"] = [
                [_error(cell) for cell in layer] for layer in with_some.transpose(1, 2, 0)
            ]
        told |= {"layer_runs": runs, "layer_runs_of_a_plain_way": plain, "resumed": resumed}
        told["peaks"] = [
            {"sigma": sigma, **sensitivity_peaks(units, self.layers, place)}
            for place, sigma in enumerate(self.plan.sigmas)
        ]
        return told

    def _noise(self, samples: Sequence[EditSample], number: int) -> dict[str, Any]:
        asked = self._asked(samples)
        with counted(self.model) as runs:
            known = LayerStates(self.model, asked, self._resumes)
            self._resumes = known.resumed
            found = [
                sensitivity.sensitivity_at(known, layer, self.plan.seed, number, self.plan.sigmas)
                for layer in self.layers
            ]
        groups = found[0]
        return {
            "questions": [
                {
                    g: [[_short(row[g][s][q]) for s in range(len(self.plan.sigmas))] for row in found]
                    for g in groups
                }
                for q in range(asked.size)
            ],
            "runs": runs[0],
            "plain": sensitivity.runs_of_a_plain_way(
                self.depth, len(self.layers), len(groups) * len(self.plan.sigmas)
            ),
            "resumed": known.resumed,
        }

    def gate(self) -> dict[str, Any]:
        """Areas under the ROC and rates by key and layer; histograms and ROC of every key at its best
        layer."""
        units = self._gate_units()
        told: dict[str, Any] = {"facts": len(units), "linear": self.linear}
        told["keys"] = gate_study.gate_summary(units, self.layers, _ALL_KEYS)
        drawn = {}
        for key, rows in told["keys"].items():
            scores = [-1.0 if value is None else value for value in rows["balanced"]]
            place = scores.index(max(scores))
            found = gate_study.reached(units, key, place)
            if len(found.ratio):
                drawn[key] = {
                    "layer": self.layers[place], "radius": rows["radius"][place],
                    "histogram": gate_study.histogram(found), "roc": gate_study.roc(found),
                }  # fmt: skip
        return told | {"drawn": drawn}

    def _gate_units(self) -> list[dict[str, Any]]:
        return [
            self.journal.get(
                "gate", str(n),
                lambda s=sample: gate_study.study_sample(
                    self.model, self.prompter, s, self.layers, self.linear
                ),
            )
            for n, sample in self._each("gate", self.plan.facts)
        ]  # fmt: skip

    def layer_grid(self) -> dict[str, Any]:
        """Effects of writes, the proxy of every pair, and what trained pairs reach."""
        units = [
            self.journal.get(
                "writes", str(n),
                lambda s=sample: layer_grid.study_sample(self.model, self.prompter, s, self.layers),
            )
            for n, sample in self._each("writes", self.plan.writes)
        ]  # fmt: skip
        effects = layer_grid.effect_summary(units)
        gates = gate_study.gate_summary(self._gate_units(), self.layers, ["cosine/last"])["cosine/last"]
        pairs = layer_grid.proxy_of_pairs(effects, gates["balanced"], self.layers, self.image)
        trained = self._trained(pairs) if self.training and (self.plan.pairs or self.plan.exhaustive) else []
        told = {"facts": len(units), "sizes": list(layer_grid.SIZES), "effects": effects, "pairs": pairs}
        return told | {"trained": trained, "agreement": against_the_proxy(pairs, trained)}

    def _trained(self, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        wanted = [(row["text_layer"], row["vis_layer"]) for row in self._chosen(pairs)]
        if self.image and wanted:
            text, vision = wanted[0]
            wanted += [(text, None), (None, vision)]
        training, held_out = self._with_answers()
        told = []
        for text, vision in tqdm(wanted, desc="training adapters", unit="pair", disable=not self.progress):
            name = f"{text},{vision}"

            def measure(text=text, vision=vision) -> dict[str, Any]:
                recipe = replace(self.plan.recipe, text_layer=text, vis_layer=vision)
                return trained_pairs.train_pair(self.model, self.processor, training(), held_out(), recipe)

            unit = self.journal.get("trained", name, measure)
            told.append(
                {"text_layer": text, "vis_layer": vision, "steps": unit["steps"],
                 **trained_pairs.pair_summary(unit), "open": _percent(unit["open"])}
            )  # fmt: skip
        return told

    def _chosen(self, pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The pairs whose adapters are trained: all of the grid, or the best by the proxy and as many spread
        over the others, so that the proxy can be wrong."""
        grid = set(self.plan.grid_layers or self.layers)
        there = [r for r in pairs if r["text_layer"] in grid and (not self.image or r["vis_layer"] in grid)]
        if self.plan.exhaustive or self.plan.pairs >= len(there):
            return there
        best = there[: -(-self.plan.pairs // 2)]
        rest = there[len(best) :]
        count = self.plan.pairs - len(best)
        return best + [rest[(i + 1) * len(rest) // (count + 1)] for i in range(count)]

    def _with_answers(self) -> tuple[Callable[[], list[EditSample]], Callable[[], list[EditSample]]]:
        """Training and held-out facts with answers to what must stay, made when they are first needed."""
        made: dict[str, list[EditSample]] = {}

        def get(name: str) -> list[EditSample]:
            if name not in made:
                locality = any(
                    getattr(self.plan.recipe, f"{term}_locality") for term in ("text", "image", "hard")
                )
                own = (
                    self.training[: self.plan.training]
                    if name == "training"
                    else self.held_out[: self.plan.held_out]
                )
                if name == "training" and not locality:
                    made[name] = list(own)
                else:
                    made[name] = trained_pairs.with_model_answers(
                        Answerer(self.model, self.processor, self.template, new_tokens=6), own
                    )
            return made[name]

        return lambda: get("training"), lambda: get("held out")

    def recommendation(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What to begin with, for both methods."""
        units, grid = self._gate_units(), told["layer_grid"]
        return {
            "recommendation": {
                "dualedit": recommend_dualedit(grid["pairs"], grid["trained"], units, self.layers),
                "balancedit": recommend_balancedit(grid["effects"], units, self.layers, self.linear_names),
            }
        }

    # ------------------------------------------------------------------ pieces

    def _asked(self, samples: Sequence[EditSample]) -> Questions:
        questions = [(sample.request.image, sample.request.prompt) for sample in samples]
        return questions_from(self.model, self.prompter.inputs(questions))

    def _batches(self, study: str, count: int) -> Iterator[tuple[int, Sequence[EditSample]]]:
        samples, size = self.samples[:count], self.plan.batch
        starts = range(0, len(samples), size)
        for number, start in enumerate(tqdm(starts, desc=study, unit="batch", disable=not self.progress)):
            yield number, samples[start : start + size]

    def _each(self, study: str, count: int) -> Iterator[tuple[int, EditSample]]:
        count = min(count, len(self.samples))
        quiet = not self.progress or all(self.journal.knows(study, str(n)) for n in range(count))
        for number in tqdm(range(count), desc=study, unit="fact", disable=quiet):
            yield number, self.samples[number]


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None and not math.isnan(v)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return _short(sum(known) / len(known)) if known else None


def _error(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return _short(float(np.std(known, ddof=1)) / len(known) ** 0.5) if len(known) > 1 else None


def _percent(values: Sequence[float | None]) -> float | None:
    mean = _mean(values)
    return None if mean is None else round(100 * mean, 2)


def _short(value: float) -> float:
    return float(f"{value:.6g}")
