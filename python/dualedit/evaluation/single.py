"""One edit at a time: store it, ask everything, take it back.

Answers are generated freely; the gate decides from the prompt alone. `results.evaluate` does more: any
method, other protocols and scorings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..data import EditSample
from ..editor import Editor
from .asking import Asked, Unedited, ask, probes_of
from .method import EditorMethod
from .protocols import Plan, check_samples, measure
from .results import SingleResult, results_of

__all__ = ["Asked", "SingleResult", "ask", "ask_before", "check_fresh", "evaluate_single", "probes_of"]


def ask_before(editor: Editor, samples: Sequence[EditSample], progress: bool = True) -> list[list[Asked]]:
    """What the unedited model answers to every probe, in the batches that `evaluate_single` asks later.

    The editor's adapters are switched off meanwhile, so its stored edits do not matter.
    """
    unedited = Unedited(samples)
    unedited.ask(EditorMethod(editor, ""), range(len(samples)), progress)
    return [unedited[place][0] for place in range(len(samples))]


def evaluate_single(
    editor: Editor,
    samples: Sequence[EditSample],
    method: str,
    progress: bool = True,
    before: Sequence[Sequence[Asked]] | None = None,
    explain: bool = False,
) -> SingleResult:
    """Free-generation figures of an editor, one edit at a time.

    Args:
        editor: with no stored edits; it has none afterwards either.
        samples: the facts.
        method: name for the row.
        before: from `ask_before` on the same samples and base model, to share it between methods.
        explain: also note whether an edit fired and at what distance (one more forward a sample).

    Raises:
        ValueError: no samples, or an editor that holds edits already (locality would be measured against
            them).
    """
    plan = Plan("single", more=False, explain=explain, costs=False)
    return evaluate_plainly(editor, samples, method, plan, progress, before)


def evaluate_plainly(
    editor: Editor,
    samples: Sequence[EditSample],
    method: str,
    plan: Plan,
    progress: bool,
    before: Sequence[Sequence[Asked]] | None,
) -> SingleResult:
    """One scoring of a plan, with a row of exact-match figures alone."""
    check_fresh(editor, samples)
    unedited = Unedited(samples)
    if before is not None:
        unedited.fill(before)
    units = list(measure(EditorMethod(editor, method), samples, plan, unedited, progress=progress))
    (found,) = results_of(units, method, plan, len(samples))
    return replace(found, row=replace(found.row, contains=None, contains_interval=None))


def check_fresh(editor: Editor, samples: Sequence[EditSample]) -> None:
    """Refuse an evaluation that would not measure what it says.

    Raises:
        ValueError: no samples, or an editor that holds edits already (locality would be measured against
            them).
    """
    check_samples(Plan(), samples)
    if editor.edits:
        raise ValueError(f"editor holds {len(editor.edits)} edits: remove them, or pass a fresh one.")
