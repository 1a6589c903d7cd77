"""Adding, listing, looking up and removing edits by tensors alone: no processor, no text, any method."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .memory import MemoryGroup
from .memory.group import Trial
from .memory.routing import nearest_edit
from .models.architectures import target_token_type, unwrap
from .models.placement import to_device
from .models.targets import append_target
from .records import answers, brief, new_uid, timestamp, uid_of
from .tuners.adapter import EditAdapter, active_adapter
from .tuners.fitting import least_probability, warn_if_weak
from .tuners.method import Inputs


@dataclass(frozen=True)
class Edit:
    """A stored edit.

    Attributes:
        id: its number; never used again for another one in this memory and the folder that it is saved in.
        prompt, target: the question and the new answer, where they were given as text.
        radius: how far from its key it applies, in the adapter's distance (DualEdit: cosine distance).
        created: when it was stored, ISO 8601, UTC.
        seconds: what storing it took, its check included.
        probability: what the edited model gave the least likely token of the target when the edit was stored;
            None where nobody asked (`add_edit` with DualEdit without `refine_steps`).
        replaces: edits that this one took the place of (the same image and question), as they were noted.
        answer: what the edited model answered when it was asked back; None where nobody asked (`add_edit`).
        failed: the answer is not the target, and the edit was kept all the same (`keep_failed`).
        steps: how it was written, a mapping for each way that was tried: "method", "steps" of gradient
            descent (0: one forward), "seconds" with the check, "probability", "answer".
        uid: an id that sorts by time and that no other edit anywhere has.
        method: how it is stored ("DualEdit", "BalancEdit").
        author, note, tags, expires: what people noted; `expires` in ISO 8601, UTC, and from then on it
            answers nothing.
        enabled: whether it may answer: it is not disabled and has not expired.
        image_sha256: of its picture's pixels in RGB, the first 16 digits; None without a picture.
        overlaps: edits that were near when it was stored, and by which policy it was stored all the same.
    """

    id: int
    prompt: str
    target: str
    radius: float
    created: str
    seconds: float
    replaces: tuple[dict, ...] = ()
    probability: float | None = None
    answer: str | None = None
    failed: bool = False
    steps: tuple[dict, ...] = ()
    uid: str = ""
    method: str = ""
    author: str = ""
    note: str = ""
    tags: tuple[str, ...] = ()
    expires: str | None = None
    enabled: bool = True
    image_sha256: str | None = None
    overlaps: tuple[dict, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Its attributes in a mapping that JSON can hold; numbers that are not finite are None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Lookup:
    """The stored edit nearest to an input.

    Attributes:
        edit_id: its number, or None when nothing is stored.
        distance: to its key; infinite when nothing is stored.
        radius: of that edit.
        fired: whether the input lies inside the radius, so that the edit applies.
    """

    edit_id: int | None
    distance: float
    radius: float
    fired: bool


NOTHING = Lookup(None, float("inf"), 0.0, False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode: dropout in the run that is stored would be stored with it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def lookup_many(model: nn.Module, inputs: Inputs) -> list[Lookup]:
    """For each row of a batch, the stored edit nearest to it and whether it applies. No model is changed.

    Args:
        inputs: what a processor returns for a batch of prompts, padding masked.
    """
    adapter = active_adapter(model)
    return lookup_in(adapter, adapter.keys_of(inputs))


def lookup_in(adapter: EditAdapter, query: Tensor) -> list[Lookup]:
    """`lookup_many` among the edits of one adapter, for routing keys [B, P]."""
    if not len(adapter.stored()):
        return [NOTHING] * len(query)
    stored, index, distance = adapter.nearest(query)
    radii = adapter.radii(stored)[index.clamp(min=0)].tolist()
    return [
        NOTHING if row < 0 else Lookup(stored.id_of(row), far, radius, far <= radius)
        for row, far, radius in zip(index.tolist(), distance.tolist(), radii, strict=True)
    ]


def lookup(model: nn.Module, inputs: Inputs) -> Lookup:
    """The stored edit nearest to one input, and whether it applies. The model is not changed.

    Args:
        inputs: what a processor returns for one prompt.
    """
    return lookup_many(model, inputs)[0]


def edit_of(adapter: EditAdapter, edit_id: int) -> Edit:
    """A stored edit as it was noted. Raises KeyError for an unknown number."""
    group = adapter.group
    stored, record = group.noted(edit_id)
    row = stored.row_of(edit_id)
    radius = adapter.method.radii(adapter.config, stored.tables["radius"][row : row + 1])
    return _as_edit(record, edit_id, float(radius[0]), adapter.method.title)


def edits_of(adapter: EditAdapter) -> list[Edit]:
    """An adapter's edits as they were noted, oldest first; all of one moment."""
    snapshots, records = adapter.group.listed()
    stored = snapshots[adapter.group.gate_name]
    radii = adapter.radii(stored).tolist()
    title = adapter.method.title
    return [_as_edit(records[i], i, radius, title) for i, radius in zip(stored.ids, radii, strict=True)]


def _as_edit(record: Mapping[str, Any], edit_id: int, radius: float, method: str) -> Edit:
    return Edit(
        id=edit_id,
        prompt=record.get("prompt", ""),
        target=record.get("target", ""),
        radius=radius,
        created=record.get("created", ""),
        seconds=record.get("seconds", 0.0),
        replaces=tuple(record.get("replaces", ())),
        probability=record.get("probability"),
        answer=record.get("answer"),
        failed=bool(record.get("failed", False)),
        steps=tuple(record.get("tried", ())),
        uid=uid_of(record, edit_id),
        method=method,
        author=record.get("author", ""),
        note=record.get("note", ""),
        tags=tuple(record.get("tags", ())),
        expires=record.get("expires"),
        enabled=answers(record),
        image_sha256=record.get("image_sha256"),
        overlaps=tuple(record.get("overlaps", ())),
    )


@dataclass(frozen=True)
class Near:
    """The stored edit that is nearest to a new one.

    Attributes:
        adapter: that holds it.
        edit_id, record: its number and what is noted about it.
        distance: between the two keys.
        radius: how far the stored one reaches.
        same: whether the keys are the same, up to rounding: the same image and question.
    """

    adapter: EditAdapter
    edit_id: int
    record: dict[str, Any]
    distance: float
    radius: float
    same: bool


def _nearest(adapter: EditAdapter, key: Tensor) -> Near | None:
    """The edit that is nearest to a key [1, P], of all that are stored, those that do not answer included."""
    snapshots, group = adapter.group.everything(), adapter.group
    stored = snapshots[group.gate_name] if snapshots else None
    if stored is None or not len(stored):
        return None
    index, distance = nearest_edit(key, stored, adapter.metric)
    row, far = int(index[0]), float(distance[0])
    if row < 0:  # the key is not finite; storing it is refused
        return None
    edit_id = stored.id_of(row)
    radius = adapter.method.radii(adapter.config, stored.tables["radius"][row : row + 1])
    scale = float(key.float().norm()) if adapter.metric == "l2" else 1.0
    return Near(adapter, edit_id, group.first.record(edit_id), far, float(radius[0]), far <= 1e-6 * scale)


@dataclass(frozen=True)
class Replaced:
    """An edit whose place a new one takes, as it is brought back."""

    group: MemoryGroup
    edit_id: int
    rows: dict[str, dict[str, Tensor]]
    record: dict[str, Any]


@dataclass
class TriedEdit:
    """An edit that only the thread which makes it sees, until it is kept.

    Attributes:
        adapter: where it is.
        edit_id: its number.
        full: its inputs with the target behind them and labels, as `append_target` makes them.
        record: what is noted about it; what is added to it before `keep` is stored with it.
        replaced: the edits that make room for it.
        began: when its making began, by `time.perf_counter`.
        near: the nearest of the other stored edits in each adapter, nearest first.
        trials: of the memories that it changes.
    """

    adapter: EditAdapter
    edit_id: int
    full: dict[str, Tensor]
    record: dict[str, Any]
    replaced: list[Replaced]
    began: float
    near: list[Near] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Since its making began."""
        return round(time.perf_counter() - self.began, 4)

    def replace(self, near: Near) -> None:
        """Let this edit take the place of another one."""
        group = near.adapter.group
        rows = group.rows(group.everything(), near.edit_id)
        self.replaced.append(Replaced(group, near.edit_id, rows, near.record))
        self.record["replaces"] = [*self.record["replaces"], brief(near.edit_id, near.record)]
        group.remove(near.edit_id)

    def keep(self) -> Edit:
        """Let it be stored when the block of `trying` ends."""
        self.record.setdefault("seconds", self.seconds)
        self.adapter.group.note(self.edit_id, self.record)
        edit = edit_of(self.adapter, self.edit_id)
        for trial in self.trials:
            trial.kept = True
        return edit


@contextmanager
def trying(
    adapter: EditAdapter,
    inputs: Inputs,
    target_ids: Tensor,
    positives: Sequence[Inputs] = (),
    negatives: Sequence[Inputs] = (),
    note: Mapping[str, Any] | None = None,
    beside: Sequence[EditAdapter] = (),
) -> Iterator[TriedEdit]:
    """Make an edit and see it at work before it counts: inside the block this thread's forwards have it,
    and no
    others. It is stored at the block's end where `keep` was called, and else was never there.

    Args:
        adapter, inputs, target_ids, positives, negatives, note: as `add_edit` takes them.
        beside: further adapters that are asked together with this one. An edit of the same image and question
            makes room in these, too, and numbers are not used twice among them.
    """
    began = time.perf_counter()
    _check_tensors(adapter, inputs, target_ids)
    full = append_target(inputs, target_ids, target_token_type(adapter.base))
    reason = adapter.method.untrained(adapter)
    if reason is not None:
        warnings.warn(f"The edit can change no answer: {reason}.", stacklevel=4)
    with _evaluating(adapter.base), torch.inference_mode(False):  # a value is fitted with gradients
        new = adapter.method.make_edit(adapter, inputs, full, positives, negatives)
    rows = {place: {t: r.detach() for t, r in row.items()} for place, row in new.rows.items()}
    keys = {id(adapter): new.key}
    for other in beside:
        if len(other.group):
            keys[id(other)] = other.keys_of(inputs)
    with ExitStack() as stack:
        trials = [stack.enter_context(each.group.trial()) for each in (adapter, *beside)]
        replaced: list[Replaced] = []
        found = [_nearest(each, keys[id(each)]) for each in (adapter, *beside) if id(each) in keys]
        near = sorted((each for each in found if each is not None), key=lambda each: each.distance)
        record = {
            **dict(note or {}),
            **new.notes,
            "uid": new_uid(),
            "created": timestamp(),
            "replaces": [],
        }
        number = max(each.group.next_id() for each in (adapter, *beside))
        edit_id = adapter.group.add(rows, record, number)
        others = [each for each in near if not each.same]
        tried = TriedEdit(adapter, edit_id, full, record, replaced, began, others, trials)
        for each in near:
            if each.same:
                tried.replace(each)
        yield tried


# Names of inputs that carry pictures hold one of these.
_PICTURES = ("pixel", "image", "video", "embeds")


def _check_tensors(adapter: EditAdapter, inputs: Inputs, target_ids: Tensor) -> None:
    """Refuse targets that are no token ids, and image tokens without an image. Raises ValueError."""
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and not any(part in name for name in inputs for part in _PICTURES):
        images = torch.tensor(adapter.config.image_token_ids or [], dtype=ids.dtype, device=ids.device)
        if bool(torch.isin(ids, images).any()):
            raise ValueError(
                f"inputs={sorted(inputs)}: input_ids hold image tokens, and there are no pixels. Pass all "
                "that the processor returns."
            )
    if not isinstance(target_ids, Tensor) or target_ids.is_floating_point() or target_ids.dtype == torch.bool:
        what = target_ids.dtype if isinstance(target_ids, Tensor) else type(target_ids).__name__
        raise ValueError(f"target_ids is {what}: pass the answer's token ids, a tensor [T] of int64.")


def target_probability(model: nn.Module, full: Inputs) -> float | None:
    """What a model, with the edits that apply, gives the least likely token of a target.

    Args:
        full: from `append_target`; the gate takes the prompt to end where its labels begin.

    Returns:
        a probability; None for a model whose logits do not stand for its input's tokens one to one.
    """
    inputs = to_device(full, unwrap(model))
    labels = inputs["labels"]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    if logits.shape[1] != labels.shape[1]:
        return None
    target = labels[:, 1:] != -100
    return least_probability(logits[:, :-1][target], labels[:, 1:][target])


def add_edit(
    model: nn.Module,
    inputs: Inputs,
    target_ids: Tensor,
    positives: Sequence[Inputs] = (),
    negatives: Sequence[Inputs] = (),
    note: Mapping[str, Any] | None = None,
) -> Edit:
    """Store one edit in the model's active adapter. It is not asked back; `Editor.edit` does that.

    DualEdit runs the edit once through the frozen model and keeps its projected keys and values, with
    `refine_steps` mended where the edited model does not answer the edit's own question; BalancEdit fits a
    value at its layer. An edit with the very key of a stored one (same image and question) takes its
    place, and says so in `replaces`; any other overlap is left to the nearest key.

    Args:
        model: with an active edit adapter.
        inputs: what a processor returns for the prompt, `input_ids` [1, P], image included.
        target_ids: [T] int64, tokens of the new answer, as they follow the prompt.
        positives: inputs that must be recognised as this question (an own radius, and so BalancEdit, needs
            one).
        negatives: inputs that must not (likewise).
        note: kept with the edit; "prompt" and "target" are shown in lists.

    Raises:
        ValueError: no adapter, an empty target, a missing image, samples that are missing. Nothing is stored.
    """
    adapter = active_adapter(model)
    with trying(adapter, inputs, target_ids, positives, negatives, note) as tried:
        edit = tried.keep()
    warn_if_weak(tried.record, adapter.method.advice(adapter.config))
    return edit


def remove_edit(model: nn.Module, edit_id: int) -> None:
    """Forget one edit of the active adapter. Raises KeyError for an unknown number."""
    active_adapter(model).group.remove(edit_id)


def list_edits(model: nn.Module) -> list[Edit]:
    """The active adapter's edits, oldest first."""
    return edits_of(active_adapter(model))
