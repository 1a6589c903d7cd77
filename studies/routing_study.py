"""Which key, which distance and which rule find the right edit: a study on the embedded model.

    python -m studies.routing_study --out benchmarks/results/routing-study

writes OUT.json and OUT.png. Every question of 1,000 training and 1,000 test facts is run through the model
once; keys are read at every layer, edits are stored 1, 10, 100 or 1,000 at a time, and each question is right
when it meets its own edit (or none, if its fact has none). Parameters of a rule are fitted on training facts
with 100 stored, then left alone; all figures are of test facts. That is what an oracle adapter would reach.
Training facts are those that set the shipped thresholds: by turns of the model's own world and of one that it
has never seen. ``--world-seed`` takes the test facts from another unseen one.
What the adapters would reach with an oracle gate, and how much of a logo can be read from its image tokens at
all, is measured beside it, and `dualedit eval` measures everything together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dualedit.data import EditSample
from dualedit.editor import Editor
from dualedit.toy.editors import METHODS, load_editor
from dualedit.toy.logos import STROKES, render_logo
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import measure_curve
from torch import Tensor, nn
from tqdm.auto import tqdm

from recipes.toy.train_editors import threshold_samples
from recipes.toy.vlm_batches import Strangers, pixels
from recipes.toy.vlm_losses import image_tokens
from studies.routing_facts import KINDS, RELATED, Facts, read

STORED = (1, 10, 100, 1000)
FIT_AT = 100
PLAIN = ("last", "question", "image", "attended", "together")


class Distance:
    """L2, cosine or whitened L2 between questions and edits; whitening is learned from training questions."""

    def __init__(self, metric: str, training: Tensor):
        self.metric = metric
        self.shape = None
        if metric == "whitened":
            centred = training.double() - training.double().mean(0)
            spread = centred.T @ centred / len(centred)
            # Shrunk towards its mean variance: some directions have hardly any.
            spread += 0.05 * spread.diagonal().mean() * torch.eye(len(spread), dtype=torch.float64)
            values, vectors = torch.linalg.eigh(spread)
            self.shape = (vectors * values.rsqrt()).float()

    def __call__(self, queries: Tensor, edits: Tensor) -> Tensor:
        """[Q, F] distances of [Q, P] and [F, P]."""
        q, e = queries.float(), edits.float()
        if self.metric == "cosine":
            return 1 - nn.functional.normalize(q, dim=1) @ nn.functional.normalize(e, dim=1).T
        if self.shape is not None:
            q, e = q @ self.shape, e @ self.shape
        return torch.cdist(q, e, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass
class Found:
    """What meets what with some number of edits stored together.

    Attributes:
        right: [Q] the edit a question must meet, -1 for none; first, second: [Q] the two nearest distances;
            nearest: [Q] which edit; kind: [Q].
        near, far: [F] distance of each edit's farthest positive and nearest negative sample; neighbour: [F]
            of the nearest other edit stored with it.
    """

    right: Tensor
    first: Tensor
    second: Tensor
    nearest: Tensor
    kind: Tensor
    near: Tensor
    far: Tensor
    neighbour: Tensor


def meet(facts: Facts, key: str, distance: Distance, stored: int) -> Found:
    """Store the facts in groups of `stored` and ask each group's questions."""
    keys, count = facts.keys[key], len(facts.edit)
    near, far = torch.zeros(count), torch.full((count,), torch.inf)
    neighbour = torch.full((count,), torch.inf)
    parts: dict[str, list[Tensor]] = {}
    for begin in range(0, count, stored):
        group = torch.arange(begin, min(begin + stored, count))
        mine = (facts.own >= begin) & (facts.own < begin + stored)
        table = distance(keys[mine], keys[facts.edit[group]])
        own = (facts.own[mine] - begin)[:, None]
        to_own = table.gather(1, own)[:, 0]
        for marks, reduce, into in ((facts.near[mine], "amax", near), (facts.far[mine], "amin", far)):
            into.scatter_reduce_(0, facts.own[mine][marks], to_own[marks], reduce)
        between = distance(keys[facts.edit[group]], keys[facts.edit[group]]).fill_diagonal_(torch.inf)
        neighbour[group] = between.min(1).values
        asked = facts.kind[mine] >= 0
        two = table[asked].topk(min(2, len(group)), largest=False)
        about = facts.about[mine][asked]
        here = (about >= begin) & (about < begin + stored)
        rows = {
            "right": torch.where(here, about, -1),
            "first": two.values[:, 0],
            "second": two.values[:, -1] if len(group) > 1 else torch.full_like(two.values[:, 0], torch.inf),
            "nearest": two.indices[:, 0] + begin,
            "kind": facts.kind[mine][asked],
        }
        for name, value in rows.items():
            parts.setdefault(name, []).append(value)
    return Found(
        **{name: torch.cat(value) for name, value in parts.items()}, near=near, far=far, neighbour=neighbour
    )


Rule = Callable[[Found, tuple[float, ...]], Tensor]


def _fixed(found: Found, given: tuple[float, ...]) -> Tensor:
    return found.first <= given[0]


def _own(found: Found, given: tuple[float, ...]) -> Tensor:
    """BalancEdit's radius between the farthest positive and the nearest negative sample."""
    near, far = found.near[found.nearest], found.far[found.nearest]
    return found.first <= torch.minimum(given[0] * near + (1 - given[0]) * far, far * (1 - 1e-4))


def _own_beside(found: Found, given: tuple[float, ...]) -> Tensor:
    """The same, with the nearest other edit among the negative samples."""
    nearest = found.nearest
    near, far = found.near[nearest], torch.minimum(found.far, found.neighbour)[nearest]
    return found.first <= torch.minimum(given[0] * near + (1 - given[0]) * far, far * (1 - 1e-4))


def _neighbour(found: Found, given: tuple[float, ...]) -> Tensor:
    """A fixed radius, at most a share of the way to the nearest other edit."""
    return (found.first <= given[0]) & (found.first <= given[1] * found.neighbour[found.nearest])


def _margin(found: Found, given: tuple[float, ...]) -> Tensor:
    """A fixed radius, and clearly nearer than the runner-up."""
    return (found.first <= given[0]) & (found.first <= given[1] * found.second)


RULES: dict[str, tuple[Rule, int]] = {
    "fixed": (_fixed, 1),
    "own radius": (_own, 0),
    "own beside": (_own_beside, 0),
    "neighbour": (_neighbour, 2),
    "margin": (_margin, 2),
}


def figures(found: Found, opened: Tensor) -> dict[str, float]:
    """Per cent of questions of each kind that meet what they should."""
    met = torch.where(opened, found.nearest, -1)
    right = met == found.right
    return {name: 100 * float(right[found.kind == i].float().mean()) for i, name in enumerate(KINDS)}


def score(values: dict[str, float]) -> float:
    """What fitting maximises: the mean over the kinds that are hard, once the easy ones are all but right."""
    hard = sum(values[name] for name in ("t_gen", "v_gen", "hard_image", "hard_question")) / 4
    return hard - 10 * max(0.0, 99.5 - min(values["t_loc"], values["m_loc"]))


def fit(rule: str, found: Found) -> tuple[float, ...]:
    """The parameters of a rule that are best for training facts."""
    apply, kind = RULES[rule]
    if kind == 0:
        grid = [(a / 40,) for a in range(41)]
    else:
        radii = torch.quantile(found.first, torch.linspace(0.01, 0.99, 80)).tolist()
        shares = [1.0] if kind == 1 else [s / 20 for s in range(4, 21)]
        grid = [(r, s) for r in radii for s in shares]
    return max(grid, key=lambda given: score(figures(found, apply(found, given))))


def curve(facts: Facts, key: str, distance: Distance) -> dict[str, dict]:
    """How well the distance to a question's own edit tells related from unrelated: AUC and ROC by kind."""
    keys = facts.keys[key]
    found = meet(facts, key, distance, 1)
    del keys
    related = found.first[(found.kind == KINDS.index("v_gen"))].sort().values
    out = {}
    for name in ("hard_image", "hard_question", "m_loc", "t_loc"):
        others = found.first[found.kind == KINDS.index(name)].sort().values
        # P(related nearer than other), ties counting half.
        below = torch.searchsorted(others, related, right=False)
        upto = torch.searchsorted(others, related, right=True)
        auc = 1 - float((below + upto).float().mean()) / 2 / len(others)
        at = torch.quantile(related, torch.linspace(0, 1, 51))
        accepted = torch.searchsorted(others, at, right=True).float() / len(others)
        out[name] = {"auc": auc, "roc": [round(float(x), 4) for x in accepted]}
    return out


def study(editor: Editor, train: Facts, test: Facts) -> dict:
    """Every key under every metric with a fixed radius; every rule for the best few."""
    rows, curves = [], {}
    combinations = [(key, metric) for key in train.keys for metric in ("cosine", "l2", "whitened")]
    for key, metric in tqdm(combinations, desc="keys", unit="key", mininterval=5):
        distance = Distance(metric, train.keys[key][train.kind >= 0])
        rows += _measure(key, metric, "fixed", distance, train, test)
        curves[f"{key} {metric}"] = curve(test, key, distance)
    at_100 = [row for row in rows if row["stored"] == FIT_AT]
    best = sorted(at_100, key=lambda row: -row["fitted_score"])[:4]
    own = [(key, "cosine") for key in ("pooled",) if key in train.keys]
    chosen = dict.fromkeys([("last@1", "cosine"), *own, *((row["key"], row["metric"]) for row in best)])
    for key, metric in tqdm(chosen, desc="rules", unit="key"):
        distance = Distance(metric, train.keys[key][train.kind >= 0])
        for rule in RULES:
            if rule != "fixed":
                rows += _measure(key, metric, rule, distance, train, test)
    return {"rows": rows, "curves": curves}


def _measure(key: str, metric: str, rule: str, distance: Distance, train: Facts, test: Facts) -> list[dict]:
    fitted_on = meet(train, key, distance, FIT_AT)
    given = fit(rule, fitted_on)
    apply = RULES[rule][0]
    value = score(figures(fitted_on, apply(fitted_on, given)))
    rows = []
    for stored in STORED:
        found = meet(test, key, distance, stored)
        rows.append(
            {
                "key": key, "metric": metric, "rule": rule, "stored": stored, "parameters": list(given),
                "fitted_score": value, "figures": figures(found, apply(found, given)),
            }
        )  # fmt: skip
    return rows


def oracle_gate(method: str, samples: list[EditSample], options: argparse.Namespace) -> dict[str, float]:
    """Per cent of related questions answered rightly when each meets its own edit: what the adapters lose."""
    found = measure_curve(load_editor(method, options.vlm, options.editors, fallback=False), samples)
    rows = {name: [p.open for p in found.points if p.metric == name] for name in RELATED}
    return {name: 100 * sum(right) / len(right) for name, right in rows.items()}


def perception(vlm: Path | None, count: int) -> dict[str, float]:
    """Per cent of logos whose every stroke a ridge regression reads from the image tokens.

    Look-alikes may differ by one stroke moved. Known logos are the world's, strange ones are nobody's.
    """
    model, _ = load_embedded(vlm)
    world, rng = World(0), np.random.default_rng(0)
    strangers = Strangers(world)

    def views(logos: list) -> tuple[Tensor, Tensor]:
        tokens, strokes = [], torch.zeros(len(logos), len(STROKES))
        for begin in range(0, len(logos), 50):
            pictures = pixels([render_logo(logo, rng) for logo in logos[begin : begin + 50]])
            with torch.no_grad():
                tokens.append(image_tokens(model, pictures).flatten(1))
        for row, logo in enumerate(logos):
            strokes[row, sorted(logo.strokes)] = 1
        return torch.cat(tokens), strokes

    x, y = views([strangers.family(rng)[0] for _ in range(count)])
    mean, spread = x.mean(0), x.std(0) + 1e-6

    def scaled(tokens: Tensor) -> Tensor:
        return torch.cat([(tokens - mean) / spread, torch.ones(len(tokens), 1)], dim=1).double()

    a = scaled(x)
    weight = torch.linalg.solve(a.T @ a + 300 * torch.eye(a.shape[1]), a.T @ (2 * y.double() - 1))
    found = {}
    for name, logos in (
        ("known", [world.logos[int(i)] for i in rng.integers(len(world.logos), size=500)]),
        ("strange", [strangers.family(rng)[0] for _ in range(500)]),
    ):
        tokens, strokes = views(logos)
        found[name] = 100 * float(((scaled(tokens) @ weight > 0) == strokes.bool()).all(1).float().mean())
    return found


def draw(result: dict, path: Path) -> None:
    """ROC of the shipped and the best keys, and figures against the number of stored edits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, curves = result["rows"], result["curves"]
    shown = list(dict.fromkeys((row["key"], row["metric"]) for row in rows if row["rule"] == "margin"))
    figure, panels = pyplot.subplots(2, 3, figsize=(16, 9.5))
    for panel, name in zip(panels[0], ("hard_image", "hard_question", "m_loc"), strict=True):
        for key, metric in shown:
            found = curves[f"{key} {metric}"][name]
            panel.plot(
                found["roc"], torch.linspace(0, 1, 51), label=f"{key} {metric}: AUC {found['auc']:.4f}"
            )
        panel.set(
            title=f"new images against {name}", xlabel="accepted by mistake", ylabel="new images accepted"
        )
        # Only where the curves leave the corner: the keys that are shown are wrong in a few of a thousand.
        rates = torch.tensor([curves[f"{key} {metric}"][name]["roc"] for key, metric in shown])
        width = max(min(0.3, 1.1 * float(rates.max())), 1e-3)
        leaves = float(torch.linspace(0, 1, 51)[(rates > 0).any(0).int().argmax()])
        panel.set_xlim(-0.02 * width, width)
        panel.set_ylim(max(0.0, leaves - 0.05), 1.005)
        panel.locator_params(axis="x", nbins=5)
        panel.legend(fontsize=8, loc="lower right")
    for panel, name in zip(panels[1], ("v_gen", "hard_image", "m_loc"), strict=True):
        for key, metric in shown:
            for rule, style in zip(RULES, ("-", "--", "-.", ":", (0, (1, 4))), strict=True):
                mine = [r for r in rows if (r["key"], r["metric"], r["rule"]) == (key, metric, rule)]
                if mine and (key, metric) in shown[:2]:
                    panel.plot(
                        [r["stored"] for r in mine], [r["figures"][name] for r in mine],
                        linestyle=style, marker="o", label=f"{key} {metric}, {rule}",
                    )  # fmt: skip
        panel.set(title=f"{name}: met what it should, %", xlabel="edits stored")
        panel.set_xscale("log")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png are written")
    parser.add_argument("--facts", type=int, default=1000, help="training and test facts each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world-seed", type=int, default=0, help="world of the test facts")
    parser.add_argument("--vlm", type=Path, help="folder of the embedded model; the shipped one if not given")
    parser.add_argument("--editors", type=Path, help="folder of the editors; the shipped ones if not given")
    options = parser.parse_args(arguments)
    editor = load_editor("dualedit", options.vlm, options.editors, fallback=False)
    train = read(editor, threshold_samples(World(0), options.facts, options.seed), "training facts")
    world = World(options.world_seed)
    samples = edit_samples(world, "test", options.facts, options.seed)
    result = study(editor, train, read(editor, samples, "test facts"))
    result["oracle_gate"] = {name: oracle_gate(name, samples[:100], options) for name in METHODS}
    result["perception"] = perception(options.vlm, 6 * options.facts)
    print("every stroke readable, %:", json.dumps(result["perception"]))
    result |= {"facts": options.facts, "seed": options.seed, "world_seed": options.world_seed}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=None) + "\n")
    draw(result, options.out.with_suffix(".png"))
    print("oracle gate:", json.dumps(result["oracle_gate"]))
    for row in sorted(result["rows"], key=lambda r: (r["stored"], -r["fitted_score"])):
        if row["stored"] in (1, 100, 1000) and row["fitted_score"] > 90:
            shown = " ".join(f"{name} {value:.1f}" for name, value in row["figures"].items())
            print(f"{row['stored']:5d} {row['key']:12s} {row['metric']:9s} {row['rule']:11s} {shown}")


if __name__ == "__main__":
    main()
