"""Counters of a service, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What a service counts, in a registry of its own; memory and CPU time of the process come with it.

    Args:
        edits, waiting: how many edits are stored and how many requests wait, asked when they are read.
    """

    def __init__(self, edits: Callable[[], int], waiting: Callable[[], int]):
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._asked = Counter("dualedit_questions", "Questions answered.", registry=registry)
        self._fired = Counter("dualedit_fired", "Questions that an edit answered.", registry=registry)
        self._errors = Counter(
            "dualedit_errors", "Requests refused or failed.", ["status"], registry=registry
        )
        self._tokens = Counter("dualedit_tokens", "Tokens of answers.", registry=registry)
        self._seconds = Histogram(
            "dualedit_question_seconds", "From the queue to the answer.", buckets=_SECONDS, registry=registry
        )
        self._rows = Histogram(
            "dualedit_batch_rows", "Questions answered together.", buckets=_ROWS, registry=registry
        )
        self._busy = Counter("dualedit_model_seconds", "Seconds the model generated.", registry=registry)
        self._changes = Counter("dualedit_changes", "Changes of the edits.", ["what"], registry=registry)
        for name, about, read in (
            ("dualedit_edits", "Stored edits.", edits),
            ("dualedit_waiting", "Requests that wait for the model.", waiting),
        ):
            Gauge(name, about, registry=registry).set_function(read)

    def answered(self, done: Future[Any], seconds: float) -> None:
        """A question is settled."""
        if done.cancelled() or done.exception() is not None:
            return
        answer = done.result()
        self._asked.inc()
        self._tokens.inc(answer.tokens)
        self._seconds.observe(seconds)
        if answer.edit is not None:
            self._fired.inc()

    def batch(self, rows: int, seconds: float) -> None:
        """A batch is over."""
        self._rows.observe(rows)
        self._busy.inc(seconds)

    def changed(self, what: str) -> None:
        """An edit was added, removed or taken back."""
        self._changes.labels(what).inc()

    def failed(self, status: int) -> None:
        """A request was answered with an error."""
        self._errors.labels(str(status)).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
