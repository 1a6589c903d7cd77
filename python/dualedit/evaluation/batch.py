"""Many edits at once: store them all, ask the questions of some."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import EditSample
from ..editor import Editor
from .asking import Asked
from .protocols import Plan
from .results import SingleResult
from .single import evaluate_plainly


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
    plan = Plan("batch", asked=asked, more=False, explain=explain, costs=False)
    return evaluate_plainly(editor, samples, method, plan, progress, before)
