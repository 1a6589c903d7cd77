"""Which editor beats which, and what a setting does: the papers' orderings on the embedded model.

    python -m studies.orderings --facts 100 --json benchmarks/results/embedded-orderings.json

Free generation and exact match on test facts; nothing is tuned here. `tests/studies/test_orderings.py` runs
the same functions on few facts. Sources: DualEdit (COLM 2025) for the gate and the two modalities, BalancEdit
(ICML 2025) for alpha, negatives, sequences and the other methods.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from dualedit.baselines import GRACESettings, open_baseline
from dualedit.data import EditSample
from dualedit.evaluation import EditorMethod, Method, Plan, Unedited, evaluate
from dualedit.toy.baselines import baseline_settings, load_baseline
from dualedit.toy.editors import load_editor
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import measure_curve
from dualedit.training.calibration import Point, with_threshold
from dualedit.tuners.adapter import active_adapter
from PIL import Image

Figures = dict[str, float | None]
ALPHAS = tuple(i / 10 for i in range(11))
SHOWN = ("rel", "t_gen", "v_gen", "t_loc", "m_loc", "hard_image", "hard_question", "hm", "avg")
OTHERS = ("ft-l", "ft-v", "lora", "ike", "grace", "visedit")


def measured(method: Method, samples: Sequence[EditSample], unedited: Unedited, protocol: str) -> Figures:
    """Percentages by metric; "loc" is the mean of the four that ask for old answers."""
    plan = Plan(protocol, more=False, costs=False)
    metrics = dict(evaluate(method, samples, plan, unedited, progress=False)[0].row.metrics)
    return with_locality(metrics)


def with_locality(metrics: Figures) -> Figures:
    """The figures with "loc", the mean of the four that ask for the unedited model's answers."""
    return {**metrics, "loc": sum(metrics[n] for n in ("t_loc", "m_loc", "hard_image", "hard_question")) / 4}


def gate(samples: Sequence[EditSample], unedited: Unedited) -> dict[str, Figures]:
    """DualEdit with its gate, and with a threshold that every question passes."""
    editor = load_editor("dualedit", fallback=False)
    rows = {"gate on": measured(EditorMethod(editor, "dualedit"), samples, unedited, "single")}
    with_threshold(editor, -1.0)
    return rows | {"gate off": measured(EditorMethod(editor, "dualedit"), samples, unedited, "single")}


@torch.no_grad()
def modalities(samples: Sequence[EditSample], unedited: Unedited) -> dict[str, Figures]:
    """DualEdit, and each half of its adapter alone: one that was trained together with the other.

    Edits are not refined: what the adapters write by themselves is compared.
    """
    rows = {}
    for row, silent in (("both", ()), ("text half", ("vision",)), ("image half", ("text",))):
        editor = load_editor("dualedit", fallback=False)
        adapter = active_adapter(editor.model)
        name = adapter.name
        adapter.config.refine_steps = 0
        for layer in adapter.layers.values():
            for part in set(silent) & set(layer.dualedit_adapter[name]):
                # With nothing projected back, the adapter's residual leaves its positions as they were.
                for parameter in layer.dualedit_adapter[name][part].o_proj.parameters():
                    parameter.zero_()
        rows[row] = measured(EditorMethod(editor, row), samples, unedited, "single")
    return rows


def alphas(
    samples: Sequence[EditSample], steps: Iterable[float] = ALPHAS, together: bool = False
) -> dict[str, Figures]:
    """BalancEdit's radius between positive and negative sample; one measurement gives every alpha.

    Args:
        together: with all edits stored at once, where a radius that is too large meets others' questions.
    """
    curve = measure_curve(load_editor("balancedit"), samples, together, progress=False)

    def radius(point: Point, alpha: float) -> float:
        between = alpha * point.positive + (1 - alpha) * point.negative
        return min(between, point.negative * (1 - 1e-4)) if point.positive >= point.negative else between

    return {
        f"alpha {alpha:.1f}": with_locality(curve.figures(lambda point, a=alpha: radius(point, a)))
        for alpha in steps
    }


class _WithNegative(EditorMethod):
    """BalancEdit with a plain image of one colour as every edit's negative sample."""

    def __init__(self, colour: str):
        super().__init__(load_editor("balancedit"), f"{colour} negatives")
        self._colour = colour

    def edit(self, sample: EditSample) -> None:
        request = sample.request
        plain = Image.new("RGB", request.image.size, self._colour)
        self.editor.edit(
            request.image, request.prompt, request.target, rephrases=sample.rephrases[:1], negatives=[plain],
            keep_failed=True,
        )


def negatives(samples: Sequence[EditSample], unedited: Unedited) -> dict[str, Figures]:
    """BalancEdit with black and with white images as negative samples."""
    return {c: measured(_WithNegative(c), samples, unedited, "single") for c in ("black", "white")}


def others(
    samples: Sequence[EditSample], unedited: Unedited, names: Iterable[str] = OTHERS, protocol: str = "single"
) -> dict[str, Figures]:
    """DualEdit, BalancEdit and the baselines; GRACE also with its published radius of 1."""
    rows = {
        name: measured(EditorMethod(load_editor(name, fallback=False), name), samples, unedited, protocol)
        for name in ("dualedit", "balancedit")
    }
    for name in names:
        method = load_baseline(name)
        rows[method.name] = measured(method, samples, unedited, protocol)
    if "grace" in names:
        tuned = baseline_settings("grace")
        plain = GRACESettings(tuned.learning_rate, tuned.max_steps, tuned.stop_probability, tuned.layer, 1.0)
        method = open_baseline("grace", *load_embedded(), plain)
        rows["grace, radius 1"] = measured(method, samples, unedited, protocol)
    return rows


def sequence(samples: Sequence[EditSample], unedited: Unedited) -> dict[str, Figures]:
    """BalancEdit with one edit stored at a time, and asked after all of them were stored in sequence."""
    method = EditorMethod(load_editor("balancedit"), "balancedit")
    return {
        "one at a time": measured(method, samples, unedited, "single"),
        f"{len(samples)} stored": measured(method, samples, unedited, "batch"),
    }


def distinct(world_seed: int, count: int, seed: int) -> list[EditSample]:
    """Test edits, each about another fact."""
    return edit_samples(World(world_seed), "test", count, seed)


def _print(title: str, rows: dict[str, Figures]) -> None:
    print(f"\n{title}\n" + " " * 32 + "".join(f"{name[:9]:>10}" for name in (*SHOWN, "loc")))
    for row, figures in rows.items():
        cells = "".join(f"{figures[name]:10.1f}" for name in (*SHOWN, "loc"))
        print(f"{row:32}{cells}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="which test facts, pictures and answers")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    given = parser.parse_args(arguments)
    samples = distinct(0, given.facts, given.seed)
    unedited = Unedited(samples)
    studies = {
        "gate": lambda: gate(samples, unedited),
        "modalities": lambda: modalities(samples, unedited),
        "alpha, one edit at a time": lambda: alphas(samples),
        f"alpha, {len(samples)} edits stored": lambda: alphas(samples, together=True),
        "alpha, brands that the model never saw": lambda: alphas(
            distinct(1, min(60, len(samples)), given.seed)
        ),
        "negatives": lambda: negatives(samples, unedited),
        "sequence": lambda: sequence(samples, unedited),
        "methods, one edit at a time": lambda: others(samples, unedited),
        f"methods, {len(samples)} edits stored": lambda: others(samples, unedited, protocol="batch"),
    }
    found = {}
    for title, study in studies.items():
        found[title] = study()
        _print(title, found[title])
    if given.json is not None:
        report = {"facts": len(samples), "seed": given.seed, "figures": found}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
