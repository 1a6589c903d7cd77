"""One training step: the papers' losses of a batch, with gradients to the adapters.

DualEdit (COLM 2025, Sec. 4): cross-entropy on the new answer for the edit itself (reliability), for other
wordings and for other images (generality), and KL(unedited || edited) at the answers of unrelated questions,
with an image and without (locality). Every row is bound to its edit, the gate open: what the gate would keep
out at answering time is what the locality terms are about. Questions that the gate has reason to confuse can
be added as a further locality term. Each answer counts by the mean over its tokens, as in the published code
(the paper's formula sums), and each term by the mean over its answers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.architectures import unwrap
from ..models.placement import to_device
from ..runtime.context import bound, framed, recording, runtime_of
from ..runtime.sequence import Prompt
from ..tuners.dualedit.modules import EditKV
from .batches import CHANGE, IGNORED, Batch, Part
from .dualedit import trainable_layers
from .reach import seen
from .recipe import TERMS
from .upper import UpperPart

# How far apart two ways of computing the same logits may be at any position, in standard deviations of the
# logits: rounding stays far below, a mask or a position that is wrong comes to about 1.
_CLOSE = {torch.float32: 1e-2, torch.float64: 1e-6}
_COARSE = 0.1


class TrainingStep(nn.Module):
    """The losses of a batch as a module, so that DDP and FSDP see one forward a step.

    Args:
        model: from `inject_dualedit`, without stored edits.
        recompute: see `Recipe`.
        autocast: dtype of the adapters' products where their weights are in fp32, or None.

    Attributes:
        by_parts: whether the upper layers run on their own; else the whole model runs for every loss. Decided
            by `choose_way`, which compares the two.

    Raises:
        ValueError: the model holds edits, or its active adapter is not DualEdit's.
    """

    def __init__(self, model: nn.Module, recompute: bool = False, autocast: torch.dtype | None = None):
        super().__init__()
        name, layers = trainable_layers(model)
        self.model = model
        self.adapter = name
        self.autocast = autocast
        self.upper = UpperPart(unwrap(model), layers, name, recompute)
        self.by_parts = True
        model.requires_grad_(False)
        for parameter in self.trained().values():
            parameter.requires_grad_(True)

    @property
    def base(self) -> nn.Module:
        """The Hugging Face model."""
        return unwrap(self.model)

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapters' weights by name: wrapped layer, part, weight."""
        return {
            f"{layer_name}.{name}": parameter
            for layer_name, layer in self.upper.layers.items()
            for name, parameter in layer.dualedit_adapter[self.adapter].named_parameters()
        }

    def forward(self, batch: Batch) -> Tensor:
        """The sums over its answers of each term's losses, [6] float32 in the order of `TERMS`."""
        batch = on_device(batch, self.base)
        kind, dtype = batch.terms.device.type, self.autocast
        with torch.autocast(kind, dtype) if dtype is not None else nullcontext():
            sums = self._by_parts(batch) if self.by_parts else self._whole(batch)
        return sums + 0.0 * sum(weight.sum() for weight in self._unused(batch))

    def _unused(self, batch: Batch) -> list[nn.Parameter]:
        """Weights of the image adapter where no row of a batch has an image.

        They get a gradient of zero: other processes, whose rows may have one, wait for it.
        """
        if any(part.prompt.image is not None and bool(part.prompt.image.any()) for part in batch.parts):
            return []
        layers = self.upper.layers.values()
        parts = [part for layer in layers for part in layer.dualedit_adapter[self.adapter].items()]
        return [weight for name, adapter in parts if name == "vision" for weight in adapter.parameters()]

    # ------------------------------------------------------------------ the fast way

    def _by_parts(self, batch: Batch) -> Tensor:
        lowers = [self.upper.lower(part.inputs, part.prompt) for part in batch.parts]
        states, last = [], {}
        for place, (part, lower) in enumerate(zip(batch.parts, lowers, strict=True)):
            if part.keeps or part.edit_columns is not None or lower.reach is not None:
                at = foretelling(part) if part.keeps else None
                found, last[place] = self.upper.unedited(lower, part.prompt, at)
                if part.edit_columns is not None:
                    states.append((part, found))
        kept = [place for place in last if batch.parts[place].keeps]
        with torch.no_grad():
            logits = self.upper.logits([lowers[place] for place in kept], [last[place] for place in kept])
        before = dict(zip(kept, logits, strict=True))
        edits = self._project(states, batch)
        edited = [
            self.upper.edited(lower, part.prompt, foretelling(part), part.route, edits)
            for part, lower in zip(batch.parts, lowers, strict=True)
        ]
        sums = torch.zeros(len(TERMS), device=batch.terms.device)
        for place, logits in enumerate(self.upper.logits(lowers, edited)):
            sums = sums + term_sums(logits, before.get(place), batch.parts[place], batch)
        return sums

    def _project(
        self, states: list[tuple[Part, dict[str, Tensor]]], batch: Batch
    ) -> dict[str, dict[str, EditKV]]:
        """Keys and values of the batch's edits, with gradients, one edit after the other by number."""
        lengths = torch.zeros(batch.edits, dtype=torch.int64, device=batch.terms.device)
        for part, _ in states:
            lengths[part.route] = part.edit_columns.sum(1)
        # Tokens come part by part; edits lie where their part's tokens are.
        start = torch.zeros_like(lengths)
        begin = 0
        for part, _ in states:
            own = lengths[part.route]
            start[part.route] = begin + own.cumsum(0) - own
            begin += int(own.sum())
        return {
            layer_name: {
                name: EditKV(
                    *adapter.project_edit(
                        torch.cat([seen[layer_name][p.edit_columns] for p, seen in states])
                    ),
                    start,
                    lengths,
                    adapter.query_weights(),
                )
                for name, adapter in layer.dualedit_adapter[self.adapter].items()
            }
            for layer_name, layer in self.upper.layers.items()
        }

    # ------------------------------------------------------------------ the plain way

    def _whole(self, batch: Batch) -> Tensor:
        states, before = [], []
        for part in batch.parts:
            with torch.no_grad(), framed(runtime_of(self.base), "masks", part.prompt):
                with recording(self.base) as seen:
                    logits = self.base(**part.inputs, use_cache=False).logits
            before.append(logits[foretelling(part)] if part.keeps else None)
            if part.edit_columns is not None:
                states.append((part, seen))
        edits = self._project(states, batch)
        sums = torch.zeros(len(TERMS), device=batch.terms.device)
        for part, old in zip(batch.parts, before, strict=True):
            with framed(runtime_of(self.base), "masks", part.prompt), bound(self.base, part.route, edits):
                logits = self.base(**part.inputs, use_cache=False).logits[foretelling(part)]
            sums = sums + term_sums(logits, old, part, batch)
        return sums

    # ------------------------------------------------------------------ choosing

    @torch.no_grad()
    def choose_way(self, batch: Batch) -> bool:
        """Set `by_parts` by whether the upper part alone reproduces the model on a batch; returns it.

        With its last layer narrowed if that gives the model's logits, else with the whole of it; and with the
        layers between the edited ones run where an edit reaches, if that gives what the whole of them give.
        """
        batch = on_device(batch, self.base)
        self.upper.share = False
        for narrow in (True, False):
            self.upper.narrow = narrow
            self.by_parts = _holds(self._reproduced, batch)
            if self.by_parts:
                break
        self.upper.share = True
        self.upper.share = self.by_parts and _holds(self._shared, batch)
        return self.by_parts

    def _shared(self, part: Part) -> bool:
        """Whether states changed where an edit writes give the same with the other positions shared."""
        lower = self.upper.lower(part.inputs, part.prompt)
        if lower.reach is None:
            return True
        at, last = lower.reach.at, self.upper.last_name
        self.upper.unedited(lower, part.prompt, None)
        written = self.upper.spans(self.upper.first_name, part.prompt)
        # What is written here is another position's state: as large as states are, and far from the own one.
        hidden = torch.where(written[..., None], lower.states.roll(1, 1), lower.states)
        found = lower.reach.states.index_put((at,), self.upper.reached(lower, hidden, part.prompt))
        whole = replace(lower, states=hidden, reach=None)
        wanted = self.upper.unedited(whole, part.prompt, None)[0][last]
        masks = [kwargs["attention_mask"] for _, _, kwargs in lower.calls[: len(lower.reach.kept)]]
        alive = torch.stack([seen(mask).any(-1).expand_as(at) for mask in masks]).all(0)
        apart, size = (x.float().square().mean(-1).sqrt() for x in (found - wanted, wanted))  # [R, L]
        # Positions that are not reached went through the same products twice.
        allowed = torch.where(at, _CLOSE.get(wanted.dtype, _COARSE), 4 * torch.finfo(wanted.dtype).eps)
        return bool((apart <= allowed * size)[alive].all())

    def _reproduced(self, part: Part) -> bool:
        lower = self.upper.lower(part.inputs, part.prompt)
        (found,) = self.upper.logits([lower], [self.upper.unedited(lower, part.prompt, foretelling(part))[1]])
        with framed(runtime_of(self.base), "masks", part.prompt), recording(self.base):
            wanted = self.base(**part.inputs, use_cache=False).logits[foretelling(part)]
        return close(found, wanted)

    @torch.no_grad()
    def answers_alike(self, packed: Batch, plain: Batch) -> bool:
        """Whether the unedited model says the same to the packed questions of a batch as to each alone."""
        try:
            first, second = (self._answers(on_device(batch, self.base)) for batch in (packed, plain))
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        return set(first) == set(second) and all(close(first[n], second[n]) for n in first)

    def _answers(self, batch: Batch) -> dict[int, Tensor]:
        found = {}
        for part in batch.parts:
            with framed(runtime_of(self.base), "masks", part.prompt), recording(self.base):
                logits = self.base(**part.inputs, use_cache=False).logits[foretelling(part)]
            numbers = part.answer[part.answer >= 0]
            found |= {int(n): logits[numbers == n] for n in numbers.unique()}
        return found


def _holds(check: Callable[[Part], bool], batch: Batch) -> bool:
    """Whether a check of what a model's layers allow holds for all parts; it fails where they raise."""
    try:
        return all(check(part) for part in batch.parts)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two logits [K, V] are the same up to the rounding of their dtype."""
    if found.shape != wanted.shape:
        return False
    allowed = _CLOSE.get(wanted.dtype, _COARSE) * float(wanted.float().std())
    apart = (found.float() - wanted.float()).square().mean(-1).sqrt()  # [K]
    return bool((apart <= allowed).all())


def foretelling(part: Part) -> Tensor:
    """[R, L] bool: the positions in front of the answers' tokens, whose logits count."""
    return nn.functional.pad(part.labels[:, 1:] != IGNORED, (0, 1))


def term_sums(logits: Tensor, before: Tensor | None, part: Part, batch: Batch) -> Tensor:
    """[6] sums of a part's losses by term.

    Args:
        logits: [K, V] at `foretelling(part)`, with the edits; before: the same without, where any must stay.
    """
    label = part.labels[part.labels != IGNORED]
    number = part.answer[part.labels != IGNORED]
    term = batch.terms[number]
    change = term < len(CHANGE)
    token = torch.zeros(len(label), device=logits.device)
    if bool(change.any()):
        lost = nn.functional.cross_entropy(logits[change].float(), label[change], reduction="none")
        token = token.index_put((change.nonzero()[:, 0],), lost)
    if before is not None:
        now, old = (x[~change].float().log_softmax(-1) for x in (logits, before))
        apart = nn.functional.kl_div(now, old, log_target=True, reduction="none").sum(-1)
        token = token.index_put(((~change).nonzero()[:, 0],), apart)
    tokens = torch.bincount(number, minlength=len(batch.terms))[number]
    return token.new_zeros(len(TERMS)).index_add(0, term, token / tokens)


def on_device(batch: Batch, base: nn.Module) -> Batch:
    """A batch where the model takes it."""
    device = base.get_input_embeddings().weight.device

    def moved(part: Part) -> Part:
        prompt = part.prompt
        return Part(
            to_device(part.inputs, base),
            Prompt(*(value.to(device) for value in vars(prompt).values())),
            part.labels.to(device),
            part.answer.to(device),
            part.route.to(device),
            None if part.edit_columns is None else part.edit_columns.to(device),
            part.keeps,
        )  # fmt: skip

    return Batch(tuple(moved(part) for part in batch.parts), batch.terms.to(device), batch.edits)
