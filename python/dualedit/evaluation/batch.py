"""Many edits at once: store them all, ask the questions of some.

Every question can now meet every stored edit, so routing is measured too. A probe about a fact that has an
edit of its own (a look-alike that was edited as well) has to get that edit's answer; all others have to get
the unedited model's.
"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from ..data import EditSample
from ..editor import Editor
from .single import Asked, SingleResult, ask, ask_before, check_fresh, result, store


def evaluate_batch(
    editor: Editor,
    samples: Sequence[EditSample],
    method: str,
    asked: int | None = None,
    progress: bool = True,
    before: Sequence[Sequence[Asked]] | None = None,
    explain: bool = False,
) -> SingleResult:
    """Free-generation figures with all samples' edits stored at once.

    Args:
        editor: with no stored edits; it has none afterwards either.
        samples: the facts to store, each fact once.
        method: name for the row.
        asked: of how many samples, the first ones, the questions are asked; None asks all.
        before: from `ask_before` on those samples, to share it between methods.
        explain: also note whether an edit fired and at what distance.

    Raises:
        ValueError: no samples, a fact that is edited twice, or an editor that holds edits already.
    """
    check_fresh(editor, samples)
    facts = [sample.fact for sample in samples if sample.fact is not None]
    if len(set(facts)) < len(facts):
        twice = next(fact for fact in facts if facts.count(fact) > 1)
        raise ValueError(f"samples edit the fact {twice} twice: the later edit would take its place.")
    probed = samples[: len(samples) if asked is None else asked]
    before = ask_before(editor, probed, progress) if before is None else before
    edited = {sample.fact: sample.request.target for sample in samples if sample.fact is not None}
    records = []
    try:
        for sample in tqdm(samples, desc=f"storing {len(samples)} edits", unit="edit", disable=not progress):
            store(editor, sample)
        bar = tqdm(probed, desc=f"asking {method}", unit="fact", disable=not progress)
        for number, sample in enumerate(bar):
            records.append(ask(editor, sample, before[number], explain, edited))
    finally:
        for edit in editor.edits:
            editor.remove(edit.id)
    return result(method, records, protocol="batch", edits=len(samples))
