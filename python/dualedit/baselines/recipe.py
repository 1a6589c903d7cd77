"""RECIPE (Chen et al., EMNLP 2024): retrieved continuous prompts, and a knowledge sentinel that may refuse.

An edit is read into a vector, and that into a few prompt tokens that stand in front of a question's own. A
question gets the prompt of the edit whose vector is nearest to its own, unless the sentinel's is nearer.
Trained are the two readers, the sentinel and the prompts: on writing edits and leaving other answers, and by
contrast: the own edit before the others, the sentinel before the others without it, and before all for
questions that must stay. Departures: the readers take the model's own frozen states (`Features`) in place of
a pretrained text encoder's, and see the picture; the sentinel is a vector of its own; the last two contrasts
have no hinge.
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
from ..models.architectures import find_decoder_layers, hidden_size
from ..models.prompting import Prompter
from .baseline import Question, end_token, stored_edit
from .features import asked_rows, features_of
from .layers import decoder_layer
from .lessons import Lessons, Passed, rows_of, written_and_kept
from .network_settings import RECIPESettings
from .states import entering
from .trained import Trained
from .watching import watching


class Reading(nn.Module):
    """Features [R, F] to vectors [R, width]."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.first = nn.Linear(features, width)
        self.second = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        x = self.first(features)
        return self.second(x) + x


class PromptMaker(nn.Module):
    """Vectors [E, width] to prompt tokens [E, P, D]."""

    def __init__(self, width: int, hidden: int, tokens: int):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.second = nn.Linear(width, tokens * hidden)
        self.tokens = tokens

    def forward(self, vectors: Tensor) -> Tensor:
        return self.second(self.first(vectors) + vectors).unflatten(-1, (self.tokens, -1))


class PlacesInFront:
    """A prompter that leaves places in front of some questions of a batch, for tokens that are no words.

    Args:
        places: how many; they are the first columns of each row, attended where `taken` says so.
        taken: R of them.
    """

    def __init__(self, prompter: Prompter, places: int, taken: Sequence[bool], filler: int):
        self._prompter, self._places, self._taken, self._filler = prompter, places, taken, filler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prompter, name)

    def inputs(self, questions: Sequence) -> dict[str, Tensor]:
        """As the prompter's, with the places."""
        inputs = self._prompter.inputs(questions)
        ids = inputs["input_ids"]
        for name, value in list(inputs.items()):
            if value.shape[:2] == ids.shape and not name.startswith("pixel_"):
                front = value.new_zeros(len(ids), self._places, *value.shape[2:])
                if name == "input_ids":
                    front = front + self._filler
                elif name == "attention_mask":
                    front = front + torch.tensor(self._taken, dtype=value.dtype)[:, None]
                inputs[name] = torch.cat([front, value], dim=1)
        return inputs


@dataclass(frozen=True)
class _Entry:
    vector: Tensor  # [width]
    prompt: Tensor  # [P, D]
    edit: Edit


class RECIPE(Trained):
    """Prompts in front of the question's tokens, where they enter the decoder."""

    name = "recipe"
    settings: RECIPESettings

    def _build(self) -> nn.Module:
        settings, width = self.settings, hidden_size(self.model)
        self._number = decoder_layer(self.model, settings.layer, 2 / 3)
        self._first = find_decoder_layers(self.model)[1][0]
        self._entries: list[_Entry] = []
        self._stored = 0
        self._checked = False
        network = nn.Module()
        network.fact = Reading(5 * width, settings.width)
        network.question = Reading(2 * width, settings.width)
        network.prompt = PromptMaker(settings.width, width, settings.tokens)
        network.sentinel = nn.Parameter(torch.randn(settings.width))
        return network

    def _prefixed(self, taken: Sequence[bool]) -> PlacesInFront:
        filler = end_token(self.model)
        return PlacesInFront(self.prompter, self.settings.tokens, taken, 0 if filler is None else filler)

    def _similar(self, questions: Tensor, facts: Tensor) -> Tensor:
        """[R, E + 1], the sentinel last, of vectors [R, width] and [E, width]."""
        both = torch.cat([facts, self.network.sentinel[None]])
        return questions @ both.T / self.settings.width**0.5

    # ------------------------------------------------------------------ training

    def training_loss(self, lessons: Lessons, keep_weight: float) -> Tensor:
        model, network = self.model, self.network
        edits = rows_of(model, self.prompter, *lessons.edits())
        facts = network.fact(features_of(model, edits, self._number).fact)
        plain = Passed(model, rows_of(model, self.prompter, lessons.questions, lessons.answers), 0,
                       check=not self._checked)  # fmt: skip
        self._checked = True
        asked = network.question(features_of(model, plain.rows, self._number).question)
        owner, change = (x.to(asked.device) for x in (lessons.owner, lessons.change))
        prefixed = self._prefixed([True] * len(owner))
        passed = Passed(model, rows_of(model, prefixed, lessons.questions, lessons.answers), 0)
        passed.before = plain.before
        prompts = network.prompt(facts)[owner].to(passed.states)
        states = torch.cat([prompts, passed.states[:, self.settings.tokens :]], dim=1)
        written, kept = written_and_kept(passed.logits(states), passed, lessons)
        return written + keep_weight * kept + self._contrast(self._similar(asked, facts), owner, change)

    @staticmethod
    def _contrast(similar: Tensor, owner: Tensor, change: Tensor) -> Tensor:
        edits = similar.shape[1] - 1
        wanted = torch.where(change, owner, torch.full_like(owner, edits))
        own = nn.functional.one_hot(owner, edits + 1).bool() & change[:, None]
        without = similar.masked_fill(own, torch.finfo(similar.dtype).min / 2)[change]
        sentinel = torch.full_like(owner[change], edits)
        kinds = [(similar[kind], wanted[kind]) for kind in (change, ~change) if bool(kind.any())]
        return sum(nn.functional.cross_entropy(*kind) for kind in (*kinds, (without, sentinel)))

    # ------------------------------------------------------------------ use

    def edit(self, sample: EditSample) -> None:
        """Read the edit into its vector and its prompt: one forward."""
        request = sample.request
        rows = rows_of(self.model, self.prompter, [(request.image, request.prompt)], [request.target])
        with torch.no_grad():
            vector = self.network.fact(features_of(self.model, rows, self._number).fact)
            prompt = self.network.prompt(vector)[0]
        self._stored += 1
        self._entries.append(_Entry(vector[0], prompt, stored_edit(self._stored, sample, 0.0)))

    @torch.no_grad()
    def _routes(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Number of the nearest entry, [R], and by how much the sentinel is nearer, [R]."""
        features = features_of(self.model, asked_rows(self.model, self.prompter, questions), self._number)
        stored = torch.stack([entry.vector for entry in self._entries])
        similar = self._similar(self.network.question(features.question), stored)
        best, index = similar[:, :-1].max(dim=1)
        return index, similar[:, -1] - best

    def explain(self, questions: Sequence[Question]) -> list[Explanation | None]:
        """The nearest edit; the distance is how much nearer the sentinel is, the radius 0."""
        if self._off or not self._entries:
            return [Explanation(False, None, float("inf"), 0.0) for _ in questions]
        index, behind = self._routes(questions)
        return [
            Explanation(far < 0, self._entries[i].edit, far, 0.0)
            for i, far in zip(index.tolist(), behind.tolist(), strict=True)
        ]

    @contextmanager
    def _applied(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        if self._off or not self._entries:
            yield
            return
        index, behind = self._routes(questions)
        taken = (behind < 0).tolist()
        if not any(taken):
            yield
            return
        prompts = torch.stack([self._entries[i].prompt for i in index.tolist()])
        rows = torch.tensor(taken).nonzero()[:, 0].to(prompts.device)
        plain, self.prompter = self.prompter, self._prefixed(taken)
        with watching(self.model) as watch:

            def write(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
                if not watch.begins:
                    return None
                states = entering(args, kwargs).clone()
                states[rows, : self.settings.tokens] = prompts[rows].to(states)
                return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

            handle = self._first.register_forward_pre_hook(write, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
                self.prompter = plain

    def reset(self) -> None:
        """Drop the prompts."""
        self._entries = []

    def memory_bytes(self) -> int:
        """Vectors and prompts of the stored edits."""
        return sum(entry.vector.nbytes + entry.prompt.nbytes for entry in self._entries)
