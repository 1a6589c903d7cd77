"""Routing keys made from training facts: the same fact close, everything else apart, on frozen states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import EditSample, Probe
from ..models.architectures import unwrap
from ..models.placement import to_device
from ..models.prompting import Prompter
from ..runtime.context import describe_prompt, recording, runtime_of
from ..tuners import EditLayer
from ..tuners.adapter import active_adapter
from .dualedit import TrainSettings, optimise

SCALE, CENTRE = 16.0, 0.5  # a cosine above CENTRE is called the same fact


@dataclass
class Questions:
    """R questions as the gate's layer sees them.

    Attributes:
        states: [R, L, D] half precision, what the layer puts out (BalancEdit: what enters it); prompts end in
            the last column.
        text, image: [R, L] bool.
        fact: [R] int64, which fact a question is about; negative: about none that is edited.
        anchor: [R] bool, the edits themselves.
        pictured: [R, D] float32, mean image token as it enters the decoder; zero where there is none.
    """

    states: Tensor
    text: Tensor
    image: Tensor
    fact: Tensor
    anchor: Tensor
    pictured: Tensor

    def last(self) -> Tensor:
        """[R] int64: prompts are padded on the left."""
        return torch.full((len(self.fact),), self.states.shape[1] - 1)


def routing_probes(sample: EditSample) -> tuple[list[Probe], list[Probe]]:
    """Questions about a sample's fact, the edit first, and questions about others.

    Wordings come from the request and its rephrases, never from "t_gen" (the test's); of "v_gen" only the
    images are used.
    """
    request = sample.request
    wordings = [request.prompt, *sample.rephrases]
    same = [Probe(request.image, wording) for wording in wordings]
    for number, probe in enumerate(sample.generality.get("v_gen", ())):
        same.append(Probe(probe.image, wordings[number % len(wordings)]))
    return same, [probe for probes in sample.locality.values() for probe in probes]


class _Seen(Exception):
    """Leaves a forward once the gate's layer has run."""


def _states(base: nn.Module, layer: EditLayer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """`Questions.states`, without running the layers above, and `States.pictured`."""

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        raise _Seen

    handle = layer.register_forward_hook(leave)
    with torch.no_grad(), recording(base) as states:
        try:
            base(**to_device(inputs, base), use_cache=False)
        except _Seen:
            pass
        finally:
            handle.remove()
    return states[layer.layer_name], states.mean_image


class _Numbers:
    """Facts as numbers; a probe that names no fact gets a negative one of its own."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}
        self._alone = 0

    def of(self, fact: object) -> int:
        if fact is None:
            self._alone -= 1
            return self._alone
        return self._known.setdefault(fact, len(self._known))


def read_questions(
    model: nn.Module, prompter: Prompter, samples: Sequence[EditSample], progress: bool = True
) -> list[Questions]:
    """The questions of each sample, run through the frozen layers below the gate once."""
    layer = _gated_layer(model)
    base, numbers, read = unwrap(model), _Numbers(), []
    for place, sample in enumerate(
        tqdm(samples, desc="reading questions", unit="fact", disable=not progress, mininterval=5)
    ):
        same, others = routing_probes(sample)
        inputs = prompter.inputs([(probe.image, probe.prompt) for probe in (*same, *others)])
        ids, attended = inputs["input_ids"], inputs.get("attention_mask")
        prompt = describe_prompt(
            ids, attended, None, runtime_of(base).image_ids, tuple(ids.shape), ids.device
        )
        own = numbers.of(sample.fact or ("sample", place))
        states, pictured = _states(base, layer, inputs)
        read.append(
            Questions(
                states=states.to(torch.float16),
                text=prompt.text,
                image=prompt.image,
                fact=torch.tensor([own] * len(same) + [numbers.of(probe.fact) for probe in others]),
                anchor=torch.arange(len(same) + len(others)) == 0,
                pictured=states.new_zeros(states.shape[0], states.shape[2]) if pictured is None else pictured,
            )
        )
    return read


def _gated_layer(model: nn.Module, kind: str | None = None) -> EditLayer:
    adapter = active_adapter(model)
    name, config = adapter.name, adapter.config
    for layer in adapter.layers.values():
        if layer.router(name) is not None and kind in (None, config.key):
            return layer
    inject = f"inject_{config.method.name}"
    raise ValueError(
        f"adapter {name!r} ({type(config).__name__}) has no {kind or 'learned'} routing key: inject it with "
        f"{inject}(model, ..., key={kind or 'learned'!r})."
    )


def join(questions: Sequence[Questions]) -> Questions:
    """One batch of several samples' questions, padded on the left."""
    width = max(q.states.shape[1] for q in questions)

    def wide(value: Tensor) -> Tensor:
        return nn.functional.pad(value, (*(0, 0) * (value.ndim - 2), width - value.shape[1], 0))

    return Questions(
        *(torch.cat([wide(getattr(q, name)) for q in questions]) for name in ("states", "text", "image")),
        *(torch.cat([getattr(q, name) for q in questions]) for name in ("fact", "anchor", "pictured")),
    )


def routing_loss(keys: Tensor, fact: Tensor, anchor: Tensor) -> Tensor:
    """Pairwise sigmoid loss between edits and questions.

    Args:
        keys: [R, P] of length 1.
        fact: [R] int64; equal numbers are the same fact.
        anchor: [R] bool, the edits.

    Returns:
        the mean over pairs of the same fact, plus the mean over the hardest twentieth of the other pairs:
        look-alikes are few among the unrelated, and a gate fails by its worst neighbours.
    """
    logits = SCALE * (keys[anchor] @ keys.T - CENTRE)
    same = fact[anchor][:, None] == fact[None]
    itself = torch.zeros_like(same)
    itself[torch.arange(int(anchor.sum())), anchor.nonzero()[:, 0]] = True
    attract = nn.functional.softplus(-logits[same & ~itself])
    repel = nn.functional.softplus(logits[~same])
    hardest = repel.topk(max(1, len(repel) // 20)).values
    return attract.mean() + hardest.mean()


def train_routing_key(
    model: nn.Module,
    prompter: Prompter,
    samples: Sequence[EditSample],
    settings: TrainSettings | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
    progress: bool = True,
) -> list[float]:
    """Train the learned routing key of the active DualEdit adapter in place; nothing else changes.

    Every sample's questions are run through the frozen lower layers once and kept in half precision (R x L x
    D x 2 bytes a sample); a step then runs the head only. Positives are the edit's own rephrases and other
    images, negatives its locality probes (look-alikes, other questions about the image, unrelated ones) and
    everything of the other samples in the batch.

    Args:
        model: from `inject_dualedit(..., key="learned")`, with no stored edits (their keys would go stale).
        samples: training facts; entities that the test uses must not be among them. Facts are told apart by
            (entity, family): facts of several worlds need distinct entity numbers.
        settings: `batch_size` samples a step; `locality_weight` is not used. None: 1,500 steps of 48 samples
            at a learning rate of 1e-3.
        on_step: called with the step, its loss and 0.

    Returns:
        the loss of every step.

    Raises:
        ValueError: no samples, a model that holds edits, or an adapter without a learned key.
    """
    settings = settings or TrainSettings(steps=1500, batch_size=48, learning_rate=1e-3)
    adapter = active_adapter(model)
    name, group = adapter.name, adapter.group
    layer = _gated_layer(model, "learned")
    if len(group):
        raise ValueError(f"model holds {len(group)} edits: train on an adapter without any.")
    if not samples:
        raise ValueError("samples is empty: pass at least one fact.")
    router = layer.dualedit_router[name]
    questions = read_questions(model, prompter, samples, progress)
    generator = torch.Generator().manual_seed(settings.seed)
    parameters = list(router.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)

    def losses_of(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(questions), (settings.batch_size,), generator=generator)
        batch = join([questions[int(i)] for i in chosen.unique()])
        keys = router(batch.states.to(parameters[0].device), batch.text, batch.image, batch.last())
        loss = routing_loss(keys, batch.fact.to(keys.device), batch.anchor.to(keys.device))
        return loss, torch.zeros_like(loss)

    return [change for change, _ in optimise(parameters, losses_of, settings, on_step)]


def fit_pooled_key(
    model: nn.Module,
    prompter: Prompter,
    samples: Sequence[EditSample],
    shrinkage: float = 0.1,
    image_weight: float = 3.0,
    progress: bool = True,
) -> dict[str, int]:
    """Fit the pooled key of the active adapter in place, in closed form; nothing else changes.

    Linear discriminant analysis (Fisher 1936; Rao 1948), of the last token's state and of the mean image
    token on their own: the covariance of what differs between an edit and its own rephrases and other images
    is made the unit matrix, and of the directions left those are kept in which the edits differ most.

    Args:
        model: from `inject_dualedit(..., key="pooled")` or `inject_balancedit(..., key="pooled")`, with no
            stored edits (their keys would go stale).
        samples: training facts with rephrases or other images; entities that the test uses must not be
            among them. As many as the key has dimensions, or more: with fewer, directions nobody varied
            decide.
        shrinkage: share of the mean variance that is added to each direction, above 0: more trusts the
            samples less.
        image_weight: how many times the cosine of the pictures counts that of the questions, at least 0.

    Returns:
        {"facts", "pairs"} that it was fitted on.

    Raises:
        ValueError: no samples or none with another question about its fact, a model that holds edits, an
            adapter without a pooled key, a shrinkage that is not above 0, an image weight below 0.
    """
    adapter = active_adapter(model)
    name, group = adapter.name, adapter.group
    layer = _gated_layer(model, "pooled")
    if len(group):
        raise ValueError(f"model holds {len(group)} edits: fit the key of an adapter without any.")
    if not shrinkage > 0:
        raise ValueError(f"shrinkage={shrinkage}: pass a number above 0, such as 0.1.")
    if not image_weight >= 0:
        raise ValueError(f"image_weight={image_weight}: pass a number from 0 on, such as 3.")
    router = layer.router(name)
    seen: dict[nn.Module, tuple[list, list]] = {router.question: ([], []), router.picture: ([], [])}
    own = []
    for place, read in enumerate(read_questions(model, prompter, samples, progress)):
        again = (read.fact == read.fact[read.anchor]) & ~read.anchor
        for (edits, others), states in zip(seen.values(), (read.states[:, -1], read.pictured), strict=True):
            unit = nn.functional.normalize(states.double(), dim=-1)
            edits.append(unit[read.anchor])
            others.append(unit[again])
        own += [place] * int(again.sum())
    if not own:
        raise ValueError(
            f"samples: none of {len(samples)} has a rephrase or another image, so nothing tells what varies "
            "within a fact. Pass facts that have."
        )
    with torch.no_grad():
        router.image_weight.fill_(image_weight)
        for half, found in seen.items():
            edits, others = (torch.cat(states) for states in found)
            apart = (others - edits[own]) / 2**0.5
            known, moved = (states[(states != 0).any(1)] for states in (edits, apart))
            centre = known.mean(0) if len(known) else torch.zeros_like(edits[0])
            half.centre.copy_(centre)
            if len(moved):  # else nothing varies in it: its map stays as it was
                half.map.copy_(_discriminants(known - centre, moved, shrinkage)[: len(half.map)])
    return {"facts": len(samples), "pairs": len(own)}


def _discriminants(edits: Tensor, apart: Tensor, shrinkage: float) -> Tensor:
    """Directions [D, D], best first, for centred edits [N, D] and differences [R, D] within a fact."""
    within = apart.T @ apart / len(apart)
    within += shrinkage * within.trace() / len(within) * torch.eye(len(within), dtype=within.dtype)
    spread, axes = torch.linalg.eigh(within)
    whitened = axes * spread.rsqrt()
    between = edits @ whitened
    return (whitened @ torch.linalg.eigh(between.T @ between)[1].flip(1)).T
