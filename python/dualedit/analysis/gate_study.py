"""What a gate sees: how near related, hard and unrelated questions lie to an edit, by key and layer.

DualEdit (COLM 2025), Figure 4. Keys of an edit's own question are compared with those of other questions:
by the state of the last prompt token (the paper's key), the mean text token, the mean image token, and a
pooled key that has not been fitted, all behind a decoder layer; and by what BalancEdit's codebook would
compare, the inputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import EditSample, Probe
from ..evaluation import wilson
from ..evaluation.asking import more_probes_of
from ..models.architectures import find_decoder_layers, unwrap
from ..models.prompting import Prompter
from ..requests import black, brighter
from ..runtime.sequence import mean_state
from .asking_layers import Questions, first_of, questions_from
from .gate import GROUPS

KEYS = ("last", "text", "image", "pooled")  # by cosine, of the states behind a layer
LINEAR_KEYS = ("last", "mean")  # by L2, of the inputs of a linear layer
_EACH = 2  # probes of a metric at most
_IMAGE_WEIGHT = 3.0  # of an unfitted pooled key: how often the pictures' cosine counts that of the questions
RELATIONS = ("related", "hard", "unrelated")


def probes_around(sample: EditSample) -> list[tuple[str, Probe]]:
    """The edited question first ("edit"), then questions by relation, and BalancEdit's "near" and "far"
    samples.

    Wordings that an editor may use while editing are its near samples; its far one is the question about
    black.
    """
    request = sample.request
    found = [("edit", Probe(request.image_source, request.prompt))]
    probes = {**sample.generality, **sample.locality}
    for name, probe in more_probes_of(sample):
        probes.setdefault(name, []).append(probe)
    for relation in RELATIONS:
        for name in GROUPS[relation]:
            found += [(relation, probe) for probe in probes.get(name, [])[:_EACH]]
    image = request.image
    wordings = sample.rephrases[:_EACH] or [f"Question: {request.prompt}"]
    found += [("near", Probe(request.image_source, wording)) for wording in wordings]
    if image is not None:
        if not sample.rephrases:
            found.append(("near", Probe(brighter(image), request.prompt)))
        found.append(("far", Probe(black(image), request.prompt)))
    return found


@torch.no_grad()
def read_distances(
    model: nn.Module, questions: Questions, layers: Sequence[int], linear: str | None = None
) -> dict[str, list[list[float]]]:
    """Distances of every row's keys to those of the first row.

    Args:
        model: a Hugging Face model.
        questions: the first row is the edit.
        layers: numbers of the layers that are looked at.
        linear: name of a linear layer inside a decoder layer ("mlp.up_proj"), or None.

    Returns:
        "cosine/KEY" (1 - cosine) and "l2/KEY" to a list a layer, a distance a row. NaN without such tokens.
    """
    model = unwrap(model)
    stack = find_decoder_layers(model)[1]
    behind: dict[int, Tensor] = {}
    inside: dict[int, Tensor] = {}
    entering: list[Tensor] = []
    rows, length = questions.prompt.text.shape

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        entering.append(states)

    with ExitStack() as hooks:
        hooks.callback(stack[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        for number in layers:

            def look(module: nn.Module, args: tuple, output: Any, number: int = number) -> None:
                behind[number] = first_of(output)

            hooks.callback(stack[number].register_forward_hook(look).remove)
            part = None if linear is None else _submodule(stack[number], linear)
            if part is not None:

                def look_inside(module: nn.Module, args: tuple, number: int = number) -> None:
                    given = args[0]
                    given = given.view(rows, length, -1) if given.ndim == 2 else given
                    inside[number] = given

                hooks.callback(part.register_forward_pre_hook(look_inside).remove)
        model(**questions.inputs, use_cache=False)
    prompt, found = questions.prompt, {f"cosine/{key}": [] for key in KEYS}
    found |= {f"l2/{key}": [] for key in LINEAR_KEYS}
    image = questions.positions("image")
    shown = image.any(1)
    picture = mean_state(entering[0], image)
    numbers = torch.arange(rows)
    for number in layers:
        states = behind[number]
        last = states[numbers, prompt.last.to(numbers.device)]
        found["cosine/last"].append(_apart(last))
        found["cosine/text"].append(_apart(mean_state(states, prompt.text)))
        found["cosine/image"].append(_apart(mean_state(states, image), shown))
        found["cosine/pooled"].append(_apart(_pooled(last, picture, shown)))
        if number in inside:
            given = inside[number]
            found["l2/last"].append(_far(given[numbers, prompt.last.to(numbers.device)]))
            found["l2/mean"].append(_far(mean_state(given, prompt.prompt())))
        else:
            found["l2/last"].append([math.nan] * rows)
            found["l2/mean"].append([math.nan] * rows)
    return found


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _apart(keys: Tensor, there: Tensor | None = None) -> list[float]:
    unit = nn.functional.normalize(keys.double(), dim=-1)
    found = 1 - unit @ unit[0]
    if there is not None:
        found = torch.where(there & there[0], found, torch.nan)
    return [float(v) for v in found]


def _far(keys: Tensor) -> list[float]:
    return [float(v) for v in (keys.double() - keys[0].double()).norm(dim=-1)]


def _pooled(last: Tensor, picture: Tensor, shown: Tensor) -> Tensor:
    """`PooledKey` with maps that keep every cosine: last token and mean image token as it enters."""
    question = nn.functional.normalize(last.float(), dim=-1)
    picture = nn.functional.normalize(picture.float(), dim=-1) * shown[:, None].to(picture)
    return torch.cat([question, _IMAGE_WEIGHT**0.5 * picture], dim=-1)


def study_sample(
    model: nn.Module, prompter: Prompter, sample: EditSample, layers: Sequence[int], linear: str | None
) -> dict[str, Any]:
    """One fact's distances: {"relations": R names, KEY: R distances for each layer}; not the edit's own."""
    asked = probes_around(sample)
    inputs = prompter.inputs([(probe.image, probe.prompt) for _, probe in asked])
    found = read_distances(model, questions_from(model, inputs), layers, linear)
    told: dict[str, Any] = {"relations": [relation for relation, _ in asked[1:]]}
    for key, rows in found.items():
        told[key] = [[None if math.isnan(v) else round(v, 7) for v in row[1:]] for row in rows]
    return told


# ---------------------------------------------------------------------- what follows from the distances


@dataclass(frozen=True)
class Reached:
    """Questions of all facts by one key at one layer.

    Attributes:
        ratio: [Q] distances (cosine keys), or distances where the edit's radius is known.
        relation: [Q] index into `RELATIONS`; fact: [Q] number of the fact.
    """

    ratio: np.ndarray
    relation: np.ndarray
    fact: np.ndarray


def reached(units: Sequence[Mapping[str, Any]], key: str, place: int) -> Reached:
    """All facts' distances by a key at the layer at a place of those studied."""
    rows = [
        (unit[key][place][i], RELATIONS.index(relation), number)
        for number, unit in enumerate(units)
        for i, relation in enumerate(unit["relations"])
        if relation in RELATIONS and unit[key][place][i] is not None
    ]
    table = np.array(rows, dtype=float).reshape(-1, 3)
    return Reached(table[:, 0], table[:, 1].astype(int), table[:, 2].astype(int))


def area(found: Reached, against: Sequence[str]) -> float:
    """The area under the ROC curve: how often a related question is nearer than one of others (ties:
    half)."""
    near = found.ratio[found.relation == 0]
    far = found.ratio[np.isin(found.relation, [RELATIONS.index(name) for name in against])]
    if not len(near) or not len(far):
        return math.nan
    order = np.sort(far)
    below, up_to = np.searchsorted(order, near, "left"), np.searchsorted(order, near, "right")
    return float(1 - ((below + up_to) / 2).mean() / len(far))


def roc(found: Reached, points: int = 60) -> list[list[float]]:
    """[share of the others let in, share of the related let in] for rising radii."""
    others = found.relation != 0
    if not others.any() or others.all():
        return []
    radii = np.quantile(found.ratio, np.linspace(0, 1, points))
    return [
        [
            round(float((found.ratio[others] <= r).mean()), 5),
            round(float((found.ratio[~others] <= r).mean()), 5),
        ]
        for r in radii
    ]


def best_radius(found: Reached) -> tuple[float, float]:
    """The radius with the highest balanced accuracy, and that: half related let in, half others kept out.

    Hard and unrelated questions count the same, however many there are. Of equals the middle is taken.
    """
    values = np.unique(found.ratio)
    if len(values) == 0:
        return math.nan, math.nan
    radii = np.concatenate([[values[0] / 2], (values[1:] + values[:-1]) / 2, [values[-1] * 1.01]])
    scores = np.array([balanced(rates(found, r)) for r in radii])
    good = np.flatnonzero(scores >= scores.max() - 1e-9)
    place = int(good[len(good) // 2])
    return float(radii[place]), float(scores[place])


def rates(found: Reached, radius: float) -> dict[str, float]:
    """Share of related questions let in, and of hard and of unrelated ones kept out; NaN where there are
    none."""
    told = {}
    for number, name in enumerate(RELATIONS):
        own = found.ratio[found.relation == number]
        inside = float((own <= radius).mean()) if len(own) else math.nan
        told[name] = inside if number == 0 else 1 - inside
    return told


def balanced(found: Mapping[str, float]) -> float:
    """Mean of what is let in rightly and of what is kept out rightly."""
    out = [found[name] for name in RELATIONS[1:] if not math.isnan(found[name])]
    parts = [
        part for part in (found["related"], sum(out) / len(out) if out else math.nan) if not math.isnan(part)
    ]
    return sum(parts) / len(parts) if parts else math.nan


def crossed(found: Reached) -> dict[str, float]:
    """The rates that a radius has on facts that it was not chosen on: chosen on one half, measured on the
    other."""
    told: dict[str, list[tuple[float, int]]] = {name: [] for name in RELATIONS}
    for half in (0, 1):
        here = found.fact % 2 == half
        chosen, other = (Reached(found.ratio[m], found.relation[m], found.fact[m]) for m in (here, ~here))
        radius = best_radius(chosen)[0]
        if math.isnan(radius):
            continue
        for name, value in rates(other, radius).items():
            if not math.isnan(value):
                told[name].append((value, int((other.relation == RELATIONS.index(name)).sum())))
    return {
        name: sum(v * n for v, n in parts) / sum(n for _, n in parts) if parts else math.nan
        for name, parts in told.items()
    }


def gate_summary(
    units: Sequence[Mapping[str, Any]], layers: Sequence[int], keys: Sequence[str]
) -> dict[str, dict[str, list]]:
    """For every key and studied layer: areas under the ROC, the best radius and what it lets in and keeps
    out.

    "related", "hard" and "unrelated" are rates that are right, on facts that the radius was not chosen on.
    """
    told: dict[str, dict[str, list]] = {}
    for key in keys:
        rows = [_one(reached(units, key, place)) for place in range(len(layers))]
        told[key] = {name: [row[name] for row in rows] for name in rows[0]}
    return told


def _one(found: Reached) -> dict[str, float | None]:
    told = crossed(found)
    row = {
        "auc": area(found, ("hard", "unrelated")), "auc_hard": area(found, ("hard",)),
        "auc_unrelated": area(found, ("unrelated",)), "radius": best_radius(found)[0],
        **told, "balanced": balanced(told),
    }  # fmt: skip
    return {name: None if math.isnan(value) else round(value, 5) for name, value in row.items()}


def with_intervals(found: Mapping[str, float], facts: int) -> dict[str, list[float]]:
    """Rates with Wilson's 95 % interval, [rate, low, high] in per cent, as if every fact asked one question:
    a fact's questions are not independent."""
    return {
        name: [100 * value, *wilson(100 * value, facts)]
        for name, value in found.items()
        if name in RELATIONS and value is not None and not math.isnan(value)
    }


def histogram(found: Reached, bins: int = 40) -> dict[str, Any]:
    """Shares of questions by distance, in bins that all relations share."""
    if not len(found.ratio):
        return {"edges": [], **{name: [] for name in RELATIONS}}
    edges = np.linspace(0, float(np.quantile(found.ratio, 0.99)) or 1.0, bins + 1)
    told: dict[str, Any] = {"edges": [round(float(e), 6) for e in edges]}
    for number, name in enumerate(RELATIONS):
        own = np.clip(found.ratio[found.relation == number], edges[0], edges[-1])
        counts = np.histogram(own, edges)[0]
        told[name] = [round(float(c) / max(1, len(own)), 5) for c in counts]
    return told


def own_radii(units: Sequence[Mapping[str, Any]], key: str, place: int, alpha: float) -> Reached:
    """Distances in radii of the edit's own, alpha * d(near) + (1 - alpha) * d(far) (BalancEdit, Eq. 10)."""
    rows = []
    for number, unit in enumerate(units):
        by = {name: [] for name in ("near", "far")}
        for relation, value in zip(unit["relations"], unit[key][place], strict=True):
            if relation in by and value is not None:
                by[relation].append(value)
        if not by["near"] or not by["far"]:
            continue
        near, far = max(by["near"]), min(by["far"])
        radius = min(alpha * near + (1 - alpha) * far, far * (1 - 1e-4))
        rows += [
            (value / max(radius, 1e-12), RELATIONS.index(relation), number)
            for relation, value in zip(unit["relations"], unit[key][place], strict=True)
            if relation in RELATIONS and value is not None
        ]
    table = np.array(rows, dtype=float).reshape(-1, 3)
    return Reached(table[:, 0], table[:, 1].astype(int), table[:, 2].astype(int))


def best_alpha(units: Sequence[Mapping[str, Any]], key: str, place: int) -> tuple[float, dict[str, float]]:
    """The alpha with the highest balanced accuracy, and the rates that alphas chosen on the other facts
    have."""
    alphas = [i / 20 for i in range(21)]
    tables = [own_radii(units, key, place, alpha) for alpha in alphas]
    if not len(tables[0].ratio):
        return math.nan, {name: math.nan for name in RELATIONS}

    def chosen(mask_of) -> int:
        scores = [balanced(rates(_part(table, mask_of(table)), 1.0)) for table in tables]
        good = [i for i, score in enumerate(scores) if score >= max(scores) - 1e-9]
        return good[len(good) // 2]

    parts: dict[str, list[float]] = {name: [] for name in RELATIONS}
    for half in (0, 1):
        table = tables[chosen(lambda t, half=half: t.fact % 2 == half)]
        for name, value in rates(_part(table, table.fact % 2 != half), 1.0).items():
            if not math.isnan(value):
                parts[name].append(value)
    told = {name: sum(values) / len(values) if values else math.nan for name, values in parts.items()}
    return alphas[chosen(lambda t: t.fact >= 0)], told


def _part(found: Reached, mask: np.ndarray) -> Reached:
    return Reached(found.ratio[mask], found.relation[mask], found.fact[mask])
