"""Training DualEdit's adapters: the edit must be answered, everything else must be left alone.

Every row of a batch is a question bound to one edit, gate open: reliability, generality of wording and of
image (cross-entropy on the new answer), locality (KL from the unedited model's answer distribution). The
published objective draws its locality from unrelated questions; look-alikes and other questions about the
same image are added here, because at answering time the gate will let some of them through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import EditSample, Probe
from ..models.architectures import unwrap
from ..models.prompting import Prompter
from ..runtime.context import bound, describe_prompt, recording, runtime_of
from ..tuners.adapter import active_adapter
from ..tuners.dualedit import DualEditLayer
from ..tuners.dualedit.modules import EditKV


@dataclass(frozen=True)
class TrainSettings:
    """Hyper-parameters of `train_adapters`.

    Attributes:
        steps, batch_size: optimiser steps, and edits in each.
        learning_rate, warmup, weight_decay, grad_clip: AdamW with linear warmup (steps) and cosine decay.
        locality_weight: of the KL, beside 1 for the cross-entropy.
        seed: for the choice of probes.
    """

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    locality_weight: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Questions bound to edits, as model inputs.

    Attributes:
        inputs: of the model, labels included.
        route: [R] int64, the edit of each row.
        keep: [R] bool, rows whose answer must stay what it was.
    """

    inputs: dict[str, Tensor]
    route: Tensor
    keep: Tensor


def teacher_forced(prompter: Prompter, probes: Sequence[Probe], eos: int | None) -> dict[str, Tensor]:
    """Model inputs of questions with their answers behind them, and labels on the answers.

    Prompts are padded on the left and answers on the right, so every answer begins in the same column.
    """
    inputs = prompter.inputs([(p.image, p.prompt) for p in probes])
    answers = [prompter.target_ids(p.image, p.prompt, p.answer or "", eos) for p in probes]
    ids = inputs["input_ids"]
    width = max(len(answer) for answer in answers)
    tail = torch.zeros((len(probes), width), dtype=ids.dtype)
    real = torch.zeros_like(tail)
    for row, answer in enumerate(answers):
        tail[row, : len(answer)] = answer
        real[row, : len(answer)] = 1
    # Token types go on with 0, text, behind the question.
    full = {}
    for name, value in inputs.items():
        per_token = value.shape == ids.shape
        full[name] = torch.cat([value, torch.zeros_like(tail).to(value)], dim=1) if per_token else value
    full["labels"] = torch.cat([torch.full_like(ids, -100), tail.masked_fill(real == 0, -100)], dim=1)
    full["input_ids"] = torch.cat([ids, tail], dim=1)
    full["attention_mask"] = torch.cat([inputs["attention_mask"], real], dim=1)
    return full


_KEPT = ("t_loc", "m_loc", "hard_image", "hard_question")


def _choose(options: Sequence, generator: torch.Generator):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def training_probes(sample: EditSample, generator: torch.Generator) -> tuple[list[Probe], list[Probe]]:
    """Questions of one edit: those that must change, and those that must not.

    Wordings come from the sample's rephrases, never from its "t_gen" probes: those are the test's.
    """
    request = sample.request
    wordings = [request.prompt, *sample.rephrases]
    change = [
        Probe(request.image, request.prompt, request.target),
        Probe(request.image, _choose(wordings, generator), request.target),
    ]
    if sample.generality.get("v_gen"):
        image = _choose(sample.generality["v_gen"], generator).image
        prompt = request.prompt if torch.rand(1, generator=generator) < 0.7 else _choose(wordings, generator)
        change.append(Probe(image, prompt, request.target))
    kinds = [sample.locality[name] for name in _KEPT if name in sample.locality]
    kinds = [[p for p in probes if p.answer] for probes in kinds]
    kinds = [probes for probes in kinds if probes]
    # One of the kinds at a time: over the steps each gets its share, at a quarter of the cost.
    return change, [_choose(_choose(kinds, generator), generator)] if kinds else []


def make_batch(
    prompter: Prompter, samples: Sequence[EditSample], eos: int | None, generator: torch.Generator
) -> tuple[dict[str, Tensor], Batch]:
    """The edits themselves and the questions bound to them, as model inputs."""
    edits = [Probe(s.request.image, s.request.prompt, s.request.target) for s in samples]
    probes, route, keep = [], [], []
    for number, sample in enumerate(samples):
        change, same = training_probes(sample, generator)
        probes += change + same
        route += [number] * (len(change) + len(same))
        keep += [False] * len(change) + [True] * len(same)
    rows = Batch(teacher_forced(prompter, probes, eos), torch.tensor(route), torch.tensor(keep))
    return teacher_forced(prompter, edits, eos), rows


def project_edits(
    model: nn.Module, layers: dict[str, DualEditLayer], name: str, inputs: dict[str, Tensor]
) -> dict[str, dict[str, EditKV]]:
    """Keys and values of a batch of edits, with gradients: layer name and part to `EditKV`."""
    base = unwrap(model)
    call = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad(), recording(base) as states:
        base(**call, use_cache=False)
    attended = inputs["attention_mask"] != 0
    length = attended.sum(1)
    start = length.cumsum(0) - length
    return {
        layer_name: {
            part: EditKV(*adapter.project_edit(states[layer_name][attended]), start, length)
            for part, adapter in layer.dualedit_adapter[name].items()
        }
        for layer_name, layer in layers.items()
    }


def losses(logits: Tensor, before: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of rows that must change, KL(before || now) of those that must not; token means."""
    labels = batch.inputs["labels"][:, 1:]
    target = labels != -100
    change = target & ~batch.keep[:, None]
    same = target & batch.keep[:, None]
    rel = nn.functional.cross_entropy(logits[:, :-1][change].float(), labels[change])
    now = logits[:, :-1][same].float().log_softmax(-1)
    old = before[same[batch.keep]].float().log_softmax(-1)
    return rel, nn.functional.kl_div(now, old, log_target=True, reduction="batchmean")


def train_step(
    model: nn.Module, layers, name: str, edits: dict[str, Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Both losses of one batch, with gradients to the adapters."""
    base = unwrap(model)
    call = {k: v for k, v in batch.inputs.items() if k != "labels"}
    kept = {k: v[batch.keep] for k, v in call.items() if k != "pixel_values"}
    if "pixel_values" in call:
        with_image = describe_images(base, call["input_ids"])
        kept["pixel_values"] = call["pixel_values"][batch.keep[with_image]]
    with torch.no_grad(), bound(base, batch.route, {}):
        before = base(**kept, use_cache=False).logits[:, :-1]
    with bound(base, batch.route, project_edits(model, layers, name, edits)):
        # Labels would make the model compute a loss nobody needs; the masks still have to know the answers.
        logits = _with_labels(base, call, batch.inputs["labels"])
    return losses(logits, before, batch)


def describe_images(base: nn.Module, input_ids: Tensor) -> Tensor:
    """[number of images] int64: the row of each image, in the processor's order (one a row)."""
    ids = torch.tensor(runtime_of(base).image_ids)
    return torch.isin(input_ids, ids).any(1).nonzero()[:, 0]


def _with_labels(base: nn.Module, call: dict[str, Tensor], labels: Tensor) -> Tensor:
    from ..runtime.context import framed

    prompt = describe_prompt(
        call["input_ids"],
        call["attention_mask"],
        labels,
        runtime_of(base).image_ids,
        tuple(labels.shape),
        labels.device,
    )
    with framed(runtime_of(base), "masks", prompt):
        return base(**call, use_cache=False).logits


def _schedule(step: int, settings: TrainSettings) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimise(
    parameters: Sequence[nn.Parameter],
    losses_of: Callable[[int], tuple[Tensor, Tensor]],
    settings: TrainSettings,
    on_step: Callable[[int, float, float], None] | None = None,
) -> list[tuple[float, float]]:
    """AdamW with warmup, cosine decay and clipping on the two losses that `losses_of(step)` returns.

    Returns:
        the two losses (change, keep) of every step.
    """
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, settings))
    history = []
    for step in range(settings.steps):
        change, keep = losses_of(step)
        optimizer.zero_grad(set_to_none=True)
        (change + settings.locality_weight * keep).backward()
        nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        schedule.step()
        history.append((float(change.detach()), float(keep.detach())))
        if on_step is not None:
            on_step(step, *history[-1])
    return history


def trainable_layers(model: nn.Module) -> tuple[str, dict[str, DualEditLayer]]:
    """The active adapter's name and its layers by name.

    Raises:
        ValueError: the model holds edits (their keys and values would go stale), or its active adapter is not
            DualEdit's.
    """
    adapter = active_adapter(model)
    name, config, group = adapter.name, adapter.config, adapter.group
    if len(group):
        raise ValueError(f"model holds {len(group)} edits: train on an adapter without any.")
    layers = adapter.layers
    if not adapter.method.trains_adapters:
        raise ValueError(
            f"adapter {name!r} is a {type(config).__name__}: only DualEdit's adapters are trained."
        )
    return name, layers


def train_adapters(
    model: nn.Module,
    prompter: Prompter,
    next_samples: Callable[[int], Sequence[EditSample]],
    settings: TrainSettings,
    on_step: Callable[[int, float, float], None] | None = None,
) -> list[tuple[float, float]]:
    """Train the active DualEdit adapter in place; the base model stays frozen.

    Args:
        model: from `inject_dualedit`, with no stored edits (their keys and values would go stale).
        next_samples: step number to `settings.batch_size` samples, with one image a question at most.
        on_step: called with the step and the two losses.

    Returns:
        the two losses (change, keep) of every step.

    Raises:
        ValueError: the model holds edits, or its active adapter is not DualEdit's.
    """
    name, layers = trainable_layers(model)
    parameters = [p for layer in layers.values() for p in layer.dualedit_adapter[name].parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    eos = unwrap(model).generation_config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    generator = torch.Generator().manual_seed(settings.seed)

    def losses_of(step: int) -> tuple[Tensor, Tensor]:
        edits, batch = make_batch(prompter, next_samples(step), eos, generator)
        return train_step(model, layers, name, edits, batch)

    return optimise(parameters, losses_of, settings, on_step)
