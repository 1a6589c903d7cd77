"""A training run made ready: model, adapters, optimiser and data, on one process or many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..models.prompting import Prompter
from ..runtime.context import runtime_of
from ..tuners import inject_dualedit
from .batches import BatchMaker
from .copying import start_by_copying
from .data import fingerprint_of
from .feed import Feed
from .questions import untrained_terms
from .recipe import Recipe
from .step import TrainingStep


@dataclass
class Setup:
    """A run made ready: the step on its devices, its data, and how many processes there are."""

    recipe: Recipe
    accelerator: Any
    model: nn.Module
    step: TrainingStep
    module: nn.Module
    optimizer: torch.optim.Optimizer
    feed: Feed
    held_out: Feed | None
    notes: list[str] = field(default_factory=list)

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.accelerator.is_main_process

    @cached_property
    def samples(self) -> str:
        """A fingerprint of the training edits. Made when it is first asked for: it reads every picture."""
        return fingerprint_of(self.feed.samples)

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


def _cast(base: nn.Module) -> None:
    """Cast a model's weights to bf16, in place.

    Buffers stay as they are: rotary frequencies lose too much in bf16. So does batch norm, whose weights must
    have the dtype of its running statistics.
    """
    for module in base.modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)


def set_up(
    base: nn.Module,
    processor: Any,
    samples: Sequence[EditSample],
    held_out: Sequence[EditSample],
    recipe: Recipe,
    accelerator: Any,
) -> Setup:
    """Put adapters on a model and everything a run needs around them.

    Raises:
        ValueError: no samples, layers that do not exist, a batch that cannot be divided.
    """
    if not samples:
        raise ValueError("samples is empty: there is nothing to train on.")
    torch.manual_seed(recipe.seed)
    base.requires_grad_(False).eval()
    bf16 = _in_bf16(recipe.precision, accelerator)
    if bf16:
        _cast(base)
    if accelerator.device.type == "cpu" and hasattr(base, "set_attn_implementation"):
        # On a CPU the fused attention kernel's backward costs several times the plain one's.
        base.set_attn_implementation("eager")
    names = ("text_layer", "vis_layer", "mid_dim", "num_heads", "threshold")
    fields = {name: getattr(recipe, name) for name in names}
    if recipe.adapters is not None:  # trained adapters have settings of their own: only what was asked for
        fields = {name: value for name, value in fields.items() if value != getattr(Recipe, name)}
    model = inject_dualedit(base, adapter=recipe.adapters, **fields)
    model.eval()
    step = TrainingStep(model, recipe.recompute, torch.bfloat16 if bf16 else None, recipe.by_difficulty)
    for layer in step.layers.values():
        layer.dualedit_adapter[step.adapter].float()
    sharded = accelerator.distributed_type.value == "FSDP"
    if not sharded:  # FSDP moves the pieces itself
        base.to(accelerator.device)
    prompter = Prompter(processor, recipe.template)
    makers, notes = _batch_makers(step, prompter, samples, recipe, sharded)
    if recipe.copying and recipe.adapters is None and recipe.text_layer is not None:
        found = start_by_copying(
            model, prompter.inputs([(None, samples[0].request.prompt)]), recipe.copying, seed=recipe.seed
        )
        notes.append(
            f"The text adapter starts by copying: of {found.tested} tokens that it was not fitted on, it "
            f"tells {found.found:.0%} apart."
        )
    feeds = _feeds(makers, samples, held_out, recipe, accelerator)
    optimizer = torch.optim.AdamW(
        list(step.trained().values()), recipe.learning_rate, betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    module, wrapped = accelerator.prepare(step, optimizer)
    return Setup(recipe, accelerator, model, step, module, wrapped.optimizer, *feeds, notes)


def _batch_makers(
    step: TrainingStep, prompter: Prompter, samples: Sequence[EditSample], recipe: Recipe, sharded: bool
) -> tuple[BatchMaker, list[str]]:
    """What makes batches, in the way that saves most among those that give the right answers; and notes."""
    base, weights = step.base, recipe.weights()
    eos = getattr(base.generation_config, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list) else eos
    plain = BatchMaker(prompter, weights, eos, list(runtime_of(base).image_ids))
    packing = replace(plain, pack=True)
    notes = [
        f"No edit has a question for {term}: it is not trained." for term in untrained_terms(samples, weights)
    ]
    first = samples[: min(2, len(samples))]
    batch, packed = (
        make(first, [torch.Generator().manual_seed(i) for i, _ in enumerate(first)])
        for make in (plain, packing)
    )
    if not step.choose_way(batch):
        notes.append("The layers of this model do not run on their own: every loss runs the whole model.")
    maker = packing if recipe.pack and step.same_answers(packed, batch) else plain
    if recipe.keep_gib and (sharded or not step.partial):
        notes.append(f"keep_gib={recipe.keep_gib:g} is not used: FSDP or this model runs the whole of it.")
    elif recipe.keep_gib:
        maker = replace(maker, one_by_one=True)
        step.frozen.keep_bytes = int(recipe.keep_gib * 2**30)
    return maker, notes


def _feeds(
    make: BatchMaker,
    samples: Sequence[EditSample],
    held_out: Sequence[EditSample],
    recipe: Recipe,
    accelerator: Any,
) -> tuple[Feed, Feed | None]:
    """The feeds of training and of the held-out edits."""
    processes = accelerator.num_processes
    spread = {"process": accelerator.process_index, "processes": processes}
    feed = Feed(
        samples, make, recipe.batch_size, recipe.accumulate, recipe.seed, **spread, shuffle=recipe.shuffle
    )
    if not held_out:
        return feed, None
    # Where the layers are cut up, all processes must take the same way at the same time.
    if accelerator.distributed_type.value == "FSDP":
        spread = {"process": 0, "processes": 1}
    size = max(1, recipe.batch_size // processes) * spread["processes"]
    return feed, Feed(held_out, make, size, 1, recipe.seed + 1, **spread, shuffle=False, once=True)
