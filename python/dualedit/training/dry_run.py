"""What a training run takes: measured on a few real steps, and what to lower when memory runs out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from .checkpoint import optimizer_state
from .optimise import held_out_loss, take_step
from .parts import Batch, count_edits
from .recipe import Recipe
from .setup import Setup
from .step import on_device

_GIB = 2**30


def explain_out_of_memory(error: BaseException, recipe: Recipe) -> str | None:
    """What to tell the user about an error that means "no memory left"; None for another one."""
    text = str(error)
    cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text
    if not (isinstance(error, torch.OutOfMemoryError) or cpu):
        return None
    where = "memory" if cpu else "GPU memory"
    remedies = []
    if recipe.precision == "fp32":
        remedies.append("precision=bf16")
    if recipe.batch_size // recipe.accumulate > 1:
        remedies.append(
            f"accumulate={2 * recipe.accumulate} (same result, batch_size={recipe.batch_size} in more parts)"
        )
    if not recipe.recompute:
        remedies.append("recompute=true (slower)")
    if recipe.hard_locality > 0:
        remedies.append("hard_locality=0")
    remedies.append(f"mid_dim below {recipe.mid_dim}")
    remedies.append("FSDP over several GPUs")
    return f"No {where} left. Try, in this order: {'; '.join(remedies)}."


@dataclass(frozen=True)
class Estimate:
    """What a run will take, from a few of its steps.

    Attributes:
        seconds: median of a step.
        steps: of the whole run.
        peak_bytes: most memory that was in use: of the GPU, or of this process on a CPU.
        device: "GPU" or "CPU".
        trained, frozen: numbers of weights.
        checkpoint_bytes: size of one checkpoint file.
        held_out_seconds: of one measurement of the held-out loss, or 0.
        partial: whether the layers above the first edited one run on their own.
        kept_bytes: of what the frozen layers make of all training edits (see `Recipe.keep_gib`).
        rows, tokens: of the measured batches, mean over the steps and processes.
    """

    seconds: float
    steps: int
    peak_bytes: int
    device: str
    trained: int
    frozen: int
    checkpoint_bytes: int
    held_out_seconds: float
    partial: bool
    kept_bytes: int
    rows: float
    tokens: float

    def total_seconds(self, evaluate_every: int) -> float:
        """Of the whole run, held-out measurements included."""
        return self.steps * self.seconds + self.steps / evaluate_every * self.held_out_seconds

    def text(self, recipe: Recipe) -> str:
        """A few lines for the user."""
        hours = self.total_seconds(recipe.evaluate_every) / 3600
        total = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
        way = "once" if self.partial else "anew for every loss (this model's layers do not run on their own)"
        lines = [
            f"weights: {self.trained / 1e6:.2f} million trained, {self.frozen / 1e6:.1f} million frozen",
            f"a step: {self.rows:.0f} rows, {self.tokens:.0f} tokens a process; frozen layers run {way}",
            f"time: {self.seconds:.2f} s a step, {total} for {self.steps} steps on this machine",
            f"memory: at most {self.peak_bytes / _GIB:.2f} GiB of {self.device} memory in these steps",
            f"disk: {recipe.keep_checkpoints} checkpoints of {self.checkpoint_bytes / _GIB:.3f} GiB",
        ]
        if self.kept_bytes:
            kept = self.kept_bytes / _GIB + 0.005  # rounded up
            lines.append(f"frozen layers run once in the whole run with keep_gib={kept:.2f} of main memory")
        return "\n".join(lines)


def dry_run(setup: Setup, steps: int = 3) -> Estimate:
    """Measure the first steps of a run, the first of them as a warm-up. Nothing is written.

    The adapters are changed by the steps taken; throw the model away afterwards.
    """
    gpu = setup.accelerator.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times, rows, tokens = [], 0, 0
    for number in range(steps):
        batches = setup.feed.batches(number)
        counted = count_edits(batches)
        rows, tokens = rows + counted["rows"], tokens + counted["tokens"]
        began = perf_counter()
        take_step(setup, batches, number)
        if gpu:
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if gpu else _peak_of_process()
    evaluating = 0.0
    if setup.held_out is not None:
        began = perf_counter()
        held_out_loss(setup)
        evaluating = perf_counter() - began
    trained = setup.step.trained()
    state = optimizer_state(setup.optimizer, trained)
    held = [*trained.values(), *(tensor for each in state.values() for tensor in each.values())]
    return Estimate(
        seconds=median(times[1:] or times),
        steps=setup.recipe.steps,
        peak_bytes=peak,
        device="GPU" if gpu else "CPU",
        trained=sum(p.numel() for p in trained.values()),
        frozen=sum(p.numel() for p in setup.model.parameters() if not p.requires_grad),
        checkpoint_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
        held_out_seconds=evaluating,
        partial=setup.step.partial,
        kept_bytes=_bytes_of_frozen_runs(setup, batches),
        rows=rows / steps,
        tokens=tokens / steps,
    )


def _bytes_of_frozen_runs(setup: Setup, batches: Sequence[Batch]) -> int:
    """What keeping the frozen model's runs of all training edits would take, judged by some batches."""
    step, edits = setup.step, sum(batch.edits for batch in batches)
    if not step.partial or not edits or setup.accelerator.distributed_type.value == "FSDP":
        return 0  # nothing can be kept
    parts = [part for batch in batches for part in on_device(batch, step.base).parts]
    return sum(step.frozen.run(part).nbytes() for part in parts) * len(setup.feed.samples) // edits


def _peak_of_process() -> int:
    """Most memory that this process has had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
