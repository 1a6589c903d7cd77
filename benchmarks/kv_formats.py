"""What keys and values in fewer bytes cost: DualEdit on the embedded model, all edits stored at once.

    python -m benchmarks.kv_formats [--edits 40] [--only native,int8] --json FILE

For each format: bytes of an edit's keys and values, how many edits were written, answers that are as told to
the edits' own questions, to other wordings and to other pictures (%), and answers to questions beside
(look-alikes, other questions, other pictures) that are those of the unedited model (%). "unmended": edits of
one forward alone, without the steps that mend what does not come out as told.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from dualedit import Editor, inject_dualedit
from dualedit.checking import EditFailed
from dualedit.evaluation import exact_match
from dualedit.toy.editors import EDITORS
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.tuners.adapters import disabled

# Name to settings of new edits.
FORMATS: dict[str, dict[str, Any]] = {
    "native": {}, "bfloat16": {"kv_dtype": "bfloat16"}, "int8": {"kv_dtype": "int8"},
    "float8": {"kv_dtype": "float8"}, "image_mass=0.9": {"image_mass": 0.9},
    "image_mass=0.5": {"image_mass": 0.5}, "int8, image_mass=0.9": {"kv_dtype": "int8", "image_mass": 0.9},
}  # fmt: skip


def measure(settings: dict[str, Any], samples: list) -> dict[str, Any]:
    """One format's row."""
    base, processor = load_embedded()
    model = inject_dualedit(base, adapter=EDITORS / "dualedit", **settings)
    editor = Editor(model, processor)
    written = []
    for sample in samples:
        try:
            asked = sample.request
            editor.edit(asked.image, asked.prompt, asked.target, rephrases=sample.rephrases)
            written.append(sample)
        except EditFailed:
            continue
    use = editor.memory_use()
    found: dict[str, Any] = {"edits": len(samples), "written": len(written)}
    found["bytes_per_edit"] = round(use["values"] / max(len(written), 1))
    probed = {
        "own": [(s.request, s.request.target) for s in written],
        "wordings": [(p, s.request.target) for s in written for p in s.generality["t_gen"]],
        "pictures": [(p, s.request.target) for s in written for p in s.generality["v_gen"]],
    }
    for name, pairs in probed.items():
        answers = editor.answer_many([(probe.image, probe.prompt) for probe, _ in pairs])
        found[name] = _percent([exact_match(a, t) for a, (_, t) in zip(answers, pairs, strict=True)])
    facts = {s.fact for s in written}
    beside = [
        (p.image, p.prompt)
        for s in written
        for kind in ("m_loc", "hard_image", "hard_question")
        for p in s.locality[kind]
        if p.fact is None or p.fact not in facts
    ]
    after = editor.answer_many(beside)
    with disabled(model, "default"):
        before = editor.answer_many(beside)
    found["beside"] = _percent([a == b for a, b in zip(after, before, strict=True)])
    found |= _of_one_forward(settings, samples)
    found["asked"] = {**{name: len(pairs) for name, pairs in probed.items()}, "beside": len(beside)}
    return found


def _of_one_forward(settings: dict[str, Any], samples: list) -> dict[str, float]:
    """What the format alone does: edits of one forward; how probable their targets' rarest tokens are."""
    base, processor = load_embedded()
    model = inject_dualedit(base, adapter=EDITORS / "dualedit", refine_steps=0, **settings)
    editor = Editor(model, processor)
    told = [(s.request.image, s.request.prompt, s.request.target) for s in samples]
    made = [editor.edit(*each, keep_failed=True) for each in told]
    probability = sum(edit.probability or 0.0 for edit in made) / len(made)
    return {
        "unmended_right": _percent([not edit.failed for edit in made]),
        "unmended_probability": round(probability, 4),
    }


def _percent(right: list[bool]) -> float:
    return round(100 * sum(right) / max(len(right), 1), 1)


def main(arguments: list[str] | None = None) -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.kv_formats", description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=40, metavar="N")
    parser.add_argument("--only", metavar="A;B", help="formats, separated by a semicolon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write, beside what is there")
    options = parser.parse_args(arguments)
    chosen = options.only.split(";") if options.only else list(FORMATS)
    unknown = sorted(set(chosen) - set(FORMATS))
    if unknown:
        parser.error(f"--only {unknown[0]}: there are {'; '.join(FORMATS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    samples = edit_samples(World(), "test", options.edits, seed=options.seed)
    known = json.loads(options.json.read_text())["formats"] if options.json and options.json.is_file() else {}
    for name in chosen:
        known[name] = measure(FORMATS[name], samples)
        print(f"{name}: {json.dumps(known[name])}", flush=True)
        if options.json is not None:
            report = {"model": "embedded", "seed": options.seed, "torch": torch.__version__, "formats": known}
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
