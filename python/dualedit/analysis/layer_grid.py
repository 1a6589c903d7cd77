"""Which layers an edit should write to, without training: a proxy for every layer and pair of layers.

The proxy of a pair is the sum of two numbers between 0 and 1. *Effect*: a write along the gradient of the new
answer, found on the edit's own question alone, is put behind a layer at all text tokens or all image tokens
of the prompt (for BalancEdit at all tokens, the answer's too), of that question, of a rephrased one and of
one about another picture; how much of the loss of the answer's worst token goes away. *Gate*: the balanced
accuracy of the last token's key at the earlier of the two layers, where the gate decides (`gate_study`).
Source of the question: DualEdit (COLM 2025), Table 1 and Figure 5, which train adapters for each layer;
`trained_pairs` does so for some pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EditSample, Probe
from ..models.prompting import Prompter
from ..training.batches import with_answers
from ..training.losses import IGNORED, answer_positions
from .asking_layers import GROUPS, LayerStates, Questions, questions_from

# Of a write, in root mean squares of the states that it is added to; the one that suits the edit's own
# question better is taken, for early layers bear less than late ones.
SIZES = (0.15, 0.5)


def probes_to_write(sample: EditSample) -> list[Probe]:
    """The edit's own question first, then a rephrased one and one about another picture, where there are
    any."""
    request = sample.request
    found = [Probe(request.image_source, request.prompt, request.target)]
    wordings = [*sample.rephrases[:1], *(probe.prompt for probe in sample.generality.get("t_gen", [])[:1])]
    found += [Probe(request.image_source, wording, request.target) for wording in wordings[:1]]
    others = sample.generality.get("v_gen", [])[-1:]
    return found + [Probe(probe.image_source, request.prompt, request.target) for probe in others]


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each token, [K] in nats, of logits [K, V] in front of tokens [K]."""
    return nn.functional.cross_entropy(logits.float(), tokens, reduction="none")


def worst_loss(logits: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
    """The loss of each answer's worst token, [B] in nats: an answer is right only if all of its tokens are.

    Args:
        row: [K], whose token each is; every row has one.
    """
    lost = token_loss(logits, tokens)
    return torch.stack([lost[row == number].max() for number in range(int(row.max()) + 1)])


@torch.no_grad()
def effects(
    model: nn.Module, questions: Questions, layers: Sequence[int], sizes: Sequence[float] = SIZES
) -> dict[str, list[list[float]]]:
    """How much of the loss of the answers' worst tokens a write found on the first row takes away, at most 1.

    Args:
        questions: the edit's own question first, answers behind (`labels`).
        layers: where to write.
        sizes: of the write, in root mean squares of each state.

    Returns:
        group ("text", "image", "all") to a list a layer, a number a row: 1 - loss after / loss before, at
        least -1; 0 without such tokens.
    """
    known = LayerStates(model, questions)
    at = answer_positions(questions.labels)
    tokens = questions.labels[questions.labels != IGNORED]
    row = at.nonzero()[:, 0]
    before = worst_loss(known.logits(len(known.layers) - 1, known.behind[-1], at), tokens, row)
    slopes = known.gradients(lambda logits: token_loss(logits, tokens)[row == 0].mean(), at)
    told: dict[str, list[list[float]]] = {group: [] for group in GROUPS}
    for layer in layers:
        states = known.behind[layer]
        scale = states.float().square().mean(-1, keepdim=True).sqrt()
        for group in GROUPS:
            where = questions.positions(group)
            if group == "all":  # BalancEdit's value answers for the tokens of the answer, too
                where = where | (questions.labels != IGNORED)
            pull = (slopes[layer][0].float() * scale[0])[where[0]].sum(0)
            length = float(pull.norm())
            if not where.any() or length < 1e-30:
                told[group].append([0.0] * questions.size)
                continue
            write = -pull / length * pull.numel() ** 0.5  # its root mean square is 1
            gains = []
            for size in sizes:
                pushed = states + (size * scale * write).to(states.dtype)
                moved = torch.where(where[..., None], pushed, states)
                after = worst_loss(known.logits(layer, moved, at), tokens, row)
                gains.append((1 - after / before.clamp(min=1e-6)).clamp(min=-1.0))
            best = max(gains, key=lambda gain: float(gain[0]))
            told[group].append([round(float(v), 6) for v in best])
    return told


def study_sample(
    model: nn.Module, prompter: Prompter, sample: EditSample, layers: Sequence[int]
) -> dict[str, list[list[float]]]:
    """One fact's `effects`."""
    inputs = with_answers(prompter, probes_to_write(sample), None)
    return effects(model, questions_from(model, inputs), layers)


def effect_summary(units: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """By group: "own" (the edit's question), "related" (the others), "effect" (mean of all rows) and its
    standard error over facts, a number a layer."""
    told = {}
    for group in GROUPS:
        table = [unit[group] for unit in units]  # [facts][layers][rows]
        own = torch.tensor([[row[0] for row in rows] for rows in table], dtype=torch.float64)
        whole = torch.tensor([[sum(row) / len(row) for row in rows] for rows in table], dtype=torch.float64)
        others = [[sum(row[1:]) / len(row[1:]) for row in rows] for rows in table if len(rows[0]) > 1]
        related = (
            torch.tensor(others, dtype=torch.float64).mean(0) if others else torch.full_like(own[0], math.nan)
        )
        error = whole.std(0) / len(whole) ** 0.5 if len(whole) > 1 else torch.zeros_like(whole[0])
        told[group] = {
            "own": [round(float(v), 5) for v in own.mean(0)],
            "related": [None if math.isnan(v) else round(float(v), 5) for v in related.tolist()],
            "effect": [round(float(v), 5) for v in whole.mean(0)],
            "stderr": [round(float(v), 5) for v in error],
        }
    return told


def proxy_of_pairs(
    summary: Mapping[str, Mapping[str, Sequence[float]]],
    gate: Sequence[float | None],
    layers: Sequence[int],
    image: bool = True,
) -> list[dict[str, Any]]:
    """The proxy of every pair of studied layers, best first.

    Effects of the two writes are taken together as if each took its share of what the other leaves.

    Args:
        summary: of `effect_summary`.
        gate: balanced accuracy of the last token's key at each studied layer; None counts as chance.
        image: whether image tokens can be written to; if not, `vis_layer` is None.
    """
    rows = []
    for i, text in enumerate(layers):
        for j, vision in enumerate(layers if image else [None]):
            first = _share(summary["text"]["effect"][i])
            second = _share(summary["image"]["effect"][j]) if image else 0.0
            decides = min(i, j) if image else i
            accuracy = gate[decides]
            rows.append(
                {
                    "text_layer": text, "vis_layer": vision,
                    "effect": round(1 - (1 - first) * (1 - second), 5),
                    "gate": 0.5 if accuracy is None else accuracy,
                }
            )  # fmt: skip
            rows[-1]["proxy"] = round(rows[-1]["effect"] + rows[-1]["gate"], 5)
    return sorted(rows, key=lambda row: -row["proxy"])


def _share(effect: float) -> float:
    return min(max(effect, 0.0), 1.0)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one side does not vary."""
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (first, second)]
    centred = [r - r.mean() for r in ranks]
    size = centred[0].norm() * centred[1].norm()
    return float(centred[0] @ centred[1] / size) if float(size) > 0 else math.nan


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return (below + (equal - 1) / 2).double()
