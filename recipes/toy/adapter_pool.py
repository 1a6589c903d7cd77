"""Training questions of the embedded model, run through its frozen lower layers once.

Below the first edited layer nothing ever changes, so what enters it is computed once a question, many
questions at a time, without gradients; a training step runs the layers from there on only. The general way,
for any model, is `training.train_adapters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dualedit.data import EditSample
from dualedit.models.architectures import unwrap
from dualedit.models.prompting import Prompter
from dualedit.runtime.context import (
    Bound,
    ForwardPass,
    Prompt,
    describe_prompt,
    framed,
    recording,
    runtime_of,
)
from dualedit.runtime.context import Sequence as Decided
from dualedit.training.dualedit import Batch, make_batch
from dualedit.tuners.dualedit import DualEditLayer
from dualedit.tuners.dualedit.modules import EditKV
from torch import Tensor, nn

# Columns of a kept question: 36 image tokens and the longest wording in front, the longest answer behind.
PROMPT, ANSWER = 56, 4
# Of a token that is right for certain, beside 1 of one that is wrong for certain.
LEAST_WEIGHT = 0.05


@dataclass
class Rows:
    """R questions, padded to PROMPT columns on the left and ANSWER on the right.

    Attributes:
        states: [R, L, D] what enters the first edited layer.
        attended, text, image: [R, L] bool.
        labels: [R, L] int64, -100 outside the answer.
        edit: [R] int64, the sample a row belongs to.
        keep: [R] bool, rows whose answer must stay.
    """

    states: Tensor
    attended: Tensor
    text: Tensor
    image: Tensor
    labels: Tensor
    edit: Tensor
    keep: Tensor

    def take(self, rows: Tensor) -> Rows:
        """The given rows [K] int64."""
        return Rows(**{name: value[rows] for name, value in self.__dict__.items()})


@dataclass
class Edits:
    """N edits: what the adapters' layers saw of them, by layer name [N, L, D], and which columns are real."""

    states: dict[str, Tensor]
    attended: Tensor


def _fit(value: Tensor, prompt: int, fill: float | int | bool) -> Tensor:
    """[R, prompt + answer, ...] widened to [R, PROMPT + ANSWER, ...]."""
    left, right = PROMPT - prompt, ANSWER - (value.shape[1] - prompt)
    if left < 0 or right < 0:
        raise ValueError(
            f"{prompt} columns of question, {-left} and {-right} too many: raise PROMPT, ANSWER."
        )
    tail = (0, 0) * (value.ndim - 2)
    return nn.functional.pad(value, (*tail, left, right), value=fill)


class _Enough(Exception):
    """Leaves a forward when everything needed has been seen."""


def _stop(module: nn.Module, args: tuple, output: object) -> None:
    raise _Enough


class Pool:
    """Samples ready for training.

    Args:
        model: with a DualEdit adapter and no edits.
        layers: its wrapped layers by name.
        samples: the facts; each gives one fixed set of questions.
        seed: chooses the questions.
    """

    def __init__(
        self,
        model: nn.Module,
        prompter: Prompter,
        layers: dict[str, DualEditLayer],
        samples: Sequence[EditSample],
        seed: int,
    ):
        self.base = unwrap(model)
        self.stack = self.base.model.language_model
        self.layers = layers
        self.first = min(int(name.rpartition(".")[2]) for name in layers)
        generator = torch.Generator().manual_seed(seed)
        rows, edits = [], []
        eos = self.base.generation_config.eos_token_id
        for begin in range(0, len(samples), 16):
            edit_inputs, batch = make_batch(prompter, samples[begin : begin + 16], eos, generator)
            edits.append(self._edits(edit_inputs))
            rows.append(self._rows(batch, begin))
        self.rows = Rows(**{name: torch.cat([getattr(r, name) for r in rows]) for name in rows[0].__dict__})
        names = edits[0].states
        self.edits = Edits(
            {n: torch.cat([e.states[n] for e in edits]) for n in names},
            torch.cat([e.attended for e in edits]),
        )
        self.rows_of = [(self.rows.edit == i).nonzero()[:, 0] for i in range(len(samples))]

    def __len__(self) -> int:
        return len(self.rows_of)

    def _run(self, inputs: dict[str, Tensor], last: int) -> tuple[dict[str, Tensor], Tensor]:
        """What the wrapped layers see and what enters the first of them; stops after layer `last`."""
        entered: list[Tensor] = []
        call = {k: v for k, v in inputs.items() if k != "labels"}
        first = self.stack.layers[self.first].register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        enough = self.stack.layers[last].register_forward_hook(_stop)
        try:
            with torch.no_grad(), recording(self.base) as states:
                self.base(**call, use_cache=False)
        except _Enough:
            pass
        finally:
            first.remove()
            enough.remove()
        return states, entered[0]

    def _edits(self, inputs: dict[str, Tensor]) -> Edits:
        states, _ = self._run(inputs, max(int(name.rpartition(".")[2]) for name in self.layers))
        prompt = int((inputs["labels"] != -100).any(0).int().argmax())
        kept = {name: _fit(states[name], prompt, 0.0) for name in self.layers}
        return Edits(kept, _fit(inputs["attention_mask"] != 0, prompt, False))

    def _rows(self, batch: Batch, begin: int) -> Rows:
        inputs = batch.inputs
        _, entered = self._run(inputs, self.first)
        ids, labels = inputs["input_ids"], inputs["labels"]
        prompt = int((labels != -100).any(0).int().argmax())
        masks = describe_prompt(
            ids,
            inputs["attention_mask"],
            labels,
            runtime_of(self.base).image_ids,
            tuple(ids.shape),
            ids.device,
        )
        return Rows(
            states=_fit(entered, prompt, 0.0),
            attended=_fit(inputs["attention_mask"] != 0, prompt, False),
            text=_fit(masks.text, prompt, False),
            image=_fit(masks.image, prompt, False),
            labels=_fit(labels, prompt, -100),
            edit=batch.route + begin,
            keep=batch.keep,
        )

    def losses(self, name: str, chosen: Tensor, by_difficulty: bool = False) -> tuple[Tensor, Tensor]:
        """Cross-entropy of what must change and KL of what must stay, of the chosen samples [K] int64.

        by_difficulty: an answer is right only if all of its tokens are, and most of them are learned early;
            so each weighs by how wrong it still is (focal loss, Lin et al., ICCV 2017, gamma 1, normalised).
        """
        picked = torch.cat([self.rows_of[i] for i in chosen.tolist()])
        rows = self.rows.take(picked)
        place = torch.full((len(self),), -1, dtype=torch.int64)
        place[chosen] = torch.arange(len(chosen))
        logits = self._upper(rows, place[rows.edit], self._project(name, chosen))
        labels = rows.labels[:, PROMPT:]
        target = labels != -100
        change, same = target & ~rows.keep[:, None], target & rows.keep[:, None]
        missed = nn.functional.cross_entropy(logits[change], labels[change], reduction="none")
        weight = torch.ones_like(missed)
        if by_difficulty:
            weight = 1.0 - (-missed.detach()).exp() + LEAST_WEIGHT
        rel = (weight * missed).sum() / weight.sum()
        kept = rows.take(rows.keep.nonzero()[:, 0])
        with torch.no_grad():
            before = self._upper(kept, kept.edit, {})[target[rows.keep]]
        keep = nn.functional.kl_div(
            logits[same].log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return rel, keep

    def _project(self, name: str, chosen: Tensor) -> dict[str, dict[str, EditKV]]:
        attended = self.edits.attended[chosen]
        length = attended.sum(1)
        start = length.cumsum(0) - length
        return {
            layer_name: {
                part: EditKV(
                    *adapter.project_edit(self.edits.states[layer_name][chosen][attended]), start, length
                )
                for part, adapter in layer.dualedit_adapter[name].items()
            }
            for layer_name, layer in self.layers.items()
        }

    def _upper(self, rows: Rows, route: Tensor, edits: dict) -> Tensor:
        """Logits [R, ANSWER, V] at the columns that foretell the answer."""
        hidden = rows.states
        count, length = rows.attended.shape
        seen = torch.ones(length, length, dtype=torch.bool).tril() & rows.attended[:, None]
        # Padding in front sees itself, or its softmax would have nothing to sum over.
        seen = seen | torch.eye(length, dtype=torch.bool)
        mask = torch.zeros(count, 1, length, length).masked_fill(
            ~seen[:, None], torch.finfo(torch.float32).min
        )
        places = torch.arange(length)[None]
        rotary = self.stack.rotary_emb(hidden, places)
        last = (rows.text | rows.image).int().mul(torch.arange(length)).argmax(1)
        passing = ForwardPass(Decided(Prompt(rows.text, rows.image, last, last)), 0, count, length)
        runtime = runtime_of(self.base)
        with framed(runtime, "pass", passing), framed(runtime, "mode", Bound(route, edits)):
            for layer in self.stack.layers[self.first :]:
                hidden = layer(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        answer = self.stack.norm(hidden[:, PROMPT - 1 : -1])
        return self.base.lm_head(answer).float()
