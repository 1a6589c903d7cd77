"""The training loop: steps, held-out loss, checkpoints, metrics, on one process or many."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import EditSample
from ..models.architectures import fingerprint, unwrap
from ..storage import save_edits
from .checkpoint import (
    Checkpoint,
    checkpoints,
    optimizer_state,
    random_state,
    read_checkpoint,
    restore,
    set_random_state,
    weights_of,
    write_checkpoint,
)
from .dry_run import explain_out_of_memory
from .metrics import MetricsFile
from .optimise import figures, held_out_loss, take_step
from .recipe import TERMS, Recipe, changed_settings, learning_rate_at, recipe_text
from .setup import Setup, open_accelerator, set_up

CHECKPOINTS, RECIPE, LAST = "checkpoints", "recipe.yaml", "last"


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: the adapters are here, for `load_edits` and `PeftModel.from_pretrained`.
        step: optimiser steps done.
        best: (step, held-out loss) of the adapters in `folder`; None if there are no held-out edits: they
            are the last.
        stopped: whether it was asked to stop before its last step.
    """

    folder: Path
    step: int
    best: tuple[int, float] | None
    stopped: bool


def train(
    base: nn.Module,
    processor: Any,
    samples: Sequence[EditSample],
    held_out: Sequence[EditSample],
    recipe: Recipe,
    out: str | os.PathLike[str],
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train fresh DualEdit adapters on a model and save them, with checkpoints on the way.

    Under `accelerate launch` every process calls this with the same arguments.

    Args:
        base: a Hugging Face vision-language model; its weights are not changed (with bf16, cast).
        samples: edits to train on; held_out: edits for the best checkpoint, may be empty.
        out: folder for the adapters (the best by held-out loss, or the last), checkpoints, metrics.jsonl and
            recipe.yaml.
        resume: go on from the newest checkpoint in `out`, to the same end as without the stop.
        progress: show a bar.
        say: called with what a user should know.

    Raises:
        ValueError: a run in `out` that was not to be resumed or does not fit; no memory left (says what to
            lower); a gradient that is not finite.
    """
    folder = Path(out)
    found = checkpoints(folder / CHECKPOINTS)
    if found and not resume:
        raise ValueError(
            f"{folder} holds a run that stands at {found[-1].stem}: pass --resume to go on with it, or "
            "another --out."
        )
    accelerator = open_accelerator()
    speak = say if accelerator.is_main_process else lambda text: None
    try:
        setup = set_up(base, processor, samples, held_out, recipe, accelerator)
        for note in setup.notes:
            speak(f"Note: {note}")
        run = Run(setup, folder, speak, progress and accelerator.is_local_main_process)
        if found and resume:
            run.resume(read_checkpoint(found[-1]))
        elif resume:
            speak(f"{folder} holds no checkpoint: starting at step 0.")
        return run.go()
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        remedies = explain_out_of_memory(error, recipe)
        if remedies is None:
            raise
        raise ValueError(f"{remedies} Then go on with --resume if there is a checkpoint.") from error


class Run:
    """A run under way: where it stands, and what it writes."""

    def __init__(self, setup: Setup, folder: Path, say: Callable[[str], None], progress: bool):
        self.setup, self.folder, self.say, self.progress = setup, folder, say, progress
        self.done = 0
        self.best: tuple[int, float] | None = None
        self.recent: dict[str, float] = {}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint stands.

        Raises:
            ValueError: it belongs to other data, another model or other settings.
        """
        setup = self.setup
        changed = changed_settings(setup.recipe, checkpoint.recipe)
        if changed:
            listed = ", ".join(f"{n} was {checkpoint.recipe[n]!r}" for n in changed)
            raise ValueError(f"This run was started with other settings ({listed}): resume with those.")
        if checkpoint.samples != setup.samples:
            raise ValueError(
                "The training edits are not those that this run was started with: resume with the same data."
            )
        here = fingerprint(unwrap(setup.model))
        other = [k for k, v in checkpoint.model.items() if v is not None and here.get(k) not in (None, v)]
        if other:
            raise ValueError(f"This run was started on another model ({other[0]} differs): pass that model.")
        restore(checkpoint, setup.step.trained(), setup.optimizer)
        states = checkpoint.random
        set_random_state(states[min(setup.accelerator.process_index, len(states) - 1)])
        self.done, self.best = checkpoint.step, checkpoint.best
        self.say(f"Resumed at step {self.done}.")

    def go(self) -> Outcome:
        """Take the steps that are left."""
        setup, recipe = self.setup, self.setup.recipe
        if setup.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / RECIPE).write_text(recipe_text(recipe), encoding="utf-8")
        metrics = MetricsFile(self.folder, self.done, recipe.tensorboard) if setup.main else None
        steps = setup.feed.ahead(self.done, recipe.steps)
        stopped = False
        bar = tqdm(
            total=recipe.steps, initial=self.done, desc="training", unit="step", disable=not self.progress,
            mininterval=1, smoothing=0.05,
        )  # fmt: skip
        window = _Window()
        try:
            with _stop_requested(self.say) as stop:
                for batches in steps:
                    sums, counts, norm, stopped = take_step(setup, batches, self.done, stop.is_set())
                    self.done += 1
                    window.add(sums, counts)
                    bar.update()
                    self._report(window, norm, metrics, bar)
                    last = self.done == recipe.steps or stopped
                    self._evaluate(metrics, last and not stopped)
                    if last or self.done % recipe.checkpoint_every == 0:
                        self._save()
                    if stopped:
                        break
            return self._finish(stopped and self.done < recipe.steps)
        finally:
            bar.close()
            steps.close()
            if metrics is not None:
                metrics.close()

    def _report(self, window: _Window, norm: float, metrics: MetricsFile | None, bar: tqdm) -> None:
        recipe = self.setup.recipe
        if self.done % recipe.log_every and self.done != recipe.steps:
            return
        sums, counts, seconds, steps = window.take(self.setup)
        if metrics is None:
            return
        now = figures(sums, counts, recipe)
        rate = recipe.batch_size * steps / seconds
        metrics.write(
            self.done,
            {
                **now, "learning_rate": learning_rate_at(recipe, self.done - 1), "gradient_norm": norm,
                "edits_per_second": rate,
            },
        )  # fmt: skip
        self.recent |= {"loss": now["loss"]}
        bar.set_postfix({name: f"{value:.4g}" for name, value in self.recent.items()}, refresh=False)

    def _evaluate(self, metrics: MetricsFile | None, last: bool) -> None:
        recipe = self.setup.recipe
        if self.setup.held_out is None or (self.done % recipe.evaluate_every and not last):
            return
        now = held_out_loss(self.setup)
        if metrics is not None:
            metrics.write(self.done, {f"held_out_{name}": value for name, value in now.items()})
        self.recent["held_out"] = now["loss"]
        if self.best is None or now["loss"] < self.best[1]:
            self.best = (self.done, now["loss"])
            self._export(self.folder)
        if not self.progress:
            step, loss = self.best
            self.say(f"Step {self.done}: held-out loss {now['loss']:.4f}, best {loss:.4f} at {step}.")

    def _export(self, folder: Path) -> None:
        setup = self.setup
        names = {id(p): name for name, p in setup.model.named_parameters()}
        trained = setup.step.trained()
        copies = weights_of(trained)  # on all processes: they hold the pieces
        if setup.main:
            save_edits(setup.model, folder, {names[id(p)]: copies[name] for name, p in trained.items()})
        setup.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """A checkpoint; without held-out edits the adapters too: the folder can be used at any time."""
        from accelerate.utils import gather_object

        setup = self.setup
        parameters = setup.step.trained()
        checkpoint = Checkpoint(
            self.done,
            weights_of(parameters),
            optimizer_state(setup.optimizer, parameters),
            gather_object([random_state()]),
            self.best,
            dataclasses.asdict(setup.recipe),
            setup.samples if setup.main else "",
            fingerprint(unwrap(setup.model)),
        )
        if setup.main:
            write_checkpoint(self.folder / CHECKPOINTS, checkpoint, setup.recipe.keep_checkpoints)
            if not self.progress:
                self.say(f"Step {self.done}: checkpoint.")
        if setup.held_out is None:
            self._export(self.folder)
        setup.accelerator.wait_for_everyone()

    def _finish(self, stopped: bool) -> Outcome:
        if self.best is not None and not stopped and self.best[0] != self.done:
            self._export(self.folder / LAST)
        return Outcome(self.folder, self.done, self.best, stopped)


class _Window:
    """Losses since the last report."""

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self.sums, self.counts = torch.zeros(len(TERMS)), torch.zeros(len(TERMS), dtype=torch.float64)
        self.steps, self.began = 0, time.monotonic()

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Note a step of this process."""
        self.sums += sums
        self.counts += counts
        self.steps += 1

    def take(self, setup: Setup) -> tuple[Tensor, Tensor, float, int]:
        """Sums and counts over all processes, seconds, steps; and begin anew."""
        found = setup.total(self.sums), setup.total(self.counts), time.monotonic() - self.began, self.steps
        self._clear()
        return found


@contextmanager
def _stop_requested(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C stops at once."""
    stop, first = threading.Event(), [0.0]

    def note(number: int, frame: Any) -> None:
        # A launcher passes the terminal's Ctrl-C on, so that it comes twice within a moment.
        if stop.is_set() and number == signal.SIGINT and time.monotonic() - first[0] > 2:
            raise KeyboardInterrupt
        if not stop.is_set():
            first[0] = time.monotonic()
            stop.set()
            say("Stopping within a step or two, with a checkpoint (Ctrl-C again: at once, without one).")

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the main thread's
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
