"""Routing keys beside the plain one: heads that make of a question's states the vector it is looked up by."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RoutingKey(nn.Module):
    """Unit keys from the last prompt token, and from the image and question tokens that it attends to.

    With x = LN(h), the last token's query pools the image tokens and, separately, the question tokens
    (multi-head softmax attention); key = normalise(W_s x_last + MLP([x_last, image pool, question pool])).
    The MLP's last layer starts at zero, so that an untrained head is a random projection of the plain
    last-token key, whose cosines it nearly keeps (Johnson-Lindenstrauss).

    Not in the papers, whose key is the last token's state alone (DualEdit, COLM 2025, Sec. 4.2): look-alike
    images hardly move that state, and what moves it is mixed with everything else that the token carries.

    Args:
        hidden_size: width D of the residual stream.
        key_dim: width P of a key.
        num_heads: heads of the two poolings; divides P.
        eps: of the LayerNorm.
    """

    def __init__(self, hidden_size: int, key_dim: int, num_heads: int = 4, eps: float = 1e-5):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.skip = nn.Linear(hidden_size, key_dim, bias=False)
        self.query = nn.Linear(hidden_size, 2 * key_dim)
        self.key = nn.Linear(hidden_size, key_dim)
        self.value = nn.Linear(hidden_size, key_dim)
        self.mix = nn.Linear(hidden_size + 2 * key_dim, 2 * key_dim)
        self.out = nn.Linear(2 * key_dim, key_dim)
        nn.init.normal_(self.skip.weight, std=key_dim**-0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _heads(self, states: Tensor) -> Tensor:
        """[B, L, P] as [B, heads, L, P / heads]."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _pool(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """What the query [B, P] finds where mask [B, L] is True, [B, P]; zero where nothing is."""
        some = mask.any(1, keepdim=True)
        found = nn.functional.scaled_dot_product_attention(
            self._heads(query[:, None]),
            self._heads(key),
            self._heads(value),
            attn_mask=(mask | ~some)[:, None, None],  # a softmax over nothing would be NaN
        )
        return found.transpose(1, 2).flatten(1) * some

    def forward(self, hidden: Tensor, text: Tensor, image: Tensor | None, last: Tensor) -> Tensor:
        """Keys of a batch of prompts.

        Args:
            hidden: [B, L, D] states.
            text, image: [B, L] bool, question and image tokens; image None where there are none.
            last: [B] int64, column of the last prompt token.

        Returns:
            [B, P] float32, of length 1.
        """
        place = hidden.device
        text, last = text.to(place), last.to(place)
        image = torch.zeros_like(text) if image is None else image.to(place)
        used = text | image
        # Padding may hold anything, NaN too, and zero weight times NaN is NaN.
        states = hidden.to(self.norm.weight.dtype).masked_fill(~used[:, :, None], 0.0)
        states = self.norm(states)
        end = states[torch.arange(len(last), device=place), last]
        key, value = self.key(states), self.value(states)
        look, read = self.query(end).chunk(2, dim=-1)
        pools = [self._pool(look, key, value, image), self._pool(read, key, value, text)]
        mixed = nn.functional.gelu(self.mix(torch.cat([end, *pools], dim=-1)))
        return nn.functional.normalize((self.skip(end) + self.out(mixed)).float(), dim=-1)


class PooledKey(nn.Module):
    """Unit keys from the last prompt token and the mean image token, through one linear map.

    key = normalise(M [l - c_l, i - c_i]) with l and i the two states at length 1, c their means over training
    facts; without an image the second part is zero. `training.fit_pooled_key` sets the centre and the map in
    closed form (linear discriminant analysis): what pictures and wordings of one fact differ in counts
    little, what facts differ in counts much. Unfitted, the map is random and nearly keeps cosines.

    Not in the papers. The mean image token tells look-alikes apart that the last token has half forgotten,
    and does not know what is asked, which the last token does.

    Args:
        hidden_size: width D of the residual stream.
        key_dim: width P of a key, at most 2 D.
    """

    def __init__(self, hidden_size: int, key_dim: int):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(2 * hidden_size))
        self.map = nn.Parameter(torch.randn(key_dim, 2 * hidden_size) * key_dim**-0.5)

    def forward(self, hidden: Tensor, text: Tensor, image: Tensor | None, last: Tensor) -> Tensor:
        """Keys [B, P] float32 of length 1 of a batch of prompts, arguments as those of `RoutingKey`."""
        parts = self.centred(pooled_parts(hidden, image, last))
        return nn.functional.normalize(parts @ self.map.float().T, dim=-1)

    def centred(self, parts: Tensor) -> Tensor:
        """Parts [B, 2 D] of `pooled_parts` minus their means; the image's stays zero where there is none."""
        width = parts.shape[1] // 2
        some = (parts[:, width:] != 0).any(1, keepdim=True)
        shown = torch.cat([torch.ones_like(some).expand(-1, width), some.expand(-1, width)], dim=1)
        return (parts - self.centre.to(parts.dtype)) * shown


def pooled_parts(hidden: Tensor, image: Tensor | None, last: Tensor) -> Tensor:
    """State of the last prompt token and mean state of the image tokens, each of length 1: [B, 2 D] float32.

    Args:
        hidden: [B, L, D] states; image: [B, L] bool or None; last: [B] int64.
    """
    place = hidden.device
    end = hidden[torch.arange(len(last), device=place), last.to(place)].float()
    seen = torch.zeros_like(end)
    if image is not None:
        image = image.to(place)
        # Padding may hold anything, NaN too, and zero weight times NaN is NaN.
        total = hidden.float().masked_fill(~image[:, :, None], 0.0).sum(1)
        seen = total / image.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([nn.functional.normalize(part, dim=-1) for part in (end, seen)], dim=-1)
