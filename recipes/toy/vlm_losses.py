"""Losses of training the embedded model: what is seen, packed answers, states that a gate can use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dualedit.toy.logos import STROKES
from dualedit.toy.model import IMAGE_TOKENS
from torch import nn
from transformers import LlavaForConditionalGeneration

from recipes.toy.vlm_batches import FAMILY, IGNORE, Rows, VisionBatches

ATTRIBUTE_COUNT = 5
GATE_SCALE, GATE_CENTRE = 12.0, 0.5
ALIKE_DIM = 64


class VisionHeads(nn.Module):
    """Linear heads on the mean image token, for training only; only the strokes outlast the vision stage."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in VisionBatches.heads.items()})
        self.strokes = nn.Linear(dim, len(STROKES))
        self.alike = nn.Linear(dim, ALIKE_DIM)
        # Scale (its logarithm) and offset of cosines as logits, as SigLIP begins with them.
        self.scale, self.offset = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-5.0))

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Image tokens [B, 36, D] -> logits per head."""
        pooled = self.norm(tokens.mean(1))
        return {name: head(pooled) for name, head in self.heads.items()}

    def lasting(self) -> list[nn.Parameter]:
        """Weights that read strokes."""
        return [*self.norm.parameters(), *self.strokes.parameters()]

    def stroke_loss(self, tokens: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Loss of the strokes of image tokens [I, 36, D], and of how many logos all are right.

        bits: [I, 20], -1 for pictures that are no logos, which do not count.
        """
        known = bits[:, 0] >= 0
        logits, bits = self.strokes(self.norm(tokens[known].mean(1))).float(), bits[known]
        right = ((logits > 0) == (bits > 0.5)).all(-1)
        return F.binary_cross_entropy_with_logits(logits, bits), int(right.sum()), len(right)

    def alike_loss(self, shown: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Loss of telling whether two pictures show the same logo, and how many of the pairs came out right.

        A sigmoid for each pair's cosine behind a linear map, as ``gate_loss``: same logo, look-alikes, other
        families, each kind with the same weight; of those apart the hardest tenth speaks.

        shown: mean image tokens [families * 8, D] as the language model gets them, as ``VisionBatches.draw``
        orders them.
        """
        with torch.autocast(shown.device.type, enabled=False):
            unit = F.normalize(self.alike(shown.float()), dim=-1)
            logits = self.scale.exp() * (unit @ unit.T) + self.offset
        logo = torch.arange(len(shown), device=shown.device) // 2
        same = logo[:, None] == logo[None]
        kin = (logo[:, None] // FAMILY == logo[None] // FAMILY) & ~same
        upper = torch.ones_like(same).triu(1)
        loss = F.softplus(-logits[same & upper]).mean() * 2
        for other in (kin, ~kin & ~same):
            found = F.softplus(logits[other & upper])
            if len(found):
                loss = loss + found.topk(max(1, len(found) // 10)).values.mean()
        pairs = (same | kin) & upper
        return loss, int(((logits > 0) == same)[pairs].sum()), int(pairs.sum())


def image_tokens(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Vision tower's image tokens [B, 36, D], the class token dropped."""
    return model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]


def shown_tokens(model: LlavaForConditionalGeneration, tokens: torch.Tensor) -> torch.Tensor:
    """Image tokens [B, 36, D] as the language model gets them."""
    return model.model.multi_modal_projector(tokens)


def vision_loss(heads: VisionHeads, tokens: torch.Tensor, labels: torch.Tensor, bits: torch.Tensor) -> tuple:
    """Loss of the vision stage and, per head, how many labels were right of how many there were."""
    logits = heads(tokens)
    total, counts = torch.zeros(()), {}
    for i, (name, found) in enumerate(logits.items()):
        known = labels[:, i] != IGNORE
        if known.any():
            weight = 1.0 if name in ("entity", "digit") else 0.6
            total = total + weight * F.cross_entropy(found[known].float(), labels[known, i])
            counts[name] = (int((found[known].argmax(-1) == labels[known, i]).sum()), int(known.sum()))
    # One unit per stroke: strokes are shared by all logos, so they are what the tower learns to see first.
    loss, *counts["strokes"] = heads.stroke_loss(tokens, bits)
    return total + len(STROKES) * loss, counts


def attention_mask(rows: Rows) -> torch.Tensor:
    """Which token sees which: own question and the picture, backwards only.

    Returns an additive mask [B, 1, L, L] for eager attention, which is several times cheaper here than the
    fused CPU kernel's backward pass.
    """
    query, key = rows.group[:, :, None], rows.group[:, None, :]
    length = rows.group.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (query == key) | ((key == 0) & (query > 0) & ~rows.blind[:, :, None])
    return torch.zeros(seen.shape).masked_fill(~(seen & causal), -1e4)[:, None]


def language_states(
    model: LlavaForConditionalGeneration, rows: Rows, layers: tuple[int, ...], answered: bool = True
) -> tuple:
    """Normalised last states [B, L, D], the residual streams after the layers named in ``layers``, [B, L, D]
    each, and the vision tower's image tokens [I, 36, D].

    ``answered``: False stops after the last of ``layers``, for rows without labels; the last states are None.
    """
    inner = model.model
    hidden = inner.get_input_embeddings()(rows.ids)
    seen = image_tokens(model, rows.pixel_values)
    pictures = inner.multi_modal_projector(seen).to(hidden.dtype)
    count = len(pictures)
    pictured = torch.cat([pictures, hidden[:count, IMAGE_TOKENS:]], dim=1)
    hidden = torch.cat([pictured, hidden[count:]], dim=0)
    llama = inner.language_model
    rotary = llama.rotary_emb(hidden, rows.position)
    mask, kept = attention_mask(rows), []
    for number, layer in enumerate(llama.layers, 1):
        if not answered and number > max(layers):
            return None, kept, seen
        hidden = layer(
            hidden, attention_mask=mask, position_ids=rows.position, position_embeddings=rotary
        )
        if number in layers:
            kept.append(hidden)
    return llama.norm(hidden), kept, seen


def gate_loss(states: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """Pairwise sigmoid loss on cosines of last-prompt-token states [N, D] with fact ids [N].

    Two pictures and wordings of the same fact should have a cosine above ``GATE_CENTRE``; the same question
    about a look-alike, another question about the same logo, and anything else below it.  The kinds weigh the
    same, so that one threshold serves them all.
    """
    unit = F.normalize(states.float(), dim=-1)
    with torch.autocast(states.device.type, enabled=False):  # bfloat16 would round cosines to 1/256
        cosine = unit @ unit.T
    entity, attribute = facts // ATTRIBUTE_COUNT, facts % ATTRIBUTE_COUNT
    same_entity = entity[:, None] == entity[None]
    same_attribute = attribute[:, None] == attribute[None]
    upper = torch.ones_like(same_entity).triu(1)
    logits = GATE_SCALE * (cosine - GATE_CENTRE)
    loss = F.softplus(-logits[same_entity & same_attribute & upper]).mean() * 2
    for other in (
        same_attribute & ~same_entity,
        same_entity & ~same_attribute,
        ~same_entity & ~same_attribute,
    ):
        found = F.softplus(logits[other & upper])
        if len(found):
            # Look-alikes are few among the others: the hardest tenth speaks for its kind.
            loss = loss + found.topk(max(1, len(found) // 10)).values.mean()
    return loss


def language_loss(states: tuple, strange: tuple, rows: Rows, others: Rows, embeddings: torch.Tensor) -> tuple:
    """Losses of one packed batch and one of strangers from what ``language_states`` returned for each and the
    tied word embeddings [V, D].

    Returns the answer loss (mean over answer tokens, end included), the gate losses (summed over the kept
    layers) of all logos and of the strangers alone, and which of the wanted tokens were right, bool [number
    of labels].
    """
    last, kept, _ = states
    wanted = rows.label != IGNORE
    logits = F.linear(last[wanted], embeddings).float()
    answer = F.cross_entropy(logits, rows.label[wanted])
    asked, unknown = rows.fact >= 0, others.fact >= 0
    facts = torch.cat([rows.fact[asked], others.fact[unknown]])
    gate = sum(
        gate_loss(torch.cat([a[asked], b[unknown]]), facts) for a, b in zip(kept, strange[1], strict=True)
    )
    alone = sum(gate_loss(found[unknown], others.fact[unknown]) for found in strange[1])
    return answer, gate, alone, logits.argmax(-1) == rows.label[wanted]
