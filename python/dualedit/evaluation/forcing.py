"""Teacher forcing: what a model finds most probable at each token of an answer that it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..architectures import unwrap
from ..fitting import to_device
from ..prompting import Picture, Prompter, open_image

IGNORED = -100


def forced_batch(
    prompter: Prompter, questions: Sequence[tuple[Picture | None, str]], targets: Sequence[str]
) -> dict[str, Tensor]:
    """Model inputs of prompts with their targets behind them, and labels.

    Rows are padded on the right, so that a model without position ids counts from each row's first token.

    Returns:
        what the processor returns, `input_ids` and all that runs along it as [B, L] with the target's tokens
        (no end token), and "labels" [B, L] int64: the target's ids at its positions, -100 elsewhere.

    Raises:
        ValueError: no questions, another number of targets, an empty question or target.
    """
    if len(questions) != len(targets):
        raise ValueError(f"targets has {len(targets)} entries for {len(questions)} questions: pass one each.")
    opened = [(open_image(image), prompt) for image, prompt in questions]
    inputs = prompter.inputs(opened)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    answers = [
        prompter.target_ids(image, prompt, target, None).to(ids)
        for (image, prompt), target in zip(opened, targets, strict=True)
    ]
    along = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape]
    padding = getattr(prompter.tokenizer, "pad_token_id", None) or 0
    batch = dict(inputs)
    for name in along:
        # Masks continue with 1, token types with 0: the target is attended text.
        more = [
            answer if name == "input_ids" else torch.full_like(answer, int("attention" in name))
            for answer in answers
        ]
        rows = [
            torch.cat([row[kept], end.to(row)])
            for row, kept, end in zip(inputs[name], mask, more, strict=True)
        ]
        fill = padding if name == "input_ids" else 0
        batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    labels = [
        torch.cat([torch.full((int(kept.sum()),), IGNORED), answer])
        for kept, answer in zip(mask, answers, strict=True)
    ]
    batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return batch


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
