"""Steps 6 and 8: an editor on `smol`: its key fitted on training concepts, its reach set on validation ones.

Pictures are by training and validation artists alone. The key's linear maps are fitted in closed form
(`dualedit.training.fit_pooled_key`), so that what artists and wordings of one fact differ in counts little.
The reach is BalancEdit's alpha and largest radius, or DualEdit's tau.

    python recipes/smol/editors.py balancedit    # writes python/dualedit/smol/weights/editors/balancedit
    python recipes/smol/editors.py dualedit      # of the adapters that adapters.py has trained
"""

import argparse
import json
import time

import torch
from common import WORK
from dualedit.data import Probe
from dualedit.editor import Editor
from dualedit.smol import load_concepts, load_smol
from dualedit.smol.benchmark import Pictures
from dualedit.smol.editors import BALANCEDIT, DUALEDIT, EDITORS, METHODS
from dualedit.storage import load_edits, save_edits
from dualedit.training import fit_pooled_key, measure_curve, sweep_reach, sweep_threshold, with_threshold
from dualedit.training.calibration import with_alpha
from dualedit.training.pooled_key import read_questions
from dualedit.tuners import inject_balancedit, inject_dualedit
from dualedit.tuners.adapter import active_adapter
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

WEIGHTS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the pictures' cosine against the questions', to choose from


def auc(near, far) -> float:
    """How often a distance of `near` is below one of `far`, in per cent."""
    near, far = torch.tensor(near), torch.tensor(far)
    less = (near[:, None] < far).double().mean() + 0.5 * (near[:, None] == far).double().mean()
    return 100 * float(less)


def apart(kinds) -> float:
    """With the best radius for all: the share inside of what must change, by kind, plus that outside of what
    must not: look-alikes of three kinds, and other questions."""
    near = [torch.tensor(kinds[name]) for name in ("t_gen", "v_gen_view", "v_gen_artist")]
    alike = [torch.tensor(found) for name, found in kinds.items() if name.startswith("hard_image")]
    other = torch.tensor(kinds["hard_question"])

    def outside(found, radius):
        return float((found > radius).double().mean())

    def score(radius):
        inside = sum(1 - outside(found, radius) for found in near) / len(near)
        images = sum(outside(found, radius) for found in alike) / len(alike)
        return inside + (images + outside(other, radius)) / 2

    return max(score(i / 100) for i in range(201))


def key_distances(model, prompter, samples):
    """For each weight, by kind of question: distances to the edit's key."""
    adapter = active_adapter(model)
    router = next(layer.router(adapter.name) for layer in adapter.layers.values())
    found = {weight: {} for weight in WEIGHTS}
    for sample in samples:
        probes = [("rel", Probe(sample.request.image_source, sample.request.prompt))]
        for name, group in (*sample.generality.items(), *sample.locality.items()):
            probes += [(f"{name}_{p.kind}" if p.kind else name, p) for p in group]
        read = read_questions(model, prompter, [p for _, p in probes])
        for weight in WEIGHTS:
            router.image_weight.data.fill_(weight)
            keys = router(read.last, read.pictured)
            apart = (keys - keys[:1]).norm(dim=1).tolist()
            for (name, _), distance in zip(probes[1:], apart[1:], strict=True):
                found[weight].setdefault(name, []).append(distance)
    return found


CHANGES = ("rel", "t_gen", "v_gen", "v_gen_view", "v_gen_artist")


def oracles(curve, radius) -> dict[str, dict[str, float]]:
    """What limits an editor: its figures with a gate that never errs, and with a writer that never errs."""
    found: dict[str, list] = {}
    for point in curve.points:
        found.setdefault(point.metric, []).append(point)
    gate, writer = {}, {}
    for metric, points in found.items():
        inside = sum(point.distance <= radius(point) for point in points) / len(points)
        if metric in CHANGES:
            gate[metric] = 100 * sum(point.open for point in points) / len(points)
            writer[metric] = 100 * inside
        else:
            writer[metric] = 100 * (1 - inside)
    return {"gate never errs": gate, "writer never errs": writer}


def fresh(base, method: str):
    """The model with an editor that knows nothing of pictures yet."""
    if method == "balancedit":
        return inject_balancedit(base, **BALANCEDIT)
    folder = WORK / f"adapters-{DUALEDIT['text_layer']}-{DUALEDIT['vis_layer']}"
    trained = folder / "adapter_model.safetensors"
    if not trained.is_file():
        raise SystemExit(f"{trained} is not there: run recipes/smol/adapters.py first.")
    model = inject_dualedit(base, **DUALEDIT)
    # They were trained without a pooled key, whose maps are not in the file.
    weights = {name: value for name, value in load_file(trained).items() if ".dualedit_adapter." in name}
    missing = set_peft_model_state_dict(model, weights).missing_keys
    assert weights and not [name for name in missing if ".dualedit_adapter." in name]
    return model.eval()


def save(editor, folder) -> None:
    """Write the editor with DualEdit's adapters in float16, as the weights of the model are stored."""
    adapter = active_adapter(editor.model)
    parts = [
        part
        for layer in adapter.layers.values()
        if hasattr(layer, "dualedit_adapter")
        for part in layer.dualedit_adapter[adapter.name].values()
    ]
    for part in parts:
        part.half()
    save_edits(editor.model, folder)
    for part in parts:
        part.float()


def main(method: str, facts: int, choose: int, calibrate: int, seed: int):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    base, processor = load_smol()
    base.config._name_or_path = base.name_or_path = "smol"  # not a folder of this machine, in the model card
    benchmark, start = Pictures(load_concepts(), seed), time.time()
    folder = EDITORS / method
    if folder.exists():
        editor = Editor(load_edits(base, folder), processor)
    else:
        editor = Editor(fresh(base, method), processor)
        active_adapter(editor.model).config.base_model_name_or_path = "smol"  # not a folder of this machine
        choose_key(editor, benchmark, facts, choose, start)
        save(editor, folder)
    if not calibrate:
        return
    curve = measure_curve(
        editor, benchmark.samples("validation", calibrate), max(1, calibrate // 2), progress=False
    )
    if method == "balancedit":
        sweep, limit = sweep_reach(curve)
        with_alpha(editor, sweep.chosen, limit)
        print(f"largest radius {limit}", flush=True)

        def reach(point):
            between = sweep.chosen * point.positive + (1 - sweep.chosen) * point.negative
            return min(between, limit or between, point.negative * (1 - 1e-4))
    else:
        sweep = sweep_threshold(curve, 40)
        with_threshold(editor, sweep.chosen)

        def reach(point):
            return 1.0 - sweep.chosen
    print(f"{sweep.setting} {sweep.chosen}, {time.time() - start:.0f} s", flush=True)
    print(json.dumps(sweep.chosen_figures), flush=True)
    print(json.dumps(oracles(curve, reach)), flush=True)
    for value, figures in zip(sweep.values, sweep.figures, strict=True):
        print(f"{value:.3f}", {k: None if v is None else round(v, 1) for k, v in figures.items()}, flush=True)
    save(editor, folder)


def choose_key(editor, benchmark, facts: int, choose: int, start: float) -> None:
    """Fit the key to training facts and choose what pictures weigh in it by validation facts."""
    model = editor.model
    fit_pooled_key(model, editor.prompter, benchmark.samples("training", facts))
    print(f"key fitted, {time.time() - start:.0f} s", flush=True)
    samples = benchmark.samples("validation", choose)
    best = (0.0, WEIGHTS[0])
    for weight, kinds in key_distances(model, editor.prompter, samples).items():
        same = kinds["v_gen_artist"]
        others = [name for name in kinds if name.startswith("hard_")]
        told = {name: round(auc(same, kinds[name]), 1) for name in (*others, "m_loc", "t_loc")}
        best = max(best, (score := apart(kinds), weight))
        print(f"weight {weight}: score {score:.3f}, AUC of other artists' pictures against", told, flush=True)
    adapter = active_adapter(model)
    router = next(layer.router(adapter.name) for layer in adapter.layers.values())
    router.image_weight.data.fill_(best[1])
    print(f"image weight {best[1]}, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--facts", type=int, default=240, help="training facts for the key")
    parser.add_argument("--choose", type=int, default=60, help="validation facts for the key's weight")
    parser.add_argument("--calibrate", type=int, default=24, help="validation facts for alpha; 0 leaves it")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.method, given.facts, given.choose, given.calibrate, given.seed)
