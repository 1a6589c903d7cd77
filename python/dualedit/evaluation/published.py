"""The published evaluation's gate, which sees the answer: for comparison with other people's tables only.

The published code of DualEdit feeds prompt and target to the model and compares the last token of that with
the last token of the edit's prompt and target. Related questions then end in the edit's own answer and
unrelated ones do not: the gate reads the label. When an answer is yet to be generated there is nothing of the
kind to read. BalancEdit's key is pooled over all tokens of the same input, target included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dualedit_kernels import nearest_key

from ..data import EditSample
from ..editor import Editor
from ..models.architectures import target_token_type, unwrap
from ..models.images import open_image
from ..runtime.context import bound
from ..runtime.recording import record_states
from ..tuners.adapter import active_adapter
from .forcing import forced_batch


def editor_batch(editor: Editor, questions: Sequence[tuple], targets: Sequence[str]) -> dict[str, Tensor]:
    """A `forced_batch` as the editor's model reads it."""
    return forced_batch(editor.prompter, questions, targets, target_token_type(unwrap(editor.model)))


class PublishedGate:
    """Routes prompts with their targets to an editor's stored edits, as the published evaluation does.

    Args:
        editor: the edits are taken from its active adapter.
        threshold: tau, cosine similarity that opens DualEdit's gate.
    """

    def __init__(self, editor: Editor, threshold: float):
        self.editor = editor
        self.threshold = threshold
        self._samples: dict[int, EditSample] = {}
        self._keys: dict[int, tuple[Tensor, float]] = {}

    def note(self, edit_id: int, sample: EditSample) -> None:
        """Remember where a stored edit comes from; its key is made when a question needs it."""
        self._samples[edit_id] = sample

    def forget(self) -> None:
        """No edit is stored any more."""
        self._samples.clear()
        self._keys.clear()

    @contextmanager
    def routing(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Forwards inside give each row of a `forced_batch` the edit that this gate finds, or none."""
        adapter = active_adapter(self.editor.model)
        if not len(adapter.group):
            yield
            return
        snapshots = adapter.group.snapshot()
        route = self.route(batch, next(iter(snapshots.values())).ids)
        edits = {
            name: layer.stored_edits(snapshots[name].everything()) for name, layer in adapter.layers.items()
        }
        with bound(unwrap(self.editor.model), route, edits):
            yield

    def route(self, batch: Mapping[str, Tensor], ids: Sequence[int]) -> Tensor:
        """Place [B] int64 in `ids` of the edit nearest to each row, or -1 where it is too far."""
        for edit_id in ids:
            if edit_id not in self._keys:
                self._keys[edit_id] = self._key(self._samples[edit_id])
        query = self._states(batch)
        keys = torch.cat([self._keys[edit_id][0] for edit_id in ids])
        radius = torch.tensor([self._keys[edit_id][1] for edit_id in ids], device=query.device)
        return nearest_key(query, keys.to(query), radius, active_adapter(self.editor.model).metric)[0]

    def _states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Keys [B, D] of a `forced_batch`; without its labels all of it is taken for the prompt."""
        adapter = active_adapter(self.editor.model)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        states, whole = record_states(self.editor.model, inputs)
        return adapter.method.published_key(adapter.config, states[adapter.group.gate_name], whole)

    def _key(self, sample: EditSample) -> tuple[Tensor, float]:
        """An edit's key [1, D] and radius. BalancEdit's radius comes from the samples that the edit itself
        had, with the target behind them."""
        request = sample.request
        adapter = active_adapter(self.editor.model)
        image = open_image(request.image)
        key = self._with_target([(image, request.prompt)], request.target)
        if adapter.method.one_threshold:
            return key, 1.0 - self.threshold
        groups = self.editor.samples_around(image, request.prompt, sample.rephrases[:1] or None, None)
        everywhere = torch.full((1,), float("inf"), device=key.device)
        distances = [
            nearest_key(
                self._with_target(samples, request.target).float(), key.float(), everywhere, adapter.metric
            )[1].tolist()
            for samples in groups
        ]
        return key, adapter.method.radius(adapter.config, *distances)

    def _with_target(self, questions: Sequence[tuple], target: str) -> Tensor:
        return self._states(editor_batch(self.editor, questions, [target] * len(questions)))


def fit_published_threshold(editor: Editor, samples: Sequence[EditSample]) -> float:
    """The tau that tells related from unrelated questions best, for a gate that sees the answer.

    The published code has a constant, chosen for its models; another model's states lie nearer together or
    farther apart. DualEdit only.

    Args:
        editor: with or without edits; none is stored or lost.
        samples: training facts, with answers to their locality probes.

    Returns:
        the middle of the thresholds with the best mean of accuracy on questions that must change and on
        questions that must stay.

    Raises:
        ValueError: no samples, or without questions of both kinds.
    """
    gate = PublishedGate(editor, 0.0)
    near: list[float] = []
    far: list[float] = []
    for sample in samples:
        request = sample.request
        related = [probe for probes in sample.generality.values() for probe in probes]
        others = [p for probes in sample.locality.values() for p in probes if p.answer]
        questions = [(probe.image, probe.prompt) for probe in (*related, *others)]
        if not questions:
            continue
        targets = [request.target] * len(related) + [probe.answer for probe in others]
        key = gate._with_target([(open_image(request.image), request.prompt)], request.target)
        query = gate._states(editor_batch(editor, questions, targets))
        distances = (1.0 - torch.cosine_similarity(query.double(), key.double())).tolist()
        near += distances[: len(related)]
        far += distances[len(related) :]
    if not near or not far:
        raise ValueError("samples have no questions that must change, or none that must stay: pass others.")
    cuts = sorted({*near, *far})
    worth = [sum(d <= cut for d in near) / len(near) + sum(d > cut for d in far) / len(far) for cut in cuts]
    best = [i for i, value in enumerate(worth) if value == max(worth)]
    low, high = cuts[best[0]], cuts[min(best[-1] + 1, len(cuts) - 1)]
    return 1.0 - (low + high) / 2
