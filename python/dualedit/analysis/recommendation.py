"""Which layers, thresholds and linear layer to begin with, and why: from the figures of the studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .gate_study import best_alpha, best_radius, gate_summary, reached, with_intervals
from .layer_grid import rank_correlation

_CLEARLY = 0.02


def recommend_dualedit(
    pairs: Sequence[Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
    gates: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
) -> dict[str, Any]:
    """Arguments of `inject_dualedit`, what to expect of the gate, and reasons.

    Args:
        pairs: of `layer_grid.proxy_of_pairs`, best first.
        trained: of `trained_pairs.pair_summary`, with "text_layer" and "vis_layer"; may be empty.
        gates: of `gate_study.study_sample`, a fact each.
        layers: the studied ones.

    Returns:
        {"arguments", "gate", "reasons"}; without a question that must stay, threshold is left to the default.
    """
    reasons = []
    tried = [row for row in trained if row["score"] is not None and row["text_layer"] is not None]
    tried = [row for row in tried if (row["vis_layer"] is None) == (pairs[0]["vis_layer"] is None)]
    learned = [row for row in tried if (row["reliability"] or 0) > 0]
    if learned:
        best = max(learned, key=lambda row: row["score"])
        reasons.append(
            f"Of {len(tried)} pairs whose adapters were trained briefly, layers {_pair(best)} reach the "
            f"highest mean of what must change and what must stay: {best['score']:.1f} % "
            f"(standard error {best['score_stderr'] or 0:.1f})."
        )
    else:
        best = pairs[0]
        reasons.append(
            f"Layers {_pair(best)} have the highest proxy, {best['proxy']:.2f} of 2"
            + (
                "; the trained adapters learned too little to tell."
                if tried
                else "; no adapters were trained."
            )
        )
    decides = min(n for n in (best["text_layer"], best["vis_layer"]) if n is not None)
    arguments: dict[str, Any] = {"text_layer": best["text_layer"], "vis_layer": best["vis_layer"]}
    gate: dict[str, Any] = {}
    if decides in layers:
        found = reached(gates, "cosine/last", list(layers).index(decides))
        radius = best_radius(found)[0]
        if len(set(found.relation.tolist())) > 1 and np.isfinite(radius):
            arguments["threshold"] = round(1 - min(max(radius, 0.0), 2.0), 4)
            told = gate_summary(gates, layers, ["cosine/last"])["cosine/last"]
            place = list(layers).index(decides)
            rates = {name: told[name][place] for name in ("related", "hard", "unrelated")}
            gate = {"layer": decides, "key": "last", "facts": len(gates), **with_intervals(rates, len(gates))}
            reasons.append(
                f"The gate decides at layer {decides}. A cosine of {arguments['threshold']:.3f} to the "
                f"edit's key parts best what must change from what must stay; {_rates(gate)}."
            )
            reasons += _pooled(gates, layers, place, told["balanced"][place])
    return {"arguments": arguments, "gate": gate, "reasons": reasons}


def _pooled(
    gates: Sequence[Mapping[str, Any]], layers: Sequence[int], place: int, last: float | None
) -> list[str]:
    """A hint where a pooled key parts better, even before it is fitted."""
    if "cosine/pooled" not in gates[0] or last is None:
        return []
    pooled = gate_summary(gates, layers, ["cosine/pooled"])["cosine/pooled"]["balanced"][place]
    if pooled is None or pooled < last + _CLEARLY:
        return []
    return [
        f"A pooled key parts them better there even before it is fitted ({100 * pooled:.0f} % balanced "
        f"accuracy, "
        f"the last token's {100 * last:.0f} %): inject with key='pooled', fit it (training.fit_pooled_key), "
        "and calibrate its threshold."
    ]


def _pair(row: Mapping[str, Any]) -> str:
    return f"{row['text_layer']} (text) and {row['vis_layer']} (image)"


def _rates(gate: Mapping[str, Any]) -> str:
    words = {
        "related": "of related questions {:.0f} % open it ({:.0f} to {:.0f})",
        "hard": "look-alikes and other questions are kept out in {:.0f} % ({:.0f} to {:.0f})",
        "unrelated": "unrelated ones in {:.0f} % ({:.0f} to {:.0f})",
    }
    told = [words[name].format(*gate[name]) for name in words if name in gate]
    return "on facts that it was not chosen on, " + ", ".join(told) if told else "nothing tells how well"


def recommend_balancedit(
    effects: Mapping[str, Mapping[str, Sequence[float]]],
    gates: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Arguments of `inject_balancedit`, what to expect of its radii, and reasons.

    Args:
        effects: of `layer_grid.effect_summary`.
        names: full name of the linear layer that is edited at each layer.

    Returns:
        {"arguments", "gate", "reasons"}; arguments are empty where no layer has such a linear layer.
    """
    rows = []
    for key in ("mean", "last"):
        for place, layer in enumerate(layers):
            if layer not in names:
                continue
            alpha, rates = best_alpha(gates, f"l2/{key}", place)
            known = [rates[name] for name in ("related", "hard", "unrelated") if np.isfinite(rates[name])]
            out = [rates[name] for name in ("hard", "unrelated") if np.isfinite(rates[name])]
            accuracy = (rates["related"] + sum(out) / len(out)) / 2 if out and len(known) > 1 else 0.5
            effect = min(max(effects["all"]["effect"][place], 0.0), 1.0)
            rows.append((accuracy + effect, accuracy, effect, key, layer, alpha, rates))
    if not rows:
        return {
            "arguments": {},
            "gate": {},
            "reasons": ["No decoder layer has a linear layer that can be edited."],
        }
    _, accuracy, effect, key, layer, alpha, rates = max(rows, key=lambda row: row[0])
    arguments: dict[str, Any] = {"layer": names[layer], "key": key}
    gate: dict[str, Any] = {}
    reasons = [
        f"Of the linear layers {names[layer].rpartition('.')[2]}, that of layer {layer} has the highest sum "
        f"of a write's effect ({effect:.2f} of 1) and of its codebook's balanced accuracy ({accuracy:.2f}), "
        f"by the key '{key}'."
    ]
    if np.isfinite(alpha):
        arguments["alpha"] = round(float(alpha), 3)
        gate = {"layer": layer, "key": key, "facts": len(gates), **with_intervals(rates, len(gates))}
        reasons.append(f"alpha {arguments['alpha']:g}: {_rates(gate)}.")
    return {"arguments": arguments, "gate": gate, "reasons": reasons}


def against_the_proxy(
    pairs: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How well the proxy ranks pairs as their trained adapters do; {} with fewer than four pairs of both."""
    proxy = {(row["text_layer"], row["vis_layer"]): row["proxy"] for row in pairs}
    both = [
        (proxy[row["text_layer"], row["vis_layer"]], row["score"])
        for row in trained
        if row["score"] is not None and (row["text_layer"], row["vis_layer"]) in proxy
    ]
    if len(both) < 4:
        return {}
    return {
        "pairs": len(both),
        "rank_correlation": round(rank_correlation(*map(list, zip(*both, strict=True))), 4),
    }


def sensitivity_peaks(
    units: Sequence[Mapping[str, Any]], layers: Sequence[int], sigma: int, seed: int = 0, resamples: int = 500
) -> dict[str, Any]:
    """The layers where noise on text, image or all tokens moves the answer most, and how sure that is.

    Args:
        units: a question each: group to [layers][sigmas] KL.
        sigma: place of the sigma that is looked at.

    Returns:
        {"peak": group to layer, "apart": share of bootstrap resamples of the questions where text and image
        peak at different layers}, without what was not measured.
    """
    table = {
        group: np.array([[row[sigma] for row in unit[group]] for unit in units], dtype=float)
        for group in ("text", "image", "all")
    }
    table = {group: values for group, values in table.items() if np.isfinite(values).all() and values.size}
    told: dict[str, Any] = {"peak": {g: int(layers[int(v.mean(0).argmax())]) for g, v in table.items()}}
    if {"text", "image"} <= set(table):
        draws = np.random.default_rng(seed).integers(len(units), size=(resamples, len(units)))
        text, image = (np.array([table[g][d].mean(0).argmax() for d in draws]) for g in ("text", "image"))
        told["apart"] = round(float((text != image).mean()), 4)
    return told
