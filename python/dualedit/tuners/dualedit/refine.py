"""Mending the keys and values of one DualEdit edit until the edited model answers it as told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...models.architectures import unwrap
from ...models.placement import to_device
from ...runtime.context import bound, explicit_masks
from ...runtime.partial import Replay
from ...runtime.sequence import Prompt
from ..fitting import Goal, fit_to_answer, layer_number, least_lead, least_probability, why_no_gradient
from .config import DualEditConfig
from .layer import DualEditLayer
from .modules import EditKV

# An answer that is so improbable after fifty steps was never written by a hundred and fifty more.
_HOPELESS = 1e-4


def refine_edit(
    model: nn.Module,
    layers: Mapping[str, DualEditLayer],
    config: DualEditConfig,
    inputs: Mapping[str, Tensor],
    prompt: Prompt,
    rows: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Run an edit's own question once with the edit written; where its answer is not the target, mend that.

    What is mended are the edit's own keys and values, by next-token loss on its target through the layers
    from the first edited one on; adapters and model stay as they are. Not in the paper, whose edits nobody
    checks: of those that adapters trained once have never seen, a few are not written.

    Args:
        layers: the wrapped layers by name.
        inputs: from `append_target`; labels say which tokens are the target.
        prompt: what is text and what image in them.
        rows: layer name to "k_text", "v_text", "k_vision", "v_vision" [T, M] of the edit.

    Returns:
        the rows in the same dtypes, and what `fit_to_answer` returns.

    Raises:
        ValueError: no gradient comes back to the keys and values.
    """
    base = unwrap(model)
    inputs = to_device(inputs, base)
    labels = inputs.pop("labels")
    target = labels[:, 1:] != -100
    route = torch.zeros(1, dtype=torch.int64, device=labels.device)
    parts: dict[str, dict[str, Tensor]] = {}

    def as_stored() -> dict[str, dict[str, Tensor]]:
        return {
            place: {name: part.to(rows[place][name].dtype) for name, part in row.items()}
            for place, row in parts.items()
        }

    def edits() -> dict[str, dict[str, EditKV]]:
        return {place: _one_edit(row) for place, row in as_stored().items()}

    with explicit_masks(base, prompt.text, prompt.image):
        with torch.no_grad(), bound(base, route, {place: _one_edit(row) for place, row in rows.items()}):
            logits = base(**inputs, use_cache=False).logits[:, :-1][target]
        probability = least_probability(logits, labels[:, 1:][target])
        if probability >= config.refine_probability:
            written = least_lead(logits, labels[:, 1:][target]) > 1
            notes = {"steps": 0, "probability": probability, "written": written}
            return {place: dict(row) for place, row in rows.items()}, notes
        for place, row in rows.items():
            parts[place] = {name: part.detach().float().requires_grad_(True) for name, part in row.items()}
        with bound(base, route, edits()):
            replay = Replay(base, inputs, min(layer_number(name, base) for name in layers))

        def logits_of() -> Tensor:
            with bound(base, route, edits()):
                return replay()

        leaves = [part for row in parts.values() for part in row.values()]
        goal = Goal(
            config.refine_rate, config.refine_steps, config.refine_probability, hopeless=_HOPELESS
        )
        fit = fit_to_answer(
            logits_of, labels, leaves, goal,
            f"No gradient comes back to the edit's keys and values: {why_no_gradient(base)}",
        )  # fmt: skip
    found = as_stored()
    return {place: {n: part.detach() for n, part in row.items()} for place, row in found.items()}, fit


def _one_edit(row: Mapping[str, Tensor]) -> dict[str, EditKV]:
    """A single edit's keys and values by part, as a layer takes them."""
    return {
        name[2:]: EditKV(
            k, row[f"v_{name[2:]}"],
            torch.zeros(1, dtype=torch.int64, device=k.device),
            torch.tensor([k.shape[0]], device=k.device),
        )
        for name, k in row.items()
        if name.startswith("k_")
    }  # fmt: skip
