"""One optimiser step of a training run, and its loss on held-out edits, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .parts import Batch
from .recipe import TERMS, Recipe, learning_rate_at
from .setup import Setup


def take_step(
    run: Setup, batches: Sequence[Batch], number: int, stop: bool = False
) -> tuple[Tensor, Tensor, float, bool]:
    """One optimiser step.

    Args:
        batches: this process's, one forward and backward each.
        stop: whether this process was asked to stop.

    Returns:
        this process's sums of the losses [6], its counts [6], the norm of the gradient, and whether any
        process was asked to stop.
    """
    recipe, accelerator = run.recipe, run.accelerator
    counts = sum(batch.counts() for batch in batches)
    totals = run.total(torch.cat([counts, torch.tensor([float(stop)], dtype=counts.dtype)]))
    share = torch.tensor([recipe.weights()[term] for term in TERMS]) / totals[:-1].clamp(min=1)
    # DDP and FSDP average the processes' gradients; the loss is a sum over all their answers.
    share = (share * accelerator.num_processes).float().to(accelerator.device)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(recipe, number)
    run.optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(TERMS), device=accelerator.device)
    for place, batch in enumerate(batches):
        more = place < len(batches) - 1
        with accelerator.no_sync(run.module) if more else nullcontext():
            found = run.module(batch)
            accelerator.backward((found * share).sum())
        sums += found.detach()
    norm = nn.utils.clip_grad_norm_(list(run.step.trained().values()), recipe.grad_clip or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise ValueError(
            f"Step {number + 1}: the gradient is not finite. Lower learning_rate={recipe.learning_rate}, set "
            "grad_clip, or train in precision fp32."
        )
    run.optimizer.step()
    return sums.cpu(), counts, norm, bool(totals[-1] > 0)


@torch.no_grad()
def held_out_loss(run: Setup) -> dict[str, float]:
    """The weighted loss over the held-out edits ("loss"), and each term's mean."""
    feed = run.held_out
    sums, counts = torch.zeros(len(TERMS)), torch.zeros(len(TERMS), dtype=torch.float64)
    for number in range(feed.steps_of_all()):
        for batch in feed.batches(number):
            sums += run.step(batch).cpu()
            counts += batch.counts()
    # FSDP leaves the outermost weights whole after a forward, for the backward that does not come here.
    # Saving cuts them up again on the process that saves, and at the next step the others would not know.
    for part in run.module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    if feed.processes > 1:
        sums, counts = run.total(sums), run.total(counts)
    return figures(sums, counts, run.recipe)


def figures(sums: Tensor, counts: Tensor, recipe: Recipe) -> dict[str, float]:
    """The mean of each term that has questions, and their weighted sum as "loss"."""
    means = {
        term: float(total) / float(count)
        for term, total, count in zip(TERMS, sums, counts, strict=True)
        if count > 0
    }
    return {"loss": sum(recipe.weights()[term] * mean for term, mean in means.items()), **means}
