"""What one forward or one generation knows: its prompt, its masks, and the edits it has decided on.

Layers need to know which positions are prompt text, which are image, and where the prompt ends. None of that
is kept in modules: it travels in a context variable for the length of a call, and with the key-value cache
for the length of a sequence, so two threads, two models, or an edit made while a generation runs do not see
each other.

A sequence over one kept cache may have several turns. Its decision holds while one column follows another;
a call of several new columns is a new turn, which decides again, for those columns only: what is in the cache
stays as it was read. So an edit that first applies in a later turn reaches the text of that turn, and images
of earlier turns no more; a caller who wants all of it edited runs the conversation without the old cache.

The way of a call: `generate` (or the model's forward) states the prompt; the stack that owns the decoder
layers states how much of the sequence is in the cache already; the wrapped layers read both as a
`ForwardPass`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import IMAGE_MASK
from . import compile as compiling
from .frames import Bound, Frame, Record, States, drop, find, framed, push
from .hooks import CallBegins, Checkpointing, Ends, PassBegins, packed_by
from .sequence import ForwardPass, Prompt, Sequence, describe_prompt, last_true

_CHECKPOINTING = "_gradient_checkpointing_func"
_PACKED = (
    "{what}: several sequences are packed into one row, so edits cannot tell whose prompt this is. Use "
    "ordinary padded batches (generate, not generate_batch), or remove the edit adapter with unload()."
)


class GenerateWithContext:
    """Stands in for a model's `generate`: notes the prompt, then calls the model's own."""

    def __init__(self, model: nn.Module, runtime: EditRuntime):
        self.model = model
        self.runtime = runtime
        self.previous = model.__dict__.get("generate")

    def _own(self):
        return self.previous if self.previous is not None else type(self.model).generate.__get__(self.model)

    @property
    def __signature__(self):
        return inspect.signature(self._own())

    def _given(self, own, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, those in the function's own **kwargs included."""
        signature = inspect.signature(own)
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        return given

    def __call__(self, *args, **kwargs):
        own = self._own()
        given = self._given(own, args, kwargs)
        config = given.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk}: a prompt that is read in pieces drops the image in most "
                f"models and has no single last prompt token to decide on. Leave prefill_chunk_size out."
            )
        drafts = bool(getattr(config, "is_assistant", None))
        with framed(self.runtime, "generate", _Generation(given, drafts)):
            return own(*args, **kwargs)


class GenerateBatchRefused:
    """Stands in for a model's `generate_batch`, which packs the sequences of a batch into one row."""

    def __init__(self, runtime: EditRuntime):
        self.runtime = runtime

    def __call__(self, *args, **kwargs):
        raise ValueError(_PACKED.format(what="generate_batch"))


@dataclass
class _Generation:
    """A running `generate`: its arguments, and its sequence once the prefill has begun.

    `drafts`: it proposes tokens for another model (assisted decoding), round after round over one cache.
    """

    arguments: Mapping[str, Any]
    drafts: bool = False
    sequence: Sequence | None = None


class EditRuntime:
    """Hooks of one base model that give its wrapped layers their context. Shared by all editors on the model.

    Attributes:
        image_ids: ids of image content in the input.
        groups: memories of each adapter, by (method, adapter name).
        saved_in: the folder that its edits are saved in (`saved.Origin`), once there is one.
    """

    def __init__(self, image_ids: list[int]):
        self.handle = compiling.handle(self)
        self.image_ids = list(image_ids)
        self.groups: dict[tuple[str, str], Any] = {}
        self.saved_in: Any = None
        self._handles: list[Any] = []
        self._watched: list[nn.Module] = []
        self._model: nn.Module | None = None

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.handle = compiling.handle(self)  # a copy is another runtime

    # ------------------------------------------------------------------ installing

    def install(self, model: nn.Module, stack: nn.Module) -> None:
        """Hook the model (its forward and generate) and the module that owns the decoder layers."""
        self._model = model
        self._handles = [
            model.register_forward_pre_hook(CallBegins(self), with_kwargs=True),
            model.register_forward_hook(Ends(self, "call"), always_call=True),
            stack.register_forward_pre_hook(PassBegins(self), with_kwargs=True),
            stack.register_forward_hook(Ends(self, "pass"), always_call=True),
        ]
        if hasattr(type(model), "generate"):
            model.generate = GenerateWithContext(model, self)
        if hasattr(type(model), "generate_batch"):
            model.generate_batch = GenerateBatchRefused(self)

    def watch(self, *modules: nn.Module) -> None:
        """Let a decoder layer with an edited linear layer, and what checkpoints it, know whose call it is."""
        self._watched += [m for m in modules if not any(m is known for known in self._watched)]

    def _frame_checkpoints(self) -> None:
        """Whoever turned gradient checkpointing on may have done so after the editor came."""
        for module in self._watched:
            function = module.__dict__.get(_CHECKPOINTING)
            if function is not None and not isinstance(function, Checkpointing):
                setattr(module, _CHECKPOINTING, Checkpointing(self, function))

    def uninstall(self) -> None:
        """Take the hooks off again; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._watched:
            function = module.__dict__.get(_CHECKPOINTING)
            if isinstance(function, Checkpointing):
                setattr(module, _CHECKPOINTING, function.previous)
        model, self._handles, self._watched, self._model = self._model, [], [], None
        if model is None:
            return
        if isinstance(model.__dict__.get("generate"), GenerateWithContext):
            previous = model.__dict__.pop("generate").previous
            if previous is not None:
                model.generate = previous
        if isinstance(model.__dict__.get("generate_batch"), GenerateBatchRefused):
            del model.generate_batch

    # ------------------------------------------------------------------ what layers ask

    def current_pass(self) -> ForwardPass | None:
        """The stack's running call, or None outside one."""
        frame = find(self, "pass", "replayed")
        return frame.content if frame else None

    def mode(self) -> Record | Bound | None:
        """How adapters are to behave in this block of code; None is the ordinary way."""
        frame = find(self, "mode")
        return frame.content if frame else None

    def switched_off(self) -> frozenset[str]:
        """Names of the edit adapters that are off in this block of code."""
        frame = find(self, "disabled")
        return frame.content if frame else frozenset()

    # ------------------------------------------------------------------ what hooks do

    def enter_call(self, given: Mapping[str, Any]) -> None:
        """The model's forward begins: note its arguments."""
        drop(self, "call", "pass", "replayed")
        push(Frame(self, "call", given))

    def enter_pass(self, inputs: Mapping[str, Any], start: int, known: Sequence | None) -> Sequence:
        """A call of the stack begins, over a cache of `start` columns that belong to `known`."""
        drop(self, "pass")
        self._frame_checkpoints()
        forward = self._begin_pass(inputs, start, known)
        push(Frame(self, "pass", forward))
        return forward.sequence

    def leave_pass(self) -> Sequence | None:
        """A call of the stack has ended, and in a compiled model the model's with it: whose was it?"""
        frame = find(self, "pass")
        drop(self, "call", "pass")
        return frame.content.sequence if frame else None

    def _begin_pass(self, inputs: Mapping[str, Any], start: int, known: Sequence | None) -> ForwardPass:
        given = (inputs.get(name) for name in ("inputs_embeds", "input_ids", "hidden_states"))
        hidden = next((value for value in given if value is not None), None)
        if hidden is None:
            raise ValueError("input_ids and inputs_embeds are both None: pass one of them.")
        packed = packed_by(inputs)
        if any(len(group) for group in self.groups.values()) and (packed or _positions_restart(inputs)):
            raise ValueError(_PACKED.format(what=packed or "position_ids"))
        batch, length = hidden.shape[:2]
        sequence = self._sequence(inputs, known, start, (batch, length), hidden.device)
        if known is not None and sequence is not known and start > 0:
            sequence.mean_image = known.mean_image  # a new turn is about the pictures of those before
        entering = hidden if hidden.is_floating_point() and hidden.ndim == 3 else None
        return ForwardPass(sequence, start, batch, length, entering)

    def _sequence(self, inputs, known, start: int, shape: tuple[int, int], device) -> Sequence:
        frame = find(self, "generate", "call")
        generation = find(self, "generate")
        if generation is not None and generation.content.sequence is not None:
            return generation.content.sequence
        given = frame.content if generation is None and frame is not None else inputs
        drafting = generation is not None and generation.content.drafts
        if start > 0 and known is not None and (drafting or _goes_on(given, shape)):
            sequence = known
        elif generation is not None:
            sequence = self._generation_prompt(generation.content, frame, inputs, start, shape, device)
        else:
            sequence = Sequence(_behind_cache(self.describe(given, shape, device), start))
        if generation is not None:
            generation.content.sequence = sequence
        return sequence

    def _generation_prompt(self, generation, frame, inputs, start, shape, device) -> Sequence:
        given = dict(generation.arguments)
        ids = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
        length = ids.shape[1] if ids is not None else start + shape[1]
        if start + shape[1] < length:
            raise ValueError(
                f"The decoder got {start + shape[1]} positions for a prompt of {length} input ids, so "
                f"image and text positions cannot be told apart. Expand the image placeholders with the "
                "model's processor."
            )
        rows = ids.shape[0] if ids is not None else shape[0]
        if given.get("attention_mask") is None and frame is not None and frame.kind == "call":
            mask = frame.content.get("attention_mask")  # what generate inferred from the padding token
            if mask is not None and mask.ndim == 2 and mask.shape[0] % rows == 0:
                given["attention_mask"] = mask[:: mask.shape[0] // rows, :length]  # beams repeat each row
        given["input_ids"] = ids
        prompt = self.describe(given, (rows, length), device)
        # Over a kept cache, generate takes the whole conversation, or its new part with a mask for all.
        only_new = start > 0 and length == shape[1]
        return Sequence(_behind_cache(prompt, start) if only_new else prompt)

    def describe(self, given: Mapping[str, Any], shape: tuple[int, int], device: torch.device) -> Prompt:
        """The prompt of a call of shape (B, P), from its arguments or from `explicit_masks` around it."""
        masks = find(self, "masks")
        if masks is not None:
            return _in_front(masks.content, shape[1])
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is not None and ids.shape != shape:
            ids = None  # the stack works on another sequence than the caller's ids describe
        if mask is not None and mask.ndim == 2 and mask.shape[1] < shape[1]:
            mask = None
        image = given.get(IMAGE_MASK)
        return describe_prompt(ids, mask, given.get("labels"), self.image_ids, shape, device, image)


def _goes_on(given: Mapping[str, Any], shape: tuple[int, int]) -> bool:
    """Whether new columns [B, S] behind a cache belong to the answer that is being written there.

    One column is the next token. More are a new turn, to be decided anew, unless labels call them all target.
    """
    labels = given.get("labels")
    all_target = labels is not None and labels.shape == shape and not bool((labels == -100).any())
    return shape[1] <= 1 or all_target


def _positions_restart(inputs: Mapping[str, Any]) -> bool:
    """Whether positions [B, S] begin anew within a row, as padding-free training marks its sequences."""
    positions = inputs.get("position_ids")
    if positions is None or positions.ndim != 2 or positions.shape[1] < 2:
        return False
    # Padded rows have such positions, too, and a mask.
    return inputs.get("attention_mask") is None and bool((positions.diff() <= 0).any())


def _behind_cache(prompt: Prompt, start: int) -> Prompt:
    """The same prompt with `start` columns in front that are in the cache already."""
    if start == 0:
        return prompt
    image = None if prompt.image is None else nn.functional.pad(prompt.image, (start, 0))
    return Prompt(
        nn.functional.pad(prompt.text, (start, 0)), image, prompt.last + start, prompt.last_input + start
    )


def _in_front(prompt: Prompt, length: int) -> Prompt:
    """The same prompt with the columns of a target behind it, up to `length`."""
    behind = length - prompt.length
    if behind <= 0:
        return prompt
    image = None if prompt.image is None else nn.functional.pad(prompt.image, (0, behind))
    last_input = torch.full_like(prompt.last_input, length - 1)
    return Prompt(nn.functional.pad(prompt.text, (0, behind)), image, prompt.last, last_input)


def runtime_of(model: nn.Module) -> EditRuntime | None:
    """The runtime that editors installed on a base model, or None."""
    return model.__dict__.get("_dualedit_runtime")


@contextmanager
def recording(model: nn.Module) -> Iterator[States]:
    """Run the frozen model: adapters do nothing but note what they see, by layer name."""
    with framed(runtime_of(model), "mode", Record()) as record:
        yield record.states


@contextmanager
def bound(model: nn.Module, route: Tensor, edits: Mapping[str, Any]) -> Iterator[None]:
    """Run the model with the given edits bound to the rows, gradients included, instead of routing."""
    with framed(runtime_of(model), "mode", Bound(route, edits)):
        yield


@contextmanager
def explicit_masks(model: nn.Module, text: Tensor, image: Tensor | None = None) -> Iterator[None]:
    """State the prompt's positions by hand, for callers that pass `inputs_embeds`.

    Args:
        text, image: [B, P] bool; prompt text and image positions of the sequence (padding is neither);
            `image`
            None: there is none.
    """
    image = torch.zeros_like(text) if image is None else image
    prompt = text | image
    masks = Prompt(text, image, last_true(prompt), last_true(prompt))
    with framed(runtime_of(model), "masks", masks):
        yield
