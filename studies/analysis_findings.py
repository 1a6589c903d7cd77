"""What `dualedit analyze` found on both models, and which findings of the DualEdit paper hold there.

    dualedit analyze --model toy --grid 0,2,4,6 --json studies/results/analysis-toy.json
    dualedit analyze --model smol --facts 16 --layers 8 --json studies/results/analysis-smol.json
    python -m studies.analysis_findings

prints the tables of docs/analysis.md from these two files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = {"toy": RESULTS / "analysis-toy.json", "smol": RESULTS / "analysis-smol.json"}
_HEARD = 0.1  # of the highest KL: noise behind a layer is heard where its KL is at least this share


def load() -> dict[str, dict[str, Any]]:
    """Both files, by model."""
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in MODELS.items()}


def best(values: Sequence[float | None], layers: Sequence[int]) -> tuple[int, float]:
    """The layer with the highest value, and that."""
    known = [(value, layer) for value, layer in zip(values, layers, strict=True) if value is not None]
    value, layer = max(known)
    return layer, value


def attention(found: Mapping[str, Any], name: str) -> str:
    layer, value = best(found["attention"][name], range(found["model"]["decoder_layers"]))
    return f"{layer} ({100 * value:.0f} %)"


def peaks(found: Mapping[str, Any], group: str) -> str:
    told = found["sensitivity"]
    values = [max(row[place] for row in told[group]) for place in range(len(told["sigmas"]))]
    rows = zip(told["peaks"], values, strict=True)
    return "; ".join(f"{peak['peak'][group]} ({value:.2g})" for peak, value in rows)


def apart(found: Mapping[str, Any]) -> str:
    return "; ".join(f"{100 * peak['apart']:.0f} %" for peak in found["sensitivity"]["peaks"])


def heard_until(found: Mapping[str, Any], group: str) -> str:
    told, place = found["sensitivity"], 1
    rows = [row[place] for row in told[group]]
    return str(max(n for n, v in zip(found["layers"], rows, strict=True) if v >= _HEARD * max(rows)))


def effect(found: Mapping[str, Any], group: str) -> str:
    rows = found["layer_grid"]["effects"][group]
    layer, value = best(rows["effect"], found["layers"])
    error = rows["stderr"][found["layers"].index(layer)]
    return f"{layer} ({value:.2f} ± {error:.2f})"


def thirds(found: Mapping[str, Any], group: str) -> str:
    """Mean effect in the shallow, middle and deep third of the layers that were looked at."""
    values = found["layer_grid"]["effects"][group]["effect"]
    size = len(values) / 3
    parts = [values[round(i * size) : round((i + 1) * size)] for i in range(3)]
    return ", ".join(f"{sum(part) / len(part):.2f}" for part in parts)


def gate(found: Mapping[str, Any]) -> str:
    values = found["gate"]["keys"]["cosine/last"]["balanced"]
    layer, value = best(values, found["layers"])
    return f"{100 * values[0]:.0f} %; {100 * value:.0f} % (layer {layer})"


def best_pair(found: Mapping[str, Any]) -> str:
    row = found["layer_grid"]["pairs"][0]
    return f"{row['text_layer']}, {row['vis_layer']} ({row['proxy']:.2f} of 2)"


def trained(found: Mapping[str, Any]) -> str:
    rows = found["layer_grid"]["trained"]
    if not rows:
        return "none"
    told = []
    for row in sorted(rows, key=lambda row: -row["score"]):
        pair = f"{_layer(row['text_layer'])}, {_layer(row['vis_layer'])}"
        told.append(f"{pair}: {row['score']:.1f} ± {row['score_stderr'] or 0:.1f}")
    return "; ".join(told)


def _layer(number: int | None) -> str:
    return "none" if number is None else str(number)


def agreement(found: Mapping[str, Any]) -> str:
    told = found["layer_grid"]["agreement"]
    return f"{told['rank_correlation']:.2f} over {told['pairs']} pairs" if told else "–"


def runs(found: Mapping[str, Any]) -> str:
    told = found["sensitivity"]
    return f"{told['layer_runs_of_a_plain_way'] / told['layer_runs']:.2f} times fewer"


ROWS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "decoder layers (looked at)": lambda f: f"{f['model']['decoder_layers']} ({len(f['layers'])})",
    "most attention to text, at layer": lambda f: attention(f, "text"),
    "most attention to the image, at layer": lambda f: attention(f, "image"),
    "noise on text moves the answer most behind layer (nats), σ = 0.5; 1; 2": lambda f: peaks(f, "text"),
    "noise on the image, likewise": lambda f: peaks(f, "image"),
    "text and image peak apart, of 500 resamples": apart,
    "noise on the image is heard until layer (σ = 1, a tenth of its peak)": lambda f: heard_until(f, "image"),
    "best layer for a write to text (share of the loss removed)": lambda f: effect(f, "text"),
    "best layer for a write to the image": lambda f: effect(f, "image"),
    "write to text: shallow, middle, deep third": lambda f: thirds(f, "text"),
    "write to the image: shallow, middle, deep third": lambda f: thirds(f, "image"),
    "last-token gate, balanced accuracy: at layer 0; at its best": gate,
    "best pair (text, image) by the proxy": best_pair,
    "trained pairs (text, image): score in %": trained,
    "rank correlation of proxy and trained pairs": agreement,
    "layer runs of the noise study": runs,
}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows, in Markdown."""
    lines = [f"| | {' | '.join(found)} |", f"|---{'|---' * len(found)}|"]
    for name, value in ROWS.items():
        lines.append(f"| {name} | {' | '.join(value(one) for one in found.values())} |")
    return "\n".join(lines)


def recommendations(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What is recommended for each model, as Python."""
    lines = []
    for model, one in found.items():
        lines.append(f"# {model}")
        for method, told in one["recommendation"].items():
            inside = ", ".join(f"{name}={value!r}" for name, value in told["arguments"].items())
            lines.append(f"inject_{method}(model, {inside})")
    return "\n".join(lines)


if __name__ == "__main__":
    both = load()
    print(table(both), recommendations(both), sep="\n\n")
