"""A learned routing key: a small head that turns a question's states into the vector it is looked up by."""

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
