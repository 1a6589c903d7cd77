"""Teacher forcing: what a model finds most probable at each token of an answer that it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.architectures import unwrap
from ..models.images import Picture
from ..models.placement import to_device
from ..models.prompting import Prompter, open_questions

IGNORED = -100
# Tensors over patches or over a Q-Former's own tokens, which may happen to be as long as the prompt.
_OTHER_SEQUENCES = ("pixel_", "qformer_")


def forced_batch(
    prompter: Prompter,
    questions: Sequence[tuple[Picture | None, str]],
    targets: Sequence[str],
    token_type: int = 0,
    end: int | None = None,
) -> dict[str, Tensor]:
    """Model inputs of prompts with their targets behind them, and labels.

    Rows are padded on the right, so that a model without position ids counts from each row's first token.

    Args:
        token_type: what marks the targets' tokens in token types (`architectures.target_token_type`).
        end: the id behind each target; None for none, as the field scores.

    Returns:
        what the processor returns, `input_ids` and all that runs along it as [B, L] with the target's tokens,
        and "labels" [B, L] int64: the target's ids at its positions, -100 elsewhere.

    Raises:
        ValueError: no questions, another number of targets, an empty question or target.
    """
    if len(questions) != len(targets):
        raise ValueError(f"targets has {len(targets)} entries for {len(questions)} questions: pass one each.")
    opened = open_questions(questions)
    inputs = prompter.inputs(opened)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    answers = [
        prompter.target_ids(image, prompt, target, end).to(ids)
        for (image, prompt), target in zip(opened, targets, strict=True)
    ]
    batch = dict(inputs)
    for name, value in inputs.items():
        if (
            isinstance(value, Tensor)
            and value.shape[:2] == ids.shape
            and not name.startswith(_OTHER_SEQUENCES)
        ):
            batch[name] = _continued(name, value, mask, answers, prompter, token_type)
    labels = [
        torch.cat([torch.full((int(kept.sum()),), IGNORED), answer])
        for kept, answer in zip(mask, answers, strict=True)
    ]
    batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return batch


def _continued(
    name: str, value: Tensor, mask: Tensor, answers: Sequence[Tensor], prompter: Prompter, token_type: int
) -> Tensor:
    """What runs along `input_ids` [B, P, ...], each row without its padding and with its answer's part."""
    rows = []
    for row, kept, answer in zip(value, mask, answers, strict=True):
        head = row[kept]
        if name == "input_ids":
            tail = answer
        elif "attention" in name and value.ndim > 2:
            tail = head[-1:].expand(len(answer), *head.shape[1:])  # the pictures that the last token sees
        else:
            # The target is attended text: attention masks continue with 1, masks of pictures with 0.
            one = 1 if "attention" in name else token_type if name == "token_type_ids" else 0
            tail = torch.full((len(answer), *head.shape[1:]), one)
        rows.append(torch.cat([head, tail.to(head)]))
    padding = getattr(prompter.tokenizer, "pad_token_id", None) or 0
    return nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=padding if name == "input_ids" else 0
    )


@torch.no_grad()
def forced_predictions(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each row of a `forced_batch`, the most probable ids [T] and the target's ids [T], on the CPU.

    The labels go into the call: a gate takes the prompt to end where they begin.

    Raises:
        ValueError: a model whose logits do not stand for the input's tokens one to one.
    """
    inputs = to_device(batch, unwrap(model))
    labels = inputs["labels"]
    logits = model(**inputs, use_cache=False).logits
    if logits.shape[1] != labels.shape[1]:
        raise ValueError(
            f"{type(unwrap(model)).__name__} gives logits for {logits.shape[1]} positions of an input of "
            f"{labels.shape[1]} tokens, so an answer's tokens cannot be found in them. Measure it with free "
            "generation only."
        )
    best = logits[:, :-1].argmax(-1)
    found = labels[:, 1:] != IGNORED
    return [
        (row[kept].cpu(), label[kept].cpu())
        for row, label, kept in zip(best, labels[:, 1:], found, strict=True)
    ]


def token_accuracy(predicted: Tensor, target: Tensor) -> float:
    """Share of equal ids of two [T], as the field's papers score an answer (no end token)."""
    return float((predicted == target).double().mean())
