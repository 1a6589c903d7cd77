"""Measuring editors by what a user sees: freely generated answers, compared exactly."""

from .batch import evaluate_batch
from .method import EditorMethod, Method
from .metrics import METRICS, Row, exact_match, summarise
from .single import Asked, SingleResult, ask_before, evaluate_single

__all__ = [
    "METRICS",
    "Asked",
    "EditorMethod",
    "Method",
    "Row",
    "SingleResult",
    "ask_before",
    "evaluate_batch",
    "evaluate_single",
    "exact_match",
    "summarise",
]
