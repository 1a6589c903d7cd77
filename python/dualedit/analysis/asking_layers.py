"""What a model's decoder layers make of a batch of questions, and of other states in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import (
    IMAGE_MASK,
    find_decoder_layers,
    image_token_ids,
    resolve_linear,
    unwrap,
)
from ..models.placement import to_device
from ..runtime.partial import CANNOT, PartialForward
from ..runtime.sequence import Prompt, describe_prompt

GROUPS = ("text", "image", "all")
# Linear layers that BalancEdit is usually put on, the widest part of the MLP first.
_LINEAR = (
    "up_proj",
    "gate_up_proj",
    "fc1",
    "c_fc",
    "dense_h_to_4h",
    "w1",
    "wi",
    "down_proj",
    "fc2",
    "o_proj",
)


@dataclass(frozen=True)
class Questions:
    """A batch of questions as a model takes them, and where its text and its pictures stand.

    Attributes:
        inputs: the model's keyword arguments, on its device, labels left out.
        prompt: text, image and last columns.
        labels: [B, L] int64 with -100 outside of answers, or None.
    """

    inputs: dict[str, Tensor]
    prompt: Prompt
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        """Questions B."""
        return self.prompt.text.shape[0]

    def positions(self, group: str) -> Tensor:
        """[B, L] bool: the prompt's text, its image tokens, or both."""
        image = self.prompt.image
        if group == "image":
            return torch.zeros_like(self.prompt.text) if image is None else image
        return self.prompt.text if group == "text" else self.prompt.prompt()


def questions_from(
    model: nn.Module, inputs: Mapping[str, Tensor], image_ids: list[int] | None = None
) -> Questions:
    """A batch as a processor returns it, with what stands where.

    Args:
        model: a Hugging Face model.
        inputs: `input_ids` [B, L] and whatever else the model takes; `labels` where answers stand behind.
        image_ids: ids of image content; None takes the config's.
    """
    model = unwrap(model)
    inputs = to_device(inputs, model)
    labels, ids = inputs.pop("labels", None), inputs["input_ids"]
    known = image_token_ids(model) if image_ids is None else image_ids
    prompt = describe_prompt(
        ids, inputs.get("attention_mask"), labels, known, tuple(ids.shape), ids.device, inputs.get(IMAGE_MASK)
    )
    return Questions(inputs, prompt, labels)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Inside the block, how often a decoder layer runs is counted, in the list's one entry."""
    count = [0]

    def note(*_: Any) -> None:
        count[0] += 1

    with ExitStack() as hooks:
        for layer in find_decoder_layers(unwrap(model))[1]:
            hooks.callback(layer.register_forward_hook(note).remove)
        yield count


def first_of(output: Any) -> Tensor:
    """The states of what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, states: Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states


class LayerStates:
    """The states behind every decoder layer for one batch, and the logits that other states give.

    Logits come from the layers above alone. Where those on their own do not give the model's logits (it does
    something between its layers), the whole model runs with the states exchanged on the way.

    Args:
        model: a Hugging Face model.
        questions: the batch.
        resumes: whether layers above give the model's logits, where another batch has told; None: find out.

    Attributes:
        behind: a state [B, L, D] for each layer.
        last: [B, V] logits of the last prompt token.
        resumed: whether layers above run alone.

    Raises:
        ValueError: the layers hand on several states for every token.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, questions: Questions, resumes: bool | None = None):
        self.model, self.questions = unwrap(model), questions
        self.layers = find_decoder_layers(self.model)[1]
        self._partial: PartialForward | None = None
        self.behind: list[Tensor] = []
        with self._hooks(lambda number, states: self.behind.append(states)):
            try:
                partial = PartialForward(self.model, questions.inputs, 0)
            except CANNOT as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.behind.clear()
                logits = self.model(**questions.inputs, use_cache=False).logits
            else:
                logits, partial.logits = partial.logits, None
                self._partial = partial
        self.last = logits[last_positions(questions)]
        rows = questions.prompt.text.shape
        if len(self.behind) != len(self.layers) or any(s.shape[:-1] != rows for s in self.behind):
            raise ValueError(
                f"{type(self.model).__name__}: its decoder layers do not hand on one state for every token, "
                "so that nothing can be exchanged between them."
            )
        if resumes is None:
            resumes = self._partial is not None and self._partial.reproduces(logits)
        self.resumed = resumes and self._partial is not None

    @contextmanager
    def _hooks(self, seen: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Inside the block, states behind layers are shown, and exchanged for what `seen` returns."""
        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers):

                def look(module: nn.Module, args: tuple, output: Any, number: int = number) -> Any:
                    states = seen(number, first_of(output))
                    return None if states is None else _with_first(output, states)

                hooks.callback(layer.register_forward_hook(look).remove)
            yield

    def logits(self, layer: int, states: Tensor, at: Tensor) -> Tensor:
        """Logits [K, V] at positions, with other states behind a layer.

        Args:
            states: [B, L, D]; at: [B, L] bool, K positions.
        """
        if not self.resumed:

            def exchange(number: int, _: Tensor) -> Tensor | None:
                return states if number == layer else None

            with self._hooks(exchange):
                return self.model(**self.questions.inputs, use_cache=False).logits[at]
        end = self._partial.run(states, start=layer + 1) if layer + 1 < len(self.layers) else states
        return self._partial.head(end[at][None])[0]

    def gradients(self, loss: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor]:
        """The gradient [B, L, D] of a loss with respect to the states behind each layer.

        Args:
            loss: a number from logits [K, V] at the positions `at`.
        """
        seen: list[Tensor] = []

        def watch(number: int, states: Tensor) -> Tensor | None:
            leaf = states if states.requires_grad else states.detach().requires_grad_()
            seen.append(leaf)
            return leaf

        with torch.enable_grad(), self._hooks(watch):
            lost = loss(self.model(**self.questions.inputs, use_cache=False).logits[at])
            found = torch.autograd.grad(lost, seen, allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(seen, found, strict=True)]


def last_positions(questions: Questions) -> Tensor:
    """[B, L] bool: the last prompt token of each row."""
    prompt = questions.prompt
    found = torch.zeros_like(prompt.text)
    return found.scatter(1, prompt.last[:, None].to(found.device), True)


def layers_to_study(depth: int, most: int) -> list[int]:
    """At most so many layer numbers from 0 to depth - 1, evenly spaced, first and last among them."""
    if depth <= most:
        return list(range(depth))
    return sorted({round(i * (depth - 1) / (most - 1)) for i in range(most)})


def linear_of(model: nn.Module, path: str) -> tuple[str | None, dict[int, str]]:
    """The linear layer inside the decoder layers that BalancEdit is to edit, and its full name at each layer.

    The one with a usual name that most layers have; else the one with the most outputs.
    """
    having: dict[str, dict[int, str]] = {}
    outputs: dict[str, int] = {}
    for full, module in model.named_modules():
        rest = full.removeprefix(path + ".")
        number, _, name = rest.partition(".")
        if rest == full or not hasattr(module, "in_features") or "experts" in name.split("."):
            continue
        try:
            resolve_linear(model, full)
        except ValueError:
            continue
        having.setdefault(name, {})[int(number)] = full
        outputs[name] = module.out_features

    def worth(name: str) -> tuple[int, int, int]:
        last = name.rpartition(".")[2]
        usual = len(_LINEAR) - _LINEAR.index(last) if last in _LINEAR else 0
        return len(having[name]), usual, outputs[name]

    if not having:
        return None, {}
    best = max(having, key=worth)
    return best, having[best]
