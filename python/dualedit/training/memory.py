"""What a training run takes: measured on a few real steps, and what to lower when memory runs out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from .frozen import quick_layers
from .recipe import Recipe

if TYPE_CHECKING:
    from .setting import Setting

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
        by_parts: whether the frozen lower layers run once a batch.
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
    by_parts: bool
    rows: float
    tokens: float

    def total_seconds(self, evaluate_every: int) -> float:
        """Of the whole run, held-out measurements included."""
        return self.steps * self.seconds + self.steps / evaluate_every * self.held_out_seconds

    def text(self, recipe: Recipe) -> str:
        """A few lines for the user."""
        hours = self.total_seconds(recipe.evaluate_every) / 3600
        total = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
        way = (
            "once a batch" if self.by_parts else "anew for every loss (this model's layers do not run alone)"
        )
        return "\n".join(
            (
                f"weights: {self.trained / 1e6:.2f} million trained, {self.frozen / 1e6:.1f} million frozen",
                f"a step: {self.rows:.0f} rows, {self.tokens:.0f} tokens a process; frozen layers run {way}",
                f"time: {self.seconds:.2f} s a step, {total} for {self.steps} steps on this machine",
                f"memory: at most {self.peak_bytes / _GIB:.2f} GiB of {self.device} memory in these steps",
                f"disk: {recipe.keep_checkpoints} checkpoints of {self.checkpoint_bytes / _GIB:.3f} GiB",
            )
        )


def dry_run(ready: Setting, steps: int = 3) -> Estimate:
    """Measure the first steps of a run, the first of them as a warm-up. Nothing is written.

    The adapters are changed by the steps taken; throw the model away afterwards.
    """
    gpu = ready.accelerator.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with quick_layers(ready.step.base):
        return _measure(ready, steps, gpu)


def _measure(ready: Setting, steps: int, gpu: bool) -> Estimate:
    from .batches import count_edits
    from .checkpoint import optimizer_state
    from .setting import held_out_loss, take_step

    times, rows, tokens = [], 0, 0
    for number in range(steps):
        batches = ready.feed.batches(number)
        counted = count_edits(batches)
        rows, tokens = rows + counted["rows"], tokens + counted["tokens"]
        began = perf_counter()
        take_step(ready, batches, number)
        if gpu:
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if gpu else _peak_of_process()
    evaluating = 0.0
    if ready.held_out is not None:
        began = perf_counter()
        held_out_loss(ready)
        evaluating = perf_counter() - began
    trained = ready.step.trained()
    state = optimizer_state(ready.optimizer, trained)
    held = [*trained.values(), *(tensor for each in state.values() for tensor in each.values())]
    return Estimate(
        seconds=median(times[1:] or times),
        steps=ready.recipe.steps,
        peak_bytes=peak,
        device="GPU" if gpu else "CPU",
        trained=sum(p.numel() for p in trained.values()),
        frozen=sum(p.numel() for p in ready.model.parameters() if not p.requires_grad),
        checkpoint_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
        held_out_seconds=evaluating,
        by_parts=ready.step.by_parts,
        rows=rows / steps,
        tokens=tokens / steps,
    )


def _peak_of_process() -> int:
    """Most memory that this process has had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
