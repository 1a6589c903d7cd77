"""A training run made ready, and one optimiser step of it, on one process or many."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..data import EditSample
from ..models.prompting import Prompter
from ..tuners import inject_dualedit
from .batches import Batch, Feed, make_batch, untrained_terms
from .recipe import TERMS, Recipe, learning_rate_at
from .step import TrainingStep


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


def open_accelerator() -> Any:
    """accelerate's view of the processes and devices that this run has.

    Raises:
        ValueError: it was told to compute in fp16, where the losses would overflow.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    # Buffers are frozen, and the same everywhere.
    still = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=not gpu, kwargs_handlers=[still])
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"accelerate's mixed_precision={accelerator.mixed_precision!r}: choose 'no' or 'bf16'; this "
            "command's own --precision is enough."
        )
    return accelerator


def _in_bf16(precision: str, accelerator: Any) -> bool:
    gpu = accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16" or (precision == "auto" and (gpu or accelerator.mixed_precision == "bf16"))


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
    bf16 = _in_bf16(recipe.precision, accelerator)
    if bf16:
        for parameter in base.parameters():  # not the buffers: rotary frequencies lose too much in bf16
            parameter.data = parameter.data.to(torch.bfloat16)
    if accelerator.device.type == "cpu" and hasattr(base, "set_attn_implementation"):
        # On a CPU the fused attention kernel's backward costs several times the plain one's.
        base.set_attn_implementation("eager")
    model = inject_dualedit(
        base,
        text_layer=recipe.text_layer,
        vis_layer=recipe.vis_layer,
        mid_dim=recipe.mid_dim,
        num_heads=recipe.num_heads,
        threshold=recipe.threshold,
    )
    model.eval()
    step = TrainingStep(model, recipe.recompute, torch.bfloat16 if bf16 else None)
    for layer in step.upper.layers.values():
        layer.dualedit_adapter[step.adapter].float()
    sharded = accelerator.distributed_type.value == "FSDP"
    if not sharded:  # FSDP moves the pieces itself
        base.to(accelerator.device)
    feeds, notes = _feeds(step, Prompter(processor, recipe.template), samples, held_out, recipe, accelerator)
    optimizer = adamw(step, recipe, quick=accelerator.device.type == "cpu" and not sharded)
    module, wrapped = accelerator.prepare(step, optimizer)
    return Setting(
        recipe, accelerator, model, step, module, wrapped.optimizer, *feeds, _fingerprint(samples), notes
    )


def adamw(step: TrainingStep, recipe: Recipe, quick: bool) -> torch.optim.AdamW:
    """The optimiser of the adapters' weights.

    Args:
        quick: update each weight in one pass; for whole weights on a CPU.
    """
    betas = (recipe.beta1, recipe.beta2)
    parameters = list(step.trained().values())
    optimizer = torch.optim.AdamW(
        parameters, recipe.learning_rate, betas=betas, weight_decay=recipe.weight_decay, fused=quick or None
    )
    if quick:
        # The one-pass update does not count as a change of the weights, and what was computed from them
        # before (`EditCrossAttention.query_weights`) would be taken for current.
        optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(parameters))
    return optimizer


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
    # FSDP leaves the outermost weights whole after a forward, for the backward that does not come here.
    # Saving cuts them up again on the process that saves, and at the next step the others would not know.
    for part in ready.module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
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
