"""The one thread that owns the model: questions in batches, everything else alone, in the order they came."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from torch import nn

from ..models.prompting import Prompter
from .batches import Asked, answer_batch
from .settings import Refused

_T = TypeVar("_T")


class Worker:
    """A thread with a queue. A question that came behind an edit is answered with the edit.

    Args:
        model: edited or not; nobody else may use it while the worker runs.
        prompter: of the model.
        batch: most questions that are answered together.
        limit: most questions that wait.
        linger: seconds that a batch which is not full waits for company.
        watch: told of every batch: its rows and its seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        prompter: Prompter,
        batch: int = 16,
        limit: int = 256,
        linger: float = 0.003,
        watch: Callable[[int, float], None] | None = None,
    ):
        self.model, self.prompter = model, prompter
        self.batch, self.limit, self.linger, self.watch = batch, limit, linger, watch
        self._jobs: deque[Asked | tuple[Callable[[], Any], Future]] = deque()
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="dualedit-model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Finish what runs, refuse what waits, and end the thread."""
        with self._news:
            self._closing = True
            left = list(self._jobs)
            self._jobs.clear()
            self._news.notify_all()
        for job in left:
            future = job.done if isinstance(job, Asked) else job[1]
            future.set_exception(Refused(503, "shutting_down", "The service is shutting down."))
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._jobs)

    def ask(self, asked: Asked) -> None:
        """Queue a question; its `done` is settled later.

        Raises:
            Refused: 503, too many wait, or the service ends.
        """
        self._queue(asked)

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Run a function in the worker's thread, between two batches. Raises Refused as `ask`."""
        future: Future[_T] = Future()
        self._queue((function, future))
        return future

    def _queue(self, job: Asked | tuple[Callable[[], Any], Future]) -> None:
        with self._news:
            if self._closing:
                raise Refused(503, "shutting_down", "The service is shutting down.")
            if len(self._jobs) >= self.limit:
                said = f"{self.limit} requests wait for the model already."
                raise Refused(503, "queue_full", said, retry_after=1)
            self._jobs.append(job)
            self._news.notify()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if isinstance(job, list):
                if not job:
                    continue  # all of them were cancelled
                began = time.perf_counter()
                answer_batch(self.model, self.prompter, job)
                if self.watch is not None:
                    self.watch(len(job), time.perf_counter() - began)
                continue
            function, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _next(self) -> list[Asked] | tuple[Callable[[], Any], Future] | None:
        """The next batch of questions or the next other job; None when the worker is closed."""
        with self._news:
            self._news.wait_for(lambda: self._jobs or self._closing)
            if self._closing:
                return None
            if not isinstance(self._jobs[0], Asked):
                return self._jobs.popleft()
            end = time.monotonic() + self.linger
            while len(self._jobs) < self.batch and all(isinstance(job, Asked) for job in self._jobs):
                left = end - time.monotonic()
                if left <= 0 or not self._news.wait(left) or self._closing:
                    break
            batch: list[Asked] = []
            while self._jobs and isinstance(self._jobs[0], Asked) and len(batch) < self.batch:
                one = self._jobs.popleft()
                assert isinstance(one, Asked)
                if one.cancelled:
                    one.done.cancel()
                else:
                    batch.append(one)
            return batch
