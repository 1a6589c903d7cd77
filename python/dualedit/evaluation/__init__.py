"""Measuring editors by what a user sees: freely generated answers, compared exactly.

`evaluate` measures any `Method` under a `Plan`: one edit at a time, many at once or one after the other, and
in three scorings side by side. `evaluate_single` and `evaluate_batch` give the headline figures of an
`Editor` alone.
"""

from .asking import SCORINGS, Asked, Unedited
from .batch import evaluate_batch
from .journal import Journal
from .method import EditorMethod, Method
from .metrics import (
    METRICS,
    MORE_PROBED,
    Row,
    contains_match,
    difference,
    exact_match,
    intervals,
    normalise,
    summarise,
    wilson,
)
from .processes import Alone, Processes, join_processes
from .protocols import PROTOCOLS, Plan
from .published import fit_published_threshold
from .results import evaluate
from .single import SingleResult, ask_before, evaluate_single

__all__ = [
    "METRICS",
    "MORE_PROBED",
    "PROTOCOLS",
    "SCORINGS",
    "Alone",
    "Asked",
    "EditorMethod",
    "Journal",
    "Method",
    "Plan",
    "Processes",
    "Row",
    "SingleResult",
    "Unedited",
    "ask_before",
    "contains_match",
    "difference",
    "evaluate",
    "evaluate_batch",
    "evaluate_single",
    "exact_match",
    "fit_published_threshold",
    "intervals",
    "join_processes",
    "normalise",
    "summarise",
    "wilson",
]
