"""SERAC (Mitchell et al., ICML 2022): edits in a memory, a classifier of their scope, a counterfactual model.

A question that the classifier finds in the scope of the most similar stored edit is answered by a small model
that reads that edit in front of the question; every other question by the base model. The two
are trained apart from the base model: the classifier by cross-entropy on questions inside and outside of an
edit's scope, the counterfactual model on those inside. Departures: no pretrained small models come with a
VLM, so the classifier compares the model's own frozen states (`Features`), and the counterfactual model is a
transformer from scratch over the base model's word embeddings that writes through its output head; it reads
words only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..editing import Edit
from ..editor import Explanation
from ..models.architectures import hidden_size
from .baseline import Question, stored_edit
from .features import asked_rows, features_of
from .layers import decoder_layer
from .lessons import Lessons, Rows, rows_of
from .network_settings import SERACSettings
from .trained import Trained
from .watching import Watch, watching


class Scope(nn.Module):
    """Whether a question is in the scope of an edit: a logit from the cosine of two mapped features."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.map = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, inner))
        self.scale, self.shift = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-5.0))

    def vectors(self, features: Tensor) -> Tensor:
        """[R, inner] of length 1."""
        return nn.functional.normalize(self.map(features), dim=-1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Logits [R, E] of vectors [R, inner] and [E, inner]; above 0: in scope."""
        return self.scale * one @ other.T + self.shift


class Counterfactual(nn.Module):
    """A causal transformer over words: an edit, then a question and its answer as far as it is written.

    Args:
        width: D of the base model's embeddings, in and out.
    """

    def __init__(self, width: int, inner: int, heads: int, layers: int, longest: int):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, inner), nn.Linear(inner, width)
        self.places = nn.Parameter(torch.randn(longest, inner) * 0.02)
        self.parts = nn.Parameter(torch.randn(2, inner) * 0.02)  # edit, question
        layer = nn.TransformerEncoderLayer(
            inner, heads, 4 * inner, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.inner = nn.TransformerEncoder(layer, layers, nn.LayerNorm(inner), enable_nested_tensor=False)

    def forward(self, words: Tensor, parts: Tensor) -> Tensor:
        """[R, T, D] for the output head, of words [R, T, D] and parts [R, T] int64."""
        length = words.shape[1]
        if length > len(self.places):
            raise ValueError(
                f"edit and question have {length} words together: SERAC's counterfactual model reads "
                f"{len(self.places)} (SERACSettings.longest)."
            )
        words = nn.functional.normalize(words, dim=-1) * words.shape[-1] ** 0.5
        x = self.enter(words) + self.places[:length] + self.parts[parts]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return self.leave(self.inner(x, mask=causal))


@dataclass(frozen=True)
class _Entry:
    vector: Tensor  # [inner]
    ids: Tensor  # [T], question and answer in words
    edit: Edit


class SERAC(Trained):
    """A memory of edits beside the base model."""

    name = "serac"
    settings: SERACSettings

    def _build(self) -> nn.Module:
        settings = self.settings
        self._number = decoder_layer(self.model, settings.layer, 2 / 3)
        self._entries: list[_Entry] = []
        self._stored = 0
        width = hidden_size(self.model)
        return nn.ModuleDict(
            {
                "scope": Scope(2 * width, settings.width),
                "model": Counterfactual(
                    width, settings.width, settings.heads, settings.layers, settings.longest
                ),
            }
        )

    def _vectors(self, rows: Rows) -> Tensor:
        return self.network["scope"].vectors(features_of(self.model, rows, self._number).question)

    # ------------------------------------------------------------------ training

    def training_loss(self, lessons: Lessons, keep_weight: float) -> Tensor:
        edits = rows_of(self.model, self.prompter, *lessons.edits())
        asked = rows_of(self.model, self.prompter, lessons.questions, lessons.answers)
        owner, change = (x.to(asked.labels.device) for x in (lessons.owner, lessons.change))
        logits = self.network["scope"](self._vectors(asked), self._vectors(edits))
        own = nn.functional.one_hot(owner, len(lessons.samples)).bool()
        # The three kinds weigh the same: inside, outside of the edit it was drawn for, about another edit.
        kinds = ((own & change[:, None], 1.0), (own & ~change[:, None], -keep_weight), (~own, -keep_weight))
        scope = sum(
            -abs(sign) * nn.functional.logsigmoid(logits[kind] * (1 if sign > 0 else -1)).mean()
            for kind, sign in kinds if bool(kind.any())
        )  # fmt: skip
        inside = change.nonzero()[:, 0].tolist()
        told = [_words(edits, int(owner[i])) for i in inside]
        said = [_words(asked, i) for i in inside]
        found = self._logits(told, said)
        answers = [asked.labels[i][asked.labels[i] != -100] for i in inside]
        guesses = torch.cat([x[-len(a) - 1 : -1] for x, a in zip(found, answers, strict=True)])
        return scope + nn.functional.cross_entropy(guesses.float(), torch.cat(answers))

    def _logits(self, told: Sequence[Tensor], said: Sequence[Tensor]) -> list[Tensor]:
        """For each row the logits [T, V] behind each word of what is `said` [T], with what it is `told`."""
        rows = [torch.cat(pair) for pair in zip(told, said, strict=True)]
        pairs = zip(told, said, strict=True)
        parts = [torch.cat([torch.zeros_like(a), torch.ones_like(b)]) for a, b in pairs]
        pad = nn.utils.rnn.pad_sequence
        words = self.model.get_input_embeddings()(pad(rows, batch_first=True)).detach().float()
        hidden = self.network["model"](words, pad(parts, batch_first=True))
        head = self.model.get_output_embeddings()
        places = zip(hidden, told, said, strict=True)
        return [head(x[len(a) : len(a) + len(b)].to(head.weight.dtype)) for x, a, b in places]

    # ------------------------------------------------------------------ use

    def edit(self, sample: EditSample) -> None:
        """Store the edit: its features and its words."""
        request = sample.request
        rows = rows_of(self.model, self.prompter, [(request.image, request.prompt)], [request.target])
        with torch.no_grad():
            vector = self._vectors(rows)[0]
        self._stored += 1
        self._entries.append(_Entry(vector, _words(rows, 0), stored_edit(self._stored, sample, 0.5)))

    @torch.no_grad()
    def _routes(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Number of the most similar entry and whether the question is in its scope, in probability, [R]."""
        vectors = self._vectors(asked_rows(self.model, self.prompter, questions))
        stored = torch.stack([entry.vector for entry in self._entries])
        best, index = self.network["scope"](vectors, stored).max(dim=1)
        return index, best.sigmoid()

    def explain(self, questions: Sequence[Question]) -> list[Explanation | None]:
        """The most similar edit; the distance is the probability of being out of scope, the radius 0.5."""
        if self._off or not self._entries:
            return [Explanation(False, None, float("inf"), 0.0) for _ in questions]
        index, inside = self._routes(questions)
        return [
            Explanation(p >= 0.5, self._entries[i].edit, 1 - p, 0.5)
            for i, p in zip(index.tolist(), inside.tolist(), strict=True)
        ]

    @contextmanager
    def _applied(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        if self._off or not self._entries:
            yield
            return
        index, inside = self._routes(questions)
        told = {row: self._entries[int(index[row])].ids for row in (inside >= 0.5).nonzero()[:, 0].tolist()}
        if not told:
            yield
            return
        said: dict[int, Tensor] = {}
        with watching(self.model) as watch:

            def answer(module: nn.Module, args: tuple, output: Any) -> None:
                output.logits = self._answered(watch, told, said, output.logits)

            handle = self.model.register_forward_hook(answer)
            try:
                yield
            finally:
                handle.remove()

    @torch.no_grad()
    def _answered(
        self, watch: Watch, told: dict[int, Tensor], said: dict[int, Tensor], logits: Tensor
    ) -> Tensor:
        """The logits [R, K, V] of the last K columns, those of rows in scope by the counterfactual model."""
        length, kept = watch.ids.shape[1], logits.shape[1]
        text = watch.attended & ~watch.image if watch.begins else None
        columns: dict[int, Tensor] = {}
        for row in told:
            if text is None:
                said[row] = torch.cat([said[row], watch.ids[row]])
                columns[row] = torch.arange(length)
            else:
                columns[row] = text[row].nonzero()[:, 0]
                said[row] = watch.ids[row][columns[row]]
        found = self._logits([told[row] for row in told], [said[row] for row in told])
        logits = logits.clone()
        for row, own in zip(told, found, strict=True):
            at = columns[row] - (length - kept)
            inside = at >= 0
            logits[row, at[inside].to(logits.device)] = own[-len(at) :][inside].to(logits)
        return logits

    def reset(self) -> None:
        """Empty the memory."""
        self._entries = []

    def memory_bytes(self) -> int:
        """Features and words of the stored edits."""
        return sum(entry.vector.nbytes + entry.ids.nbytes for entry in self._entries)


def _words(rows: Rows, row: int) -> Tensor:
    """[T] the ids of a row's text, question and answer, without its picture."""
    text = (rows.prompt[row] & ~rows.image[row]) | (rows.labels[row] != -100)
    return rows.inputs["input_ids"][row][text]
