"""What stored edits do to everything else: accuracy on the embedded model's whole world, before and after.

    python -m studies.interference --out benchmarks/results/interference.json

asks the held-out questions of every family (known and unseen scenes, digits, logos, text) without an edit and
with 1,000 stored. Questions about an edited fact are counted apart: their answer is meant to change.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from dualedit.evaluation import exact_match
from dualedit.toy.editors import METHODS, load_editor
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from tqdm.auto import tqdm

from recipes.toy.vlm_measures import Case, answers, held_out_cases


def measure(method: str, cases: list[Case], edits: int, seed: int, folder: Path | None) -> dict:
    """Accuracy per family on untouched facts before and after, and how many answers changed."""
    folders = (None, None) if folder is None else (folder / "vlm", folder / "editors")
    editor = load_editor(method, *folders, fallback=False)
    questions = [(case.image, case.question) for case in cases]
    before = answers(editor.model, editor.processor, questions)
    samples = edit_samples(World(0), "test", edits, seed)
    target = {sample.fact: sample.request.target for sample in samples}
    for sample in tqdm(samples, desc=f"storing {edits} edits with {method}", unit="edit", mininterval=2):
        request = sample.request
        rephrases = sample.rephrases[:1]
        editor.edit(request.image, request.prompt, request.target, rephrases=rephrases, keep_failed=True)
    after = answers(editor.model, editor.processor, questions)
    families: dict[str, list[tuple[bool, bool, bool]]] = defaultdict(list)
    edited = []
    for case, old, new in zip(cases, before, after, strict=True):
        if case.fact in target:
            edited.append(exact_match(new, target[case.fact]))
            continue
        families[case.family].append(
            (exact_match(old, case.answer), exact_match(new, case.answer), old != new)
        )
    untouched = [row for rows in families.values() for row in rows]

    def share(rows: list[tuple[bool, bool, bool]], column: int) -> float:
        return 100 * sum(row[column] for row in rows) / len(rows)

    return {
        "method": method, "edits": edits, "questions": len(untouched),
        "before": share(untouched, 0), "after": share(untouched, 1), "changed": share(untouched, 2),
        "families": {n: {"before": share(r, 0), "after": share(r, 1)} for n, r in families.items()},
        "edited_questions": len(edited), "edited_right": 100 * sum(edited) / len(edited) if edited else None,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the figures")
    parser.add_argument("--methods", default=",".join(METHODS), help="which editors, with commas")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--per-family", type=int, default=200, help="questions of each family")
    parser.add_argument("--seed", type=int, default=0, help="which facts are edited, and how")
    parser.add_argument(
        "--weights", type=Path, help="folder with vlm and editors; the shipped ones if not given"
    )
    options = parser.parse_args(arguments)
    cases = held_out_cases(World(0), options.per_family, seed=options.seed + 2)
    rows = []
    for method in options.methods.split(","):
        if method not in METHODS:
            parser.error(f"--methods {method}: choose among {', '.join(METHODS)}")
    for method in options.methods.split(","):
        row = measure(method, cases, options.edits, options.seed, options.weights)
        rows.append(row)
        print(
            f"{method}, {row['edits']} edits: {row['before']:.2f} % right before, {row['after']:.2f} after, "
            f"{row['changed']:.2f} % of {row['questions']} answers changed; "
            f"{row['edited_questions']} questions about edited facts"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
