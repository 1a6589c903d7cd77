"""The training loop: steps, held-out loss, checkpoints, metrics, on one process or many."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..architectures import fingerprint, unwrap
from ..data import EditSample
from ..model import inject_dualedit
from ..prompting import Prompter
from ..storage import save_edits
from .batches import Batch, Feed, make_batch, untrained_terms
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
)  # fmt: skip
from .logbook import Logbook
from .memory import explain_out_of_memory
from .recipe import TERMS, Recipe, changed_settings, learning_rate_at, recipe_text
from .step import TrainingStep

CHECKPOINTS, RECIPE, LAST = "checkpoints", "recipe.yaml", "last"


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: the adapters are here, for `load_edits` and `PeftModel.from_pretrained`.
        step: optimiser steps done.
        best: (step, held-out loss) of the adapters in `folder`; None without held-out edits: they are the last.
        stopped: whether it was asked to stop before its last step.
    """

    folder: Path
    step: int
    best: tuple[int, float] | None
    stopped: bool


@dataclass
class Setting:
    """A run made ready: the step on its devices, its data, and how many processes there are."""

    recipe: Recipe
    accelerator: Any
    model: nn.Module
    step: TrainingStep
    module: nn.Module
    optimizer: torch.optim.Optimizer
    feed: Feed
    held_out: Feed | None
    samples: str
    notes: list[str] = field(default_factory=list)

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.accelerator.is_main_process

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        if self.accelerator.num_processes == 1:
            return values.cpu()
        # Double precision is not everywhere; counts and sums of a window fit into single.
        return self.accelerator.reduce(values.float().to(self.accelerator.device), "sum").cpu()


# ---------------------------------------------------------------------- making ready


def open_accelerator(precision: str) -> Any:
    """accelerate's view of the processes and devices this run has; bf16 as told, or on a GPU that has it."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    bf16 = precision == "bf16" or (precision == "auto" and gpu and torch.cuda.is_bf16_supported())
    unused = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not gpu, kwargs_handlers=[unused])


def make_ready(
    base: nn.Module,
    processor: Any,
    samples: Sequence[EditSample],
    held_out: Sequence[EditSample],
    recipe: Recipe,
    accelerator: Any,
) -> Setting:
    """Put fresh adapters on a model and everything a run needs around them.

    Raises:
        ValueError: no samples, layers that do not exist, a batch that cannot be divided.
    """
    if not samples:
        raise ValueError("samples is empty: there is nothing to train on.")
    torch.manual_seed(recipe.seed)
    base.requires_grad_(False).eval()
    if accelerator.mixed_precision == "bf16":
        for parameter in base.parameters():  # not the buffers: rotary frequencies lose too much in bf16
            parameter.data = parameter.data.to(torch.bfloat16)
    if accelerator.device.type == "cpu" and hasattr(base, "set_attn_implementation"):
        # On a CPU the fused attention kernel's backward costs several times the plain one's.
        base.set_attn_implementation("eager")
    model = inject_dualedit(
        base, recipe.text_layer, recipe.vis_layer, recipe.mid_dim, recipe.num_heads, recipe.threshold
    )
    model.eval()
    step = TrainingStep(model, recipe.recompute)
    for layer in step.upper.layers.values():
        layer.dualedit_adapter[step.adapter].float()
    if accelerator.distributed_type.value != "FSDP":  # which moves the pieces itself
        base.to(accelerator.device)
    feeds, notes = _feeds(step, Prompter(processor, recipe.template), samples, held_out, recipe, accelerator)
    optimizer = _adamw(step, recipe)
    module, wrapped = accelerator.prepare(step, optimizer)
    return Setting(
        recipe, accelerator, model, step, module, wrapped.optimizer, *feeds, _fingerprint(samples), notes
    )


def _adamw(step: TrainingStep, recipe: Recipe) -> torch.optim.AdamW:
    betas = (recipe.beta1, recipe.beta2)
    parameters = list(step.trained().values())
    return torch.optim.AdamW(parameters, recipe.learning_rate, betas=betas, weight_decay=recipe.weight_decay)


def _feeds(step, prompter, samples, held_out, recipe, accelerator):
    """The feeds of training and of the held-out edits, in the quickest way that gives the right answers."""
    base = step.base
    prompter.tokenizer.padding_side = "left"  # batches are made in a thread, which must not see it change
    eos = getattr(base.generation_config, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list) else eos
    weights = recipe.weights()
    image_ids = list(step.upper.runtime.image_ids)

    def making(pack: bool) -> Callable[..., Batch]:
        return lambda some, generators: make_batch(prompter, some, generators, weights, eos, image_ids, pack)

    notes = [
        f"No edit has a question for {term}: it is not trained." for term in untrained_terms(samples, weights)
    ]
    first = samples[: min(2, len(samples))]
    plain, packed = (
        making(pack)(first, [torch.Generator().manual_seed(i) for i, _ in enumerate(first)])
        for pack in (False, True)
    )
    if not step.choose_way(plain):
        notes.append(
            "The upper layers of this model do not run on their own: every loss runs the whole model."
        )
    pack = recipe.pack and step.answers_alike(packed, plain)
    spread = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    sharded = accelerator.distributed_type.value == "FSDP"
    feed = Feed(samples, making(pack), recipe.batch_size, recipe.accumulate, recipe.seed, **spread)
    if not held_out:
        return (feed, None), notes
    # Where the layers are cut up, all processes must take the same way at the same time.
    alone = {} if sharded else spread
    size = max(1, recipe.batch_size // accelerator.num_processes) * alone.get("processes", 1)
    return (feed, Feed(held_out, making(pack), size, 1, recipe.seed + 1, ordered=True, **alone)), notes


def _fingerprint(samples: Sequence[EditSample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.request.prompt}\0{sample.request.target}\0".encode())
    return f"{len(samples)}:{digest.hexdigest()[:16]}"


# ---------------------------------------------------------------------- one step


def take_step(
    ready: Setting, batches: Sequence[Batch], number: int, stop: bool = False
) -> tuple[Tensor, Tensor, float, bool]:
    """One optimiser step.

    Args:
        batches: this process's, one forward and backward each.
        stop: whether this process was asked to stop.

    Returns:
        this process's sums of the losses [6], its counts [6], the norm of the gradient, and whether any
        process was asked to stop.
    """
    recipe, accelerator = ready.recipe, ready.accelerator
    counts = sum(batch.counts() for batch in batches)
    told = ready.total(torch.cat([counts, torch.tensor([float(stop)], dtype=counts.dtype)]))
    share = torch.tensor([recipe.weights()[term] for term in TERMS]) / told[:-1].clamp(min=1)
    # DDP and FSDP average the processes' gradients; the loss is a sum over all their answers.
    share = (share * accelerator.num_processes).float().to(accelerator.device)
    for group in ready.optimizer.param_groups:
        group["lr"] = learning_rate_at(recipe, number)
    ready.optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(TERMS), device=accelerator.device)
    for place, batch in enumerate(batches):
        more = place < len(batches) - 1
        with accelerator.no_sync(ready.module) if more else nullcontext():
            found = ready.module(batch)
            accelerator.backward((found * share).sum())
        sums += found.detach()
    norm = nn.utils.clip_grad_norm_(list(ready.step.trained().values()), recipe.grad_clip or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise ValueError(
            f"Step {number + 1}: the gradient is not finite. Lower learning_rate={recipe.learning_rate}, set "
            "grad_clip, or train in precision fp32."
        )
    ready.optimizer.step()
    return sums.cpu(), counts, norm, bool(told[-1] > 0)


@torch.no_grad()
def held_out_loss(ready: Setting) -> dict[str, float]:
    """The weighted loss over the held-out edits ("loss"), and each term's mean."""
    feed = ready.held_out
    sums, counts = torch.zeros(len(TERMS)), torch.zeros(len(TERMS), dtype=torch.float64)
    for number in range(feed.steps_of_all()):
        for batch in feed.batches(number):
            sums += ready.step(batch).cpu()
            counts += batch.counts()
    if feed.processes > 1:
        sums, counts = ready.total(sums), ready.total(counts)
    return figures(sums, counts, ready.recipe)


def figures(sums: Tensor, counts: Tensor, recipe: Recipe) -> dict[str, float]:
    """The mean of each term that has questions, and their weighted sum as "loss"."""
    means = {
        term: float(total) / float(count)
        for term, total, count in zip(TERMS, sums, counts, strict=True)
        if count > 0
    }
    return {"loss": sum(recipe.weights()[term] * mean for term, mean in means.items()), **means}


# ---------------------------------------------------------------------- the run


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
        say: told what a user should know.

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
    accelerator = open_accelerator(recipe.precision)
    speak = say if accelerator.is_main_process else lambda text: None
    try:
        ready = make_ready(base, processor, samples, held_out, recipe, accelerator)
        for note in ready.notes:
            speak(f"Note: {note}")
        run = Run(ready, folder, speak, progress and accelerator.is_local_main_process)
        if found and resume:
            run.resume(read_checkpoint(found[-1]))
        elif resume:
            speak(f"{folder} holds no checkpoint: starting at step 0.")
        return run.go()
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        told = explain_out_of_memory(error, recipe)
        if told is None:
            raise
        raise ValueError(f"{told} Then go on with --resume if there is a checkpoint.") from error


class Run:
    """A run under way: where it stands, and what it writes."""

    def __init__(self, ready: Setting, folder: Path, say: Callable[[str], None], progress: bool):
        self.ready, self.folder, self.say, self.progress = ready, folder, say, progress
        self.done = 0
        self.best: tuple[int, float] | None = None
        self.recent: dict[str, float] = {}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint stands.

        Raises:
            ValueError: it belongs to other data, another model or other settings.
        """
        ready = self.ready
        changed = changed_settings(ready.recipe, checkpoint.recipe)
        if changed:
            listed = ", ".join(f"{n} was {checkpoint.recipe[n]!r}" for n in changed)
            raise ValueError(f"This run was started with other settings ({listed}): resume with those.")
        if checkpoint.samples != ready.samples:
            raise ValueError(
                "The training edits are not those that this run was started with: resume with the same data."
            )
        here = fingerprint(unwrap(ready.model))
        other = [k for k, v in checkpoint.model.items() if v is not None and here.get(k) not in (None, v)]
        if other:
            raise ValueError(f"This run was started on another model ({other[0]} differs): pass that model.")
        restore(checkpoint, ready.step.trained(), ready.optimizer)
        states = checkpoint.random
        set_random_state(states[min(ready.accelerator.process_index, len(states) - 1)])
        self.done, self.best = checkpoint.step, checkpoint.best
        self.say(f"Resumed at step {self.done}.")

    def go(self) -> Outcome:
        """Take the steps that are left."""
        ready, recipe = self.ready, self.ready.recipe
        if ready.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / RECIPE).write_text(recipe_text(recipe), encoding="utf-8")
        book = Logbook(self.folder, self.done, recipe.tensorboard) if ready.main else None
        steps = ready.feed.ahead(self.done, recipe.steps)
        stopped = False
        bar = tqdm(
            total=recipe.steps, initial=self.done, desc="training", unit="step", disable=not self.progress,
            mininterval=1, smoothing=0.05,
        )  # fmt: skip
        window = _Window()
        try:
            with _asked_to_stop(self.say) as asked:
                for batches in steps:
                    sums, counts, norm, stopped = take_step(ready, batches, self.done, asked.is_set())
                    self.done += 1
                    window.add(sums, counts)
                    bar.update()
                    self._report(window, norm, book, bar)
                    last = self.done == recipe.steps or stopped
                    self._evaluate(book, last and not stopped)
                    if last or self.done % recipe.checkpoint_every == 0:
                        self._save()
                    if stopped:
                        break
            return self._finish(stopped and self.done < recipe.steps)
        finally:
            bar.close()
            steps.close()
            if book is not None:
                book.close()

    def _report(self, window: _Window, norm: float, book: Logbook | None, bar: tqdm) -> None:
        recipe = self.ready.recipe
        if self.done % recipe.log_every and self.done != recipe.steps:
            return
        sums, counts, seconds, steps = window.take(self.ready)
        if book is None:
            return
        now = figures(sums, counts, recipe)
        rate = recipe.batch_size * steps / seconds
        book.write(
            self.done,
            {
                **now, "learning_rate": learning_rate_at(recipe, self.done - 1), "gradient_norm": norm,
                "edits_per_second": rate,
            },
        )  # fmt: skip
        self.recent |= {"loss": now["loss"]}
        bar.set_postfix({name: f"{value:.4g}" for name, value in self.recent.items()}, refresh=False)

    def _evaluate(self, book: Logbook | None, last: bool) -> None:
        recipe = self.ready.recipe
        if self.ready.held_out is None or (self.done % recipe.evaluate_every and not last):
            return
        now = held_out_loss(self.ready)
        if book is not None:
            book.write(self.done, {f"held_out_{name}": value for name, value in now.items()})
        self.recent["held_out"] = now["loss"]
        if self.best is None or now["loss"] < self.best[1]:
            self.best = (self.done, now["loss"])
            self._export(self.folder)
        if not self.progress:
            step, loss = self.best
            self.say(f"Step {self.done}: held-out loss {now['loss']:.4f}, best {loss:.4f} at {step}.")

    def _export(self, folder: Path) -> None:
        ready = self.ready
        names = {id(p): name for name, p in ready.model.named_parameters()}
        trained = ready.step.trained()
        copies = weights_of(trained)  # on all processes: they hold the pieces
        if ready.main:
            save_edits(ready.model, folder, {names[id(p)]: copies[name] for name, p in trained.items()})
        ready.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """A checkpoint; without held-out edits the adapters too: the folder can be used at any time."""
        from accelerate.utils import gather_object

        ready = self.ready
        parameters = ready.step.trained()
        checkpoint = Checkpoint(
            self.done,
            weights_of(parameters),
            optimizer_state(ready.optimizer, parameters),
            gather_object([random_state()]),
            self.best,
            dataclasses.asdict(ready.recipe),
            ready.samples,
            fingerprint(unwrap(ready.model)),
        )
        if ready.main:
            write_checkpoint(self.folder / CHECKPOINTS, checkpoint, ready.recipe.keep_checkpoints)
        if ready.held_out is None:
            self._export(self.folder)
        ready.accelerator.wait_for_everyone()

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

    def take(self, ready: Setting) -> tuple[Tensor, Tensor, float, int]:
        """Sums and counts over all processes, seconds, steps; and begin anew."""
        told = ready.total(self.sums), ready.total(self.counts), time.monotonic() - self.began, self.steps
        self._clear()
        return told


@contextmanager
def _asked_to_stop(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C stops at once."""
    asked, first = threading.Event(), [0.0]

    def note(number: int, frame: Any) -> None:
        # A launcher passes the terminal's Ctrl-C on, so that it comes twice within a moment.
        if asked.is_set() and number == signal.SIGINT and time.monotonic() - first[0] > 2:
            raise KeyboardInterrupt
        if not asked.is_set():
            first[0] = time.monotonic()
            asked.set()
            say("Stopping within a step or two, with a checkpoint (Ctrl-C again: at once, without one).")

    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
