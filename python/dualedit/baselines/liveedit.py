"""LiveEdit (Chen et al., CVPR 2025): a low-rank expert for each edit, found by picture, weighed by words.

At one decoder layer a generator reads the states of an edit (picture, question, answer) and makes an expert
(U, V); an extractor makes features of its picture, as the question asks for them, and of its question. At
use the hard filter keeps the experts whose picture features are more similar to the question's than a learned
sentinel's, and the soft router weighs those by softmax times sigmoid of the similarity of the questions'
features; the weighed sum of relu(norm(h) U^T) V is added to every state h, as in their paper and code.
Departures: of the router's training pairs, questions that must stay count as negatives of the edit that they
were drawn for, so that other questions about the same picture do. Without a picture there is nothing to
filter by: such questions are never edited, such edits refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..models.architectures import find_decoder_layers, hidden_size
from .baseline import Question
from .layers import decoder_layer
from .lessons import Lessons, Passed, rows_of, written_and_kept
from .network_settings import LiveEditSettings
from .trained import Trained
from .watching import Watch, first_of, watching, with_first


class Attention(nn.Module):
    """Queries [R, Q, A] read states [R, L, D], of which `columns` [R, L] count, into [R, Q, out]."""

    def __init__(self, asking: int, width: int, inner: int, out: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(asking, inner), nn.Linear(width, inner)
        self.value = nn.Linear(width, out)

    def forward(self, asking: Tensor, states: Tensor, columns: Tensor) -> Tensor:
        parts = (self.query(asking), self.key(states), self.value(states))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        mask = columns[:, None, None, :]
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return found.transpose(1, 2).flatten(2)


class Extractor(nn.Module):
    """Features of a question and of its picture.

    Args:
        sentinel: picture states of nothing, whose similarity an expert has to exceed; None for none.
    """

    def __init__(self, width: int, inner: int, heads: int, queries: int, sentinel: int | None):
        super().__init__()
        self.norm_picture, self.norm_question = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask_picture = nn.Parameter(torch.randn(1, queries, inner) * inner**-0.5)
        self.ask_question = nn.Parameter(torch.randn(1, queries, inner) * inner**-0.5)
        self.what = Attention(inner, width, inner, inner, heads)
        self.look = Attention(inner, width, inner, inner, heads)
        self.question = Attention(inner, width, inner, inner, heads)
        self.sentinel = None if sentinel is None else nn.Parameter(torch.randn(1, sentinel, width))

    def pictured(self, states: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """[R, Q, A] of states [R, L, D] with the columns of image and question."""
        states = self.norm_picture(states)
        return self.look(self._asked(states, text), states, image)

    def of_nothing(self, states: Tensor, text: Tensor) -> Tensor:
        """[R, Q, A] the same of the sentinel, as the question asks for it."""
        nothing = self.norm_picture(self.sentinel).expand(len(states), -1, -1)
        asked = self._asked(self.norm_picture(states), text)
        return self.look(asked, nothing, torch.ones(nothing.shape[:2], dtype=torch.bool, device=text.device))

    def _asked(self, states: Tensor, text: Tensor) -> Tensor:
        return self.what(self.ask_picture.expand(len(states), -1, -1), states, text)

    def asked(self, states: Tensor, text: Tensor) -> Tensor:
        """[R, Q, A] of the question."""
        return self.question(self.ask_question.expand(len(states), -1, -1), self.norm_question(states), text)


class Generator(nn.Module):
    """Half of an expert, [E, rank, D], from the states of an edit."""

    def __init__(self, width: int, inner: int, heads: int, rank: int, scale: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rows = nn.Parameter(torch.randn(1, rank, inner) * inner**-0.5)
        self.read = Attention(inner, width, inner, width, heads)
        self.scale = 1 / (scale * rank**0.5)

    def forward(self, states: Tensor, columns: Tensor) -> Tensor:
        return self.scale * self.read(self.rows.expand(len(states), -1, -1), self.norm(states), columns)


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """[R, E] of features [R, Q, A] and [E, Q, A]: mean over Q of the scaled products."""
    return torch.einsum("rqa,eqa->re", one, other) / (one.shape[1] * one.shape[2] ** 0.5)


def similarity_of_pairs(one: Tensor, other: Tensor) -> Tensor:
    """[R] the same of row and row, of features [R, Q, A] each."""
    return (one * other).sum((1, 2)) / (one.shape[1] * one.shape[2] ** 0.5)


def fusion(pictures: Tensor, nothing: Tensor, questions: Tensor) -> Tensor:
    """[R, E] how much of each expert a question gets: softmax times sigmoid, over those that pass the filter.

    Args:
        pictures: [R, E] similarities of pictures; nothing: [R] of the sentinel.
        questions: [R, E] similarities of questions.
    """
    passed = pictures > nothing[:, None]
    return weighed(questions, passed)


def weighed(questions: Tensor, passed: Tensor) -> Tensor:
    """[R, E] softmax over the experts that `passed` [R, E] times sigmoid; zero for the others."""
    # Finite, so that a question that passes nowhere has no undefined gradient.
    share = questions.masked_fill(~passed, torch.finfo(questions.dtype).min / 2).softmax(-1)
    return torch.where(passed, share * questions.sigmoid(), torch.zeros_like(questions))


def residual(states: Tensor, u: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """[R, L, D] what experts add: sum over e of w_e relu(states U_e^T) V_e.

    Args:
        states: [R, L, D], normalised; u, v: [E, rank, D]; weights: [R, E].
    """
    used = (weights != 0).any(0).nonzero()[:, 0]
    opened = torch.relu(torch.einsum("rld,ekd->rlek", states, u[used]))
    return torch.einsum("rlek,re,ekd->rld", opened, weights[:, used], v[used])


@dataclass
class _Experts:
    """E of them: picture and question features [E, Q, A], U and V [E, rank, D]."""

    pictures: Tensor
    questions: Tensor
    u: Tensor
    v: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in vars(self).values())


class LiveEdit(Trained):
    """Experts at one decoder layer's output."""

    name = "liveedit"
    settings: LiveEditSettings

    def _build(self) -> nn.Module:
        model, settings = self.model, self.settings
        self._number = decoder_layer(model, settings.layer, 2 / 3)
        layers = find_decoder_layers(model)[1]
        if self._number == len(layers) - 1:
            raise ValueError(
                f"layer={settings.layer!r} is the last of {len(layers)}: what LiveEdit writes to a layer's "
                f"output has to be read by layers above. Pass a lower one."
            )
        self._layer = layers[self._number]
        self._stored: list[_Experts] = []
        self._checked = False
        width, inner, heads = hidden_size(model), settings.width, settings.heads
        return nn.ModuleDict(
            {
                "edit": Extractor(width, inner, heads, settings.queries, None),
                "input": Extractor(width, inner, heads, settings.queries, settings.sentinel),
                "u": Generator(width, inner, heads, settings.rank, settings.scale),
                "v": Generator(width, inner, heads, settings.rank, settings.scale),
                "norm": nn.LayerNorm(width),
            }
        )

    def _passed(self, questions: list, answers: list) -> Passed:
        rows = rows_of(self.model, self.prompter, questions, answers)
        passed = Passed(self.model, rows, self._number + 1, check=not self._checked)
        self._checked = True
        return passed

    def _experts(self, passed: Passed) -> _Experts:
        network, rows, states = self.network, passed.rows, passed.states.float()
        text = _question(rows.prompt, rows.image)
        every = rows.image | text | (rows.labels != -100)
        return _Experts(
            network["edit"].pictured(states, rows.image, text), network["edit"].asked(states, text),
            network["u"](states, every), network["v"](states, every),
        )  # fmt: skip

    # ------------------------------------------------------------------ training

    def prepare(self, samples: Sequence[EditSample]) -> None:
        """Refuse training edits without a picture."""
        bare = next((i for i, sample in enumerate(samples) if sample.request.image_source is None), None)
        if bare is not None:
            raise ValueError(f"samples[{bare}] has image=None: LiveEdit is trained on edits with a picture.")

    def training_loss(self, lessons: Lessons, keep_weight: float) -> Tensor:
        lessons = lessons.only(torch.tensor([image is not None for image, _ in lessons.questions]))
        experts = self._experts(self._passed(*lessons.edits()))
        asked = self._passed(lessons.questions, lessons.answers)
        network, rows, states = self.network, asked.rows, asked.states.float()
        device = states.device
        owner, change = lessons.owner.to(device), lessons.change.to(device)
        text = _question(rows.prompt, rows.image)
        questions = similarity(network["input"].asked(states, text), experts.questions)
        count, edits = len(owner), len(lessons.samples)
        # A random number of experts stands beside a question's own; what has to stay meets any number.
        number = torch.randint(0, edits + 1, (count, 1), device=device)
        present = torch.arange(edits, device=device) < number
        own = nn.functional.one_hot(owner, edits).bool()
        present = present | (own & change[:, None])
        added = residual(network["norm"](states), experts.u, experts.v, weighed(questions, present))
        written, kept = written_and_kept(asked.logits(asked.states + added.to(asked.states)), asked, lessons)
        near, nothing = _near(network["input"], states, rows.image, text, experts.pictures)
        routing = _soft_loss(questions, owner, change) + _hard_loss(near, nothing, owner, change)
        return written + keep_weight * kept + routing

    # ------------------------------------------------------------------ use

    def edit(self, sample: EditSample) -> None:
        """Make an expert of the edit: one forward, nothing is fitted."""
        request = sample.request
        if request.image_source is None:
            raise ValueError("image=None: LiveEdit finds an edit by its picture. Pass one.")
        with torch.no_grad():
            passed = self._passed([(request.image, request.prompt)], [request.target])
            self._stored.append(self._experts(passed))

    @contextmanager
    def _applied(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        if self._off or not self._stored:
            yield
            return
        parts = zip(*(vars(one).values() for one in self._stored), strict=True)
        experts = _Experts(*(torch.cat(part) for part in parts))
        with watching(self.model) as watch:

            def add(module: nn.Module, args: tuple, output: Any) -> Any:
                hidden = first_of(output)
                states = hidden.float()
                if watch.decided is None:
                    watch.decided = self._weights(states, watch, experts)
                weights = watch.decided
                rows = (weights != 0).any(1)
                if not bool(rows.any()):
                    return None
                found = hidden.clone()
                own = self.network["norm"](states[rows])
                found[rows] += residual(own, experts.u, experts.v, weights[rows]).to(hidden)
                return with_first(output, found)

            handle = self._layer.register_forward_hook(add)
            try:
                yield
            finally:
                handle.remove()

    @torch.no_grad()
    def _weights(self, states: Tensor, watch: Watch, experts: _Experts) -> Tensor:
        """[R, E] what each question gets of each expert; zero for a question without a picture."""
        image = watch.image.to(states.device)
        text = _question(watch.prompt.to(states.device), image)
        shown = image.any(1)
        found = states.new_zeros(len(states), len(experts.u))
        if bool(shown.any()):
            states, image, text = states[shown], image[shown], text[shown]
            network = self.network["input"]
            near, nothing = _near(network, states, image, text, experts.pictures)
            found[shown] = fusion(near, nothing, similarity(network.asked(states, text), experts.questions))
        return found

    def reset(self) -> None:
        """Drop the experts."""
        self._stored = []

    def memory_bytes(self) -> int:
        """Features and experts of the edits."""
        return sum(one.nbytes for one in self._stored)


def _near(
    network: Extractor, states: Tensor, image: Tensor, text: Tensor, stored: Tensor
) -> tuple[Tensor, Tensor]:
    """Similarities of pictures with stored ones [R, E], and with the sentinel [R]."""
    pictures = network.pictured(states, image, text)
    nothing = similarity_of_pairs(pictures, network.of_nothing(states, text))
    return similarity(pictures, stored), nothing


def _question(prompt: Tensor, image: Tensor) -> Tensor:
    """[R, L] bool, a prompt's text behind its picture; all of its text where none stands behind."""
    text = prompt & ~image
    behind = text & (image.flip(1).cumsum(1).flip(1) == 0)
    return torch.where(behind.any(1, keepdim=True), behind, text)


def _soft_loss(questions: Tensor, owner: Tensor, change: Tensor) -> Tensor:
    """The softmax finds the own edit, the sigmoid says whether a question is about it."""
    edits = questions.shape[1]
    found = nn.functional.cross_entropy(questions[change], owner[change])
    own = nn.functional.one_hot(owner, edits).bool()
    other = (owner + 1) % edits
    positive = questions[own & change[:, None]]
    others = questions[change].gather(1, other[change, None])[:, 0]
    negative = torch.cat([questions[own & ~change[:, None]], others])
    parted = -nn.functional.logsigmoid(positive).mean() - nn.functional.logsigmoid(-negative).mean()
    return found + parted


def _hard_loss(near: Tensor, nothing: Tensor, owner: Tensor, change: Tensor) -> Tensor:
    """The own edit's picture is nearer than others and the sentinel; the sentinel else."""
    both = torch.cat([near, nothing[:, None]], dim=1)
    wanted = torch.where(change, owner, torch.full_like(owner, near.shape[1]))
    kinds = [kind for kind in (change, ~change) if bool(kind.any())]
    return sum(nn.functional.cross_entropy(both[kind], wanted[kind]) for kind in kinds)
