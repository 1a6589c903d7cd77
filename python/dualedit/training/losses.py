"""The loss of a training step, answer by answer.

DualEdit (COLM 2025, Sec. 4): cross-entropy on the new answer for the edit itself (reliability), for other
wordings and for other images (generality), and KL(unedited || edited) at the answers of unrelated questions,
with an image and without (locality). Each answer counts by the mean over its tokens, as in the published code
(the paper's formula sums), and each term by the mean over its answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .recipe import TERMS

CHANGE, KEEP = TERMS[:3], TERMS[3:]
IGNORED = -100
# By difficulty: the weight of a token that is right for certain, beside 1 of one that is wrong for certain.
_LEAST_WEIGHT = 0.05


def answer_positions(labels: Tensor) -> Tensor:
    """[R, L] bool: the positions in front of the answers' tokens, of labels [R, L]; their logits count."""
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))


def token_losses(logits: Tensor, before: Tensor | None, label: Tensor, change: Tensor) -> Tensor:
    """The loss [K] of each token: cross-entropy where the answer is to change, KL where it is to stay.

    Args:
        logits: [K, V] in front of the tokens, with the edits.
        before: [K, V] without them; None where all answers are to change.
        label: [K] int64, the tokens; change: [K] bool.
    """
    losses = torch.zeros(len(label), device=logits.device)
    if bool(change.any()):
        lost = nn.functional.cross_entropy(logits[change].float(), label[change], reduction="none")
        losses = losses.index_put((change.nonzero()[:, 0],), lost)
    if before is not None and not bool(change.all()):
        now, old = (x[~change].float().log_softmax(-1) for x in (logits, before))
        apart = nn.functional.kl_div(now, old, log_target=True, reduction="none").sum(-1)
        losses = losses.index_put(((~change).nonzero()[:, 0],), apart)
    return losses


def sums_by_term(losses: Tensor, answer: Tensor, terms: Tensor, by_difficulty: bool = False) -> Tensor:
    """[6] the sums of the answers' losses, in the order of `TERMS`.

    Args:
        losses: [K] of each token.
        answer: [K] int64, the number of the answer that it belongs to.
        terms: [A] int64, the number of the term that each answer belongs to.
        by_difficulty: weigh each token of a new answer by how wrong it still is (focal loss, Lin et al., ICCV
            2017, gamma 1), with weights of mean 1. An answer is right only if all of its tokens are, and most
            tokens are learned early.
    """
    term = terms[answer]
    if by_difficulty:
        wrong = 1 - (-losses.detach()).exp() + _LEAST_WEIGHT
        change = term < len(CHANGE)
        losses = torch.where(change, losses * wrong / wrong[change].mean(), losses)
    tokens = torch.bincount(answer, minlength=len(terms))[answer]
    return losses.new_zeros(len(TERMS)).index_add(0, term, losses / tokens)
